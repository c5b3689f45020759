"""What each switch of `[speed]` saves: the record in benchmarks/results/switches.json.

    python -m benchmarks.switches [--rounds 5] [--batch 8] [--only passes guidance ...]

On the toy teacher's network in float32, in one process on one thread, on and off in turns; seconds are CPU time, ratios medians
of the ratios within a round, and below 1 the first of the two is cheaper. Beside what was built are measurements of what was
not, since it does not pay on a CPU: teacher and fake score in one call, inference mode, time embeddings kept.

passes      loss and gradient of all turns of an update, with passes for features alone that end early over whole ones; and the
            bytes that the student's discriminator pass keeps
guidance    a guided teacher as one batch over two calls; teacher (guided) and fake score as one batch of three over two calls,
            as if they were one network: the most that a batch with an adapter for each sample could win
modes       a forward in inference mode over one under no_grad; the share of a forward that embeds the time
compile     forward and backward of a stack of transformer blocks, compiled over eager, and the seconds of compiling
layout      forward and backward of the toy UNet with channels last over as it is
averages    the foreach form of an average's update over one weight after another
prefetch    the main thread's CPU time for a batch from a cache on disk, with the next made ready over without
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from benchmarks.methods import ROOT, environment, write
from fastgen import config
from fastgen.data.ahead import Ahead
from fastgen.data.cache import Cache, pick
from fastgen.data.source import Source
from fastgen.denoiser import Denoiser, Guided, features_of
from fastgen.method import Batch, Method
from fastgen.pipelines import Pipeline
from fastgen.training.run import open_pipeline
from fastgen.training.sharding import reached
from fastgen.training.speed import compile_blocks, lay_out

RECORD = ROOT / "benchmarks" / "results" / "switches.json"
METHODS = ("dmd2", "ladd", "sana_sprint")
PROMPTS = ("a small red circle", "a large blue ring")


def in_turns(
    ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of the two ways, and of the first over the second within a round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for place in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if place:
                seconds[name].append(clock() - start)
    one, other = ways
    found = {f"{name}_seconds": float(f"{statistics.median(each):.3g}") for name, each in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
    return {**found, f"{one}_over_{other}": round(ratio, 3)}


def relative(a: Tensor, b: Tensor) -> float:
    return float(f"{float((a - b).double().norm() / b.double().norm()):.1e}")


def world(name: str, batch: int) -> tuple[Pipeline, Method, Batch]:
    """The toy recipe of a method, set up, and a batch of noise."""
    own = ["method.tangent=exact"] if name == "sana_sprint" else []
    run = config.load(ROOT / "configs" / "toy" / f"{name}.toml", own)
    torch.manual_seed(0)
    pipeline = open_pipeline(run, offline=True)
    run.method.setup(pipeline)
    shape = (batch, *pipeline.latent_shape)
    condition = pipeline.encode_prompts([PROMPTS[i % 2] for i in range(batch)])
    return pipeline, run.method, Batch(condition, shape, *torch.randn(3, *shape), (PROMPTS * batch)[:batch])


def turns(method: Method, data: Batch, seed: int) -> Tensor:
    """Every player's loss and gradient once, with the draws of `seed`; all gradients as one vector."""
    found, players = [], method.players()
    torch.manual_seed(seed)
    for player in players:
        for other in players:
            other.weights.requires_grad_(other is player)
        weights = list(player.weights.parameters())
        loss = torch.stack(list(player.loss(data).values())).sum()
        found += [x.flatten() for x in torch.autograd.grad(loss, weights, allow_unused=True) if x is not None]
    return torch.cat(found)


