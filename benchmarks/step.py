"""How near an update is to the network calls that it is made of: the record in benchmarks/results/step.json.

    python -m benchmarks.step [--network transformer conv] [--batch 4] [--methods lcm dmd2 ...] [--rounds 12]
    python -m benchmarks.step --module mine.py:make          # any nn.Module called as (x, t, condition)

In each round one update of the trainer is timed, with a wrapper on every network that notes its calls; right after it the same
calls are made again one by one, each by itself on the same network, with the same batch and precision and everything else that
its cost depends on, and timed too, as is the optimiser's step with torch's clipping. Their sum is the floor of that very
update. Recorded are the calls of each kind, their times, updates a second, and the median over rounds of update / floor;
a round has as many updates as the student's turns are apart. Seconds are CPU time on one thread. What was counted stands beside
fastgen/methods/costs.json, which was counted under the options of the toy recipe; these are the options here too, but that
derivatives are exact.

Peak memory is that of two updates in a process of its own (benchmarks/peak.py), beyond what was resident before.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocator import keep_freed_memory
from benchmarks.bare import PRESETS, BarePipeline, load_module, random_source
from benchmarks.calls import Kind, Watch, clock
from benchmarks.costs import COSTS, student_every
from benchmarks.methods import ROOT, environment, write
from benchmarks.peak import beyond
from fastgen import config
from fastgen.config import TrainConfig
from fastgen.training.loop import Trainer
from fastgen.training.run import open_pipeline

RECORD = ROOT / "benchmarks" / "results" / "step.json"
METHODS = ("progressive", "lcm", "scm", "mean_flow", "dmd2", "sid", "ladd")
GOAL = {"cpu": 1.05, "cuda": 1.10}
WARM_UP = 2
OWN = {"scm": ("method.tangent=exact",)}
"""What is measured otherwise than the toy recipe has it."""
SAFE_LR = 1e-6
"""Nothing is to be learnt here, and random data must not blow up a network on the way."""


def recipe(method: str) -> config.RunConfig:
    """The toy recipe: the method's options, and those of its optimiser."""
    return config.load(ROOT / "configs" / "toy" / f"{method}.toml", ["train.threads=1", *OWN.get(method, ())])


def make_pipeline(network: str, module: str, device: str) -> Any:
    """The toy teacher, or the bare module of a preset or of a file."""
    if network == "toy" and not module:
        return open_pipeline(recipe("lcm"), offline=True, device=device)
    torch.manual_seed(0)
    return BarePipeline(load_module(module or PRESETS[network]), device)


def make_trainer(name: str, pipeline: Any, batch: int, precision: str, device: str) -> Trainer:
    """A trainer of the method's toy recipe on this pipeline, with random data and no average."""
    run = recipe(name)
    method: Any = run.method
    if isinstance(pipeline, BarePipeline) and getattr(method, "layers", ()):
        method.layers = ()  # The recipe names layers of the toy teacher; a bare module says itself where to look.
    torch.manual_seed(0)
    method.setup(pipeline)
    options: TrainConfig = replace(run.train, batch=batch, precision=precision, ema=0.0, lr=SAFE_LR)  # type: ignore[arg-type]
    return Trainer(method, random_source(pipeline, method.needs), options, device=device)


class Rounds:
    """Updates and their floors in turns."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.watch = trainer, Watch(trainer)
        self.every = student_every(trainer.method)
        self.updates: list[float] = []
        self.floors: list[float] = []
        self.counts: Counter[str] = Counter()
        self.samples = 0.0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def round(self) -> None:
        """As many updates as the student's turns are apart, each followed by its floor."""
        update = floor = 0.0
        for _ in range(self.every):
            gc.collect()
            with self.watch.watching():
                start = clock(self.watch.device)
                self.trainer.update()
                update += clock(self.watch.device) - start
            floor += self.floor(self.watch.counts(), self.watch.steps)
        self.updates.append(update)
        self.floors.append(floor)

    def floor(self, calls: Counter[Kind], steps: Counter[str]) -> float:
        """The sum over the calls of an update of what each takes by itself."""
        total = 0.0
        for kind, number in calls.items():
            size = kind.shapes[0][0][0]
            for name, seconds in zip(kind.names(), self.watch.alone(kind), strict=True):
                if name:
                    total += number * seconds
                    self.counts[label := self.labelled(kind, name, size)] += number
                    self.seconds[label].append(seconds)
            if self.is_network(kind):
                self.samples += number * size * (2 if kind.derivative else 1)
        for player, number in steps.items():
            seconds = self.watch.step_alone(player)
            total += number * seconds
            self.counts[label := f"optimiser of the {player}"] += number
            self.seconds[label].append(seconds)
        return total

    def is_network(self, kind: Kind) -> bool:
        return kind.role >= 0

    def labelled(self, kind: Kind, name: str, size: int) -> str:
        """A line of the record."""
        return f"{'network' if self.is_network(kind) else 'heads'}, batch {size}: {name}"

    def forget(self) -> None:
        """What the warm-up has measured."""
        self.updates, self.floors, self.samples = [], [], 0.0
        self.counts.clear()
        self.seconds.clear()

    def record(self, batch: int) -> dict[str, Any]:
        rounds = len(self.updates)
        ratios = [update / floor for update, floor in zip(self.updates, self.floors, strict=True)]
        calls = {
            name: {"a_round": self.counts[name] / rounds, "ms_each": 1000 * statistics.median(self.seconds[name])}
            for name in sorted(self.counts)
        }
        return {
            "updates_a_round": self.every,
            "updates_a_second": self.every / statistics.median(self.updates),
            "ms_per_round": 1000 * statistics.median(self.updates),
            "ms_floor": 1000 * statistics.median(self.floors),
            "ratio": statistics.median(ratios),
            "ratio_of_sums": sum(self.updates) / sum(self.floors),
            "ratio_quartiles": [float(value) for value in statistics.quantiles(ratios, n=4)[::2]] if rounds > 1 else ratios * 2,
            "samples_through_the_network": self.samples / rounds / batch,
            "calls": calls,
        }


