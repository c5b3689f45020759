"""`make bench`: seconds per update of each method, and per picture of teacher and student, on the toy teacher and this CPU.

Figures are medians over the lines of a run's own metrics.jsonl; the first line, which warms up, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from fastgen import methods
from fastgen.config import RunConfig, TrainConfig
from fastgen.samplers import FewStep, even_times
from fastgen.training.run import distill, load_run

PICTURES = 16


def seconds_per_update(name: str, folder: Path, updates: int, batch: int) -> float:
    """Median seconds of an update, all players' turns together."""
    train = TrainConfig(steps=updates, batch=batch, log_every=max(1, updates // 8), threads=torch.get_num_threads())
    run = RunConfig(method_name=name, method=methods.find(name)(), train=train)
    distill(run, folder, device="cpu", offline=True, quiet=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(lines))


def seconds_per_picture(folder: Path) -> dict[str, float]:
    """Median seconds of a picture, in batches of `PICTURES`: the guided teacher at 50 steps, the student at its own."""
    loaded = load_run(folder, offline=True)
    pipeline, sampler = loaded.pipeline, loaded.method.sampler()
    teacher = FewStep(even_times(50, pipeline.process), guidance=pipeline.default_guidance)
    condition = pipeline.encode_prompts(["a small red circle"] * PICTURES)
    noise = torch.randn(PICTURES, *pipeline.latent_shape)
    candidates = {
        "teacher, 50 steps": (pipeline.frozen(), teacher),
        f"student, {sampler.steps} steps": (loaded.student, sampler),
    }
    found = {}
    for name, (who, how) in candidates.items():
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            with torch.no_grad():
                pipeline.decode(how.sample(who, noise, condition))
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds[1:]) / PICTURES
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="METHOD", help="default: all")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}\n")
    with tempfile.TemporaryDirectory(prefix="fastgen-bench-") as folder:
        for name in args.names or methods.names():
            run = Path(folder) / name
            print(f"{name:<14}{seconds_per_update(name, run, args.updates, args.batch):8.3f} s per update", flush=True)
        for name, seconds in seconds_per_picture(run).items():
            print(f"{name:<20}{1000 * seconds:8.1f} ms per picture")


if __name__ == "__main__":
    main()