def kept_bytes(function: Callable[[], object]) -> int:
    """What a function saves for the backward pass, each memory once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = function()
    del held
    return sum(kept.values())


def passes(rounds: int, batch: int) -> dict[str, Any]:
    record: dict[str, Any] = {name: updates(name, rounds, batch) for name in METHODS}
    pipeline, method, data = world("dmd2", batch)
    student, layers = method.trained, pipeline.feature_layers
    xt, t = torch.randn(data.shape, requires_grad=True), torch.full((batch,), 0.5)
    student(xt, t, data.condition, features=layers)
    record["bytes_kept"] = {
        "on": kept_bytes(lambda: features_of(student, xt, t, data.condition, layers)),
        "off": kept_bytes(lambda: student(xt, t, data.condition, features=layers)),
    }
    return record


def updates(name: str, rounds: int, batch: int) -> dict[str, Any]:
    """All turns of an update of a method, with early ends on and off; the draws are the same."""
    _, method, data = world(name, batch)
    seeds = {True: iter(range(10**6)), False: iter(range(10**6))}

    def update(partial: bool) -> Tensor:
        for denoiser in reached(method)[0]:
            denoiser.partial = partial
        return turns(method, data, next(seeds[partial]))

    found: dict[str, Any] = in_turns({"on": lambda: update(True), "off": lambda: update(False)}, rounds)
    return {**found, "difference_of_gradients": relative(update(True), update(False))}


def guidance(rounds: int, batch: int) -> dict[str, Any]:
    pipeline, _, data = world("dmd2", batch)
    teacher = pipeline.frozen()
    xt, t, condition = torch.randn(data.shape), torch.linspace(0.1, 0.9, batch), data.condition
    assert condition.null is not None
    three = type(condition).cat([condition, condition, condition.null])

    @torch.no_grad()
    def guided(batched: bool) -> Tensor:
        teacher.batched_guidance = batched
        return Guided(teacher, 3.0)(xt, t, condition).x0

    @torch.no_grad()
    def scores(together: bool) -> Tensor:
        if together:
            return teacher(xt.repeat(3, 1, 1, 1), t.repeat(3), three).x0
        return torch.cat([teacher(xt, t, condition).x0, guided(True)])

    record: dict[str, Any] = {"guided": in_turns({"one": lambda: guided(True), "two": lambda: guided(False)}, rounds)}
    record["guided"]["difference"] = relative(guided(True), guided(False))
    record["teacher_and_fake"] = in_turns({"one": lambda: scores(True), "two": lambda: scores(False)}, rounds)
    return record


def modes(rounds: int, batch: int) -> dict[str, Any]:
    pipeline, _, data = world("dmd2", batch)
    teacher, xt, t = pipeline.frozen(), torch.randn(data.shape), torch.full((batch,), 0.5)
    network: Any = pipeline.network

    def forward(mode: Any) -> Tensor:
        with mode():
            return teacher(xt, t, data.condition).output

    @torch.no_grad()
    def embedded() -> Tensor:
        return network.time_embedding(network.time_proj(t * 999))

    record: dict[str, Any] = in_turns(
        {"inference_mode": lambda: forward(torch.inference_mode), "no_grad": lambda: forward(torch.no_grad)}, 2 * rounds
    )
    record["time_embedding"] = in_turns({"embedding": embedded, "forward": lambda: forward(torch.no_grad)}, rounds)
    return record


class Stack(nn.Module):
    def __init__(self, width: int = 128, depth: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(BasicTransformerBlock(width, 4, width // 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def both_ways(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> Tensor:
    """The gradient of a network's mean square by its weights."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    found = torch.autograd.grad(call(network).square().mean(), weights, allow_unused=True)
    return torch.cat([x.flatten() for x in found if x is not None])


