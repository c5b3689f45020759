"""How the cost of an update grows: the record in benchmarks/results/scaling.json.

    python -m benchmarks.scaling [--rounds 2] [--parts batch resolution steps rank processes]

On the networks of benchmarks/examples, CPU seconds of an update on one thread, in turns, medians:

batch, resolution   LCM: the exponent of a power of the batch, of the pixels of a network of convolutions, or of the tokens of
                    a transformer, beside that of the operations which torch counts (FlopCounterMode)
steps               DMD2 with a student of n steps, the mean of its shortest and its longest rollout: milliseconds a step,
                    beside half a forward pass for each time that a player generates
rank                LCM with a LoRA: milliseconds a rank beside those of the operations that a rank adds, and trained weights
processes           LCM by 1 and by 2 gloo processes: each with the same batch (weak), or sharing it (strong). CPU time of a
                    process tells what averaging gradients costs whatever else the machine does; wall time is of two processes
                    only where two cores are free, so the load of the machine is recorded beside it
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.allocator import keep_freed_memory
from benchmarks.bare import PRESETS, BarePipeline, load_module, random_source
from benchmarks.jvp import in_turns
from benchmarks.methods import ROOT, environment, write
from benchmarks.peak import forked
from benchmarks.step import SAFE_LR, recipe
from fastgen.adapters import LoraOptions
from fastgen.families import score_distillation
from fastgen.training.loop import Trainer

RECORD = ROOT / "benchmarks" / "results" / "scaling.json"
BATCHES, SIDES, STEPS, RANKS = (2, 4, 8, 16), (8, 16, 32), (1, 4, 8), (4, 16, 64)
PARTS = ("batch", "resolution", "steps", "rank", "processes")


def network(name: str, side: int = 16) -> Any:
    """A module of the examples for latents of side x side."""
    module = load_module(PRESETS[name])
    return module if side == 16 else type(module)(sample_shape=(4, side, side))  # type: ignore[call-arg]


def trainer(
    method: str,
    pipeline: Any,
    batch: int,
    share: tuple[int, int] = (0, 1),
    options: dict[str, Any] | None = None,
) -> Trainer:
    """Of the toy recipe's options, but for `options` of the method; the process `share` of so many."""
    run = recipe(method)
    chosen = replace(run.method, **(options or {}))
    torch.manual_seed(0)
    chosen.setup(pipeline)
    data = random_source(pipeline, chosen.needs)
    data.rank, data.processes = share
    train = replace(run.train, batch=batch, precision="fp32", ema=0.0, lr=SAFE_LR)
    return Trainer(chosen, data, train, device="cpu")


