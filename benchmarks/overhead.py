"""How much of a training update is spent outside the networks' forward and backward passes and the optimiser's step.

    python -m benchmarks.overhead [--method dmd2] [--call 50] [--updates 60]

The toy recipe of the method is trained with a batch for which one call of the network takes about `--call` milliseconds. CPU
time of the process on one thread, from the first counted update to the last, everything in between included: data, sampling of
times and noise, losses, the gradient's norm, averages, readings, metrics, progress. The optimiser's part is its step with the
clipping in it and the freeing of gradients (torch's zero_grad). The record goes to benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from benchmarks.methods import ROOT, environment, write
from fastgen import config
from fastgen.config import RunConfig
from fastgen.critics.heads import Heads
from fastgen.training import optimizers
from fastgen.training.loop import Trainer
from fastgen.training.run import distill, open_pipeline

RECORD = ROOT / "benchmarks" / "results" / "overhead.json"
WARM_UP = 10
GOAL = 0.03


class Stopwatch:
    """CPU seconds spent in named parts; what is called inside a part that is being timed belongs to that part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inside = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[name] += time.process_time() - start
                self.calls[name] += 1

        return run


@contextmanager
def watched(clock: Stopwatch) -> Iterator[list[float]]:
    """Within, parts of updates are timed by `clock`, from nothing after the warm-up. The list gets the time before every update
    from there on.
    """
    moments: list[float] = []
    start, update = Trainer.__init__, Trainer.update

    def prepare(trainer: Trainer, method: Any, *args: Any, **kwargs: Any) -> None:
        start(trainer, method, *args, **kwargs)
        for module in modules_of(method):
            module.forward = clock.timed("forward", module.forward)

    def one(trainer: Trainer) -> None:
        if trainer.step == WARM_UP:
            clock.seconds.clear()
            clock.calls.clear()
        if trainer.step >= WARM_UP:
            moments.append(time.process_time())
        clock.inside = trainer.step + 1 == trainer.total  # the last update is not counted: it ends after the last moment
        update(trainer)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Trainer, "__init__", prepare))
        stack.enter_context(patch.object(Trainer, "update", one))
        stack.enter_context(patch.object(Accelerator, "backward", clock.timed("backward", Accelerator.backward)))
        stack.enter_context(patch.object(optimizers, "step", clock.timed("optimiser", optimizers.step)))
        stack.enter_context(patch.object(Trainer, "thaw", clock.timed("optimiser", Trainer.thaw)))
        yield moments


def modules_of(method: Any) -> list[torch.nn.Module]:
    """The networks that a method's players and teacher are, and the heads of its discriminators, each once."""
    from fastgen.training.sharding import reached

    denoisers, _ = reached(method)
    found = {id(each.network): each.network for each in denoisers}
    for player in method.players():
        found |= {id(module): module for module in player.weights.modules() if isinstance(module, Heads)}
    return list(found.values())


def recipe(method: str, *own: str) -> RunConfig:
    quiet = ["train.threads=1", "train.sample_every=0", "train.checkpoint_every=0", "data.pool=512"]
    return config.load(ROOT / "configs" / "toy" / f"{method}.toml", [*quiet, *own])


def batch_for(milliseconds: float) -> int:
    """The batch for which a call of the toy teacher takes about so long, without gradient."""
    pipeline = open_pipeline(recipe("dmd2"), offline=True)
    teacher = pipeline.frozen()
    count = 16
    condition, x = pipeline.encode_prompts(["a red circle"] * count), torch.randn(count, *pipeline.latent_shape)
    seconds = []
    with torch.no_grad():
        for _ in range(8):
            start = time.process_time()
            teacher(x, torch.full((count,), 0.5), condition)
            seconds.append(time.process_time() - start)
    return max(1, round(count * milliseconds / 1000 / statistics.median(seconds[2:])))


def measure(method: str, batch: int, updates: int) -> dict[str, Any]:
    """Shares of an update's CPU time, of a run with precision as in the recipe."""
    clock = Stopwatch()
    own = [f"train.steps={WARM_UP + updates + 1}", f"train.batch={batch}", 'train.precision="fp32"']
    with tempfile.TemporaryDirectory(prefix="fastgen-overhead-") as folder, watched(clock) as moments:
        distill(recipe(method, *own), Path(folder) / "run", offline=True, quiet=True, device="cpu")
    total, whole = moments[-1] - moments[0], len(moments) - 1
    shares = {name: seconds / total for name, seconds in clock.seconds.items()}
    return {
        "method": method,
        "batch": batch,
        "updates": whole,
        "ms_per_update": 1000 * total / whole,
        "ms_per_forward": 1000 * clock.seconds["forward"] / clock.calls["forward"],
        "shares": shares,
        "outside": 1 - sum(shares.values()),
        "goal": GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dmd2")
    parser.add_argument("--call", type=float, default=50.0, help="milliseconds of a network call")
    parser.add_argument("--updates", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m benchmarks.overhead --method {args.method} --call {args.call:g} --updates {args.updates}"
    record = {"command": command, **environment(), **measure(args.method, batch_for(args.call), args.updates)}
    write(RECORD, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