def compiling(rounds: int, batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain, x = Stack(), torch.randn(batch, 256, 128)
    fast = copy.deepcopy(plain)
    compile_blocks(fast)
    start = time.process_time()
    difference = relative(both_ways(fast, lambda network: network(x)), both_ways(plain, lambda network: network(x)))
    spent = time.process_time() - start
    ways = {"compiled": fast, "eager": plain}
    record: dict[str, Any] = in_turns(
        {name: (lambda network=network: both_ways(network, lambda each: each(x))) for name, network in ways.items()}, 2 * rounds
    )
    return {**record, "first_call_seconds": round(spent, 1), "difference_of_gradients": difference}


def layout(rounds: int, batch: int) -> dict[str, Any]:
    pipeline, _, data = world("dmd2", batch)
    roles: dict[str, Denoiser] = {name: pipeline.trainable("student") for name in ("channels_last", "plain")}
    lay_out(roles["channels_last"].network)
    xt, t = torch.randn(data.shape), torch.full((batch,), 0.5)

    def gradient(name: str) -> Tensor:
        denoiser = roles[name]
        return both_ways(denoiser, lambda _: denoiser(xt, t, data.condition).output)

    record: dict[str, Any] = in_turns({name: (lambda name=name: gradient(name)) for name in roles}, rounds)
    return {**record, "difference_of_gradients": relative(gradient("channels_last"), gradient("plain"))}


def averages(rounds: int, batch: int) -> dict[str, Any]:
    pipeline, _, _ = world("dmd2", batch)
    weights = [weight.detach() for weight in pipeline.network.parameters()]
    sets = [[weight.clone() for weight in weights] for _ in range(2)]

    def one_by_one() -> None:
        for average, weight in zip(sets[1], weights, strict=True):
            average.lerp_(weight, 0.01)

    ways = {"foreach": lambda: torch._foreach_lerp_(sets[0], weights, 0.01), "one_by_one": one_by_one}
    record: dict[str, Any] = in_turns(ways, 10 * rounds)
    return {**record, "tensors": len(weights), "difference": relative(*(torch.cat([x.flatten() for x in s]) for s in sets))}


def prefetch(rounds: int, batch: int) -> dict[str, Any]:
    pipeline, _, data = world("dmd2", batch)
    prompts = [f"prompt {i}" for i in range(256)]
    whole = data.condition[[0] * len(prompts)]
    latents = torch.randn(len(prompts), *pipeline.latent_shape)
    with tempfile.TemporaryDirectory(prefix="fastgen-switches-") as folder:
        rows = Cache(Path(folder), "prompts", {}).fill(prompts, lambda index: pick(whole, torch.tensor(index)))
        sources = {name: Source(rows, pipeline.latent_shape, latents, prompts=prompts) for name in ("on", "off")}
        sources["on"] = Ahead(sources["on"])

        def batches(name: str) -> None:
            sources[name].batch(batch)

        def turn(name: str) -> Callable[[], object]:
            return lambda: batches(name)

        def rest() -> None:  # What is computed meanwhile.
            time.sleep(0.02)

        ways: dict[str, list[float]] = {"on": [], "off": []}
        for _ in range(10 * rounds):
            for name, seconds in ways.items():
                start = time.thread_time()
                turn(name)()
                seconds.append(time.thread_time() - start)
                rest()
    found = {f"{name}_seconds": float(f"{statistics.median(each[1:]):.3g}") for name, each in ways.items()}
    return {**found, "on_over_off": round(found["on_seconds"] / found["off_seconds"], 3)}


PARTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "passes": passes,
    "guidance": guidance,
    "modes": modes,
    "compile": compiling,
    "layout": layout,
    "averages": averages,
    "prefetch": prefetch,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the one that warms up (default 5)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=list(PARTS), help="measure these, and keep the others' record"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    record = {key: before[key] for key in PARTS if key in before}
    for name in options.only:
        start = time.process_time()
        record[name] = PARTS[name](options.rounds, options.batch)
        print(name, json.dumps(record[name]), f"({time.process_time() - start:.0f} s)", flush=True)
    settings = {
        "command": " ".join(["python -m benchmarks.switches", *sys.argv[1:]]),
        "rounds": options.rounds,
        "batch": options.batch,
    }
    write(RECORD, {**settings, **environment(), **{key: record[key] for key in PARTS if key in record}})


if __name__ == "__main__":
    main()