def operations(update: Callable[[], object]) -> int:
    """Of matrices, convolutions and attention, in one update."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        update()
    return counter.get_total_flops()


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the power of x that fits y best, in logarithms."""
    return slope([math.log(x) for x in xs], [math.log(y) for y in ys])


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line that fits best."""
    return statistics.linear_regression(xs, ys).slope


def grown(name: str, trainers: dict[int, Trainer], rounds: int) -> dict[str, Any]:
    """Seconds and operations of an update for each size, and the exponents of both."""
    counted = {size: operations(each.update) for size, each in trainers.items()}
    seconds = in_turns({str(size): each.update for size, each in trainers.items()}, rounds)
    times = {size: statistics.median(seconds[str(size)]) for size in trainers}
    return {
        "what": name,
        "sizes": list(trainers),
        "ms": [1000 * value for value in times.values()],
        "giga_operations": [value / 1e9 for value in counted.values()],
        "exponent": exponent(list(times), list(times.values())),
        "expected": exponent(list(counted), list(counted.values())),
    }


def against_batch(rounds: int) -> list[dict[str, Any]]:
    pipeline = BarePipeline(network("conv"))
    return [grown("batch, convolutions", {batch: trainer("lcm", pipeline, batch) for batch in BATCHES}, rounds)]


def against_resolution(rounds: int) -> list[dict[str, Any]]:
    found = []
    for name, words in (("conv", "pixels, convolutions"), ("transformer", "tokens, transformer")):
        cells = {side: side * side // (4 if name == "transformer" else 1) for side in SIDES}
        sizes = {cells[side]: trainer("lcm", BarePipeline(network(name, side)), 2) for side in SIDES}
        found.append(grown(words, sizes, rounds))
    return found


def against_steps(rounds: int) -> list[dict[str, Any]]:
    """DMD2's generations end at the first call or at the last, in turns; their mean is that of a random end."""
    pipeline, batch = BarePipeline(network("transformer")), 2
    ways: dict[str, Callable[[], object]] = {}
    every = 0

    def ending(each: Trainer, place: int) -> Callable[[], object]:
        def update() -> None:
            with patch.object(score_distillation, "shared_choice", lambda count, device: place):
                for _ in range(every):
                    each.update()

        return update

    for steps in STEPS:
        each = trainer("dmd2", pipeline, batch, options={"steps": steps})
        every = each.method.student_every  # type: ignore[attr-defined]
        ways |= {f"{steps} {place}": ending(each, place) for place in sorted({0, steps - 1})}
    teacher, x = pipeline.frozen(), torch.randn(batch, *pipeline.latent_shape)
    condition = pipeline.encode_prompts(["a"] * batch)

    @torch.no_grad()
    def forward() -> None:
        teacher(x, torch.full((batch,), 0.5), condition)

    seconds = in_turns(ways | {"forward": forward}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    means = [statistics.mean([medians[f"{steps} {place}"] for place in (0, steps - 1)]) for steps in STEPS]
    return [
        {
            "what": "steps of a DMD2 student",
            "sizes": list(STEPS),
            "ms": [1000 * value for value in means],
            "ms_a_step": 1000 * slope(STEPS, means),
            "expected_ms_a_step": 1000 * 0.5 * (every + 1) * medians["forward"],
        }
    ]


def against_rank(rounds: int) -> list[dict[str, Any]]:
    made = {
        rank: trainer("lcm", BarePipeline(network("transformer"), lora=LoraOptions(rank=rank)), 4, options={"ema_decay": 0.0})
        for rank in RANKS
    }
    weights = {rank: sum(weight.numel() for weight in each.turns[0].weights) for rank, each in made.items()}
    found = grown("rank of a LoRA", made, rounds)
    milliseconds = dict(zip(RANKS, found["ms"], strict=True))
    giga = dict(zip(RANKS, found["giga_operations"], strict=True))
    per_operation = milliseconds[RANKS[0]] / giga[RANKS[0]]
    return [
        found
        | {
            "trained_weights": list(weights.values()),
            "exponent_of_weights": exponent(list(weights), list(weights.values())),
            "ms_a_rank": slope(RANKS, found["ms"]),
            "expected_ms_a_rank": slope(RANKS, found["giga_operations"]) * per_operation,
        }
    ]


# -- processes ------------------------------------------------------------------------------------


def alone_or_together(rank: int, processes: int, port: int, batch: int, rounds: int, folder: str) -> None:
    """One process: its CPU and wall seconds an update, written to a file."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    if processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        dist.init_process_group("gloo", rank=rank, world_size=processes)
    each = trainer("lcm", BarePipeline(network("transformer")), batch, (rank, processes))
    for _ in range(2):
        each.update()
    spent, wall = time.process_time(), time.perf_counter()
    for _ in range(rounds):
        each.update()
    spent, wall = (time.process_time() - spent) / rounds, (time.perf_counter() - wall) / rounds
    (Path(folder) / f"{rank}").write_text(f"{spent} {wall}")
    if processes > 1:
        dist.destroy_process_group()


def run_processes(processes: int, batch: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of a process an update, the mean of all, and wall milliseconds, the most."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="fastgen-scaling-") as folder:
        arguments = (processes, port, batch, rounds, folder)
        mp.start_processes(alone_or_together, arguments, nprocs=processes, start_method="fork")  # type: ignore[no-untyped-call]
        times = [[float(word) for word in path.read_text().split()] for path in Path(folder).iterdir()]
    return {"cpu_ms": 1000 * statistics.mean(cpu for cpu, _ in times), "wall_ms": 1000 * max(wall for _, wall in times)}


def against_processes(rounds: int) -> list[dict[str, Any]]:
    number, batch = 3 * rounds, 4
    load = os.getloadavg()[0]
    alone, weak, strong = (run_processes(*each, number) for each in ((1, batch), (2, batch), (2, batch // 2)))
    return [
        {
            "what": "processes",
            "batch": batch,
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "one": alone,
            "two_weak": weak,
            "two_strong": strong,
            "weak_cpu_over_one": weak["cpu_ms"] / alone["cpu_ms"],
            "strong_cpu_of_both_over_one": 2 * strong["cpu_ms"] / alone["cpu_ms"],
            "weak_wall_over_one": weak["wall_ms"] / alone["wall_ms"],
            "strong_wall_over_one": strong["wall_ms"] / alone["wall_ms"],
        }
    ]


MEASURES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "batch": against_batch,
    "resolution": against_resolution,
    "steps": against_steps,
    "rank": against_rank,
    "processes": against_processes,
}


def measured(part: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of a part, from a process of its own, which inherits nothing that another part has left in memory."""
    if part == "processes":
        return MEASURES[part](rounds)
    rows: list[dict[str, Any]] = forked(lambda: {"rows": MEASURES[part](rounds)})["rows"]
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        found = measured(part, args.rounds)
        rows += found
        for row in found:
            print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    command = " ".join(["python -m benchmarks.scaling", *(sys.argv[1:] if arguments is None else arguments)])
    record = {"command": command, "date": time.strftime("%Y-%m-%d"), **environment(), "rows": rows}
    write(args.output, record)
    return record


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(shown(each) for each in value) + "]"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {shown(each)}" for key, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