def expected_samples(name: str) -> float | None:
    """What fastgen/methods/costs.json says goes through the network for a sample, with gradient or without."""
    known = json.loads(COSTS.read_text())[name]
    return round(known["forward"] + known["trained"], 1)


def measure(name: str, pipeline: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One method's record."""
    trainer = make_trainer(name, pipeline, args.batch, args.precision, args.device)
    rounds = Rounds(trainer)
    for _ in range(WARM_UP):
        rounds.round()
    rounds.forget()
    start = time.monotonic()
    while len(rounds.updates) < args.rounds and (time.monotonic() - start < args.seconds or len(rounds.updates) < 3):
        rounds.round()
    rounds.watch.close()
    return {"method": name, **rounds.record(args.batch), "samples_in_costs_json": expected_samples(name)}


def peak(name: str, pipeline: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Most bytes of two rounds, beyond those before the method's networks were made."""

    def run() -> None:
        trainer = make_trainer(name, pipeline, args.batch, args.precision, args.device)
        for _ in range(2 * student_every(trainer.method)):
            trainer.update()

    return beyond(run, args.device)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--network", nargs="+", choices=("toy", *PRESETS), default=["transformer", "conv"])
    found.add_argument("--module", default="", metavar="FILE.py:FACTORY", help="in place of --network")
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    found.add_argument("--rounds", type=int, default=12, help="at most, of each method")
    found.add_argument("--seconds", type=float, default=12.0, help="at most, of each method")
    found.add_argument("--device", default="cpu")
    found.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    found.add_argument("--keep", action="store_true", help="the networks that the record has already, and add to them")
    found.add_argument("--output", type=Path, default=RECORD)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(arguments)
    torch.set_num_threads(1)
    kept = torch.device(args.device).type == "cpu" and keep_freed_memory()
    network = f"--module {args.module}" if args.module else f"--network {' '.join(args.network)}"
    command = f"python -m benchmarks.step {network} --batch {args.batch} --rounds {args.rounds}"
    for name in ("seconds", "device", "precision"):
        if getattr(args, name) != parser().get_default(name):
            command += f" --{name} {getattr(args, name)}"
    command += " --keep" * args.keep
    record: dict[str, Any] = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "precision": args.precision,
        "freed_memory_kept": kept,
        "goal": GOAL[torch.device(args.device).type],
        "networks": [one_network(name, args) for name in ([""] if args.module else args.network)],
    }
    if args.keep and args.output.is_file():
        before = json.loads(args.output.read_text())
        record["networks"] = before["networks"] + record["networks"]
        record["command"] = f"{before['command']}; {command}"
    write(args.output, record)
    return record


def one_network(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All the methods on one network."""
    pipeline = make_pipeline(name, args.module, args.device)
    found: dict[str, Any] = {"network": args.module or name, "batch": args.batch, "methods": []}
    found["parameters"] = sum(weight.numel() for weight in pipeline.network.parameters())
    memory = {method: peak(method, pipeline, args) for method in args.methods}
    for method in args.methods:
        row = measure(method, pipeline, args) | memory[method]
        found["methods"].append(row)
        print(
            f"{found['network']:<14}{method:<12}{row['updates_a_second']:7.2f} updates/s {row['ms_per_round']:8.1f} ms a round"
            f"{row['ms_floor']:9.1f} floor   ratio {row['ratio']:.3f}  {row['peak'] / 1e6:7.1f} MB",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
