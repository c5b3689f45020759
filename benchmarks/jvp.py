"""What derivatives cost: the record in benchmarks/results/jvp.json.

    python -m benchmarks.jvp [--rounds 9] [--batch 4]

In one process, in turns, with one thread: a forward without gradient, torch's forward mode ("plain") and ours ("exact"), on the
toy teacher's network and on a network of convolutions as EDM's (Karras et al. 2022), 64 to 128 channels at 32 x 32 with
attention at 16 x 16; then an update's loss and gradient of sCM and MeanFlow with either. Seconds are CPU time, which others on
the machine disturb least, and ratios are medians of the ratios within a round. Beside them is how far derivatives and
gradients of the two are apart, and the error of differences at several steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from fastgen import config, methods
from fastgen.denoiser import Condition, Denoiser
from fastgen.method import Batch
from fastgen.pipelines import Pipeline
from fastgen.process import Flow
from fastgen.tangents import answer_and_derivative, derivative
from fastgen.training.run import open_pipeline

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "jvp.json"
PACKAGES = ("torch", "diffusers")
PROMPTS = ("a small red circle", "a large blue ring")
STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def convolutions() -> tuple[Denoiser, Condition, tuple[int, ...]]:
    """A flow network of random weights; it has no condition."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    ).eval()

    def call(network: Any, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        found: Tensor = network(x, t * 1000, return_dict=False)[0]
        return found

    return Denoiser(network, call, Flow(), "flow"), Condition({}), (3, 32, 32)


def toy(name: str) -> tuple[Pipeline, config.RunConfig]:
    run = config.load(ROOT / "configs" / "toy" / f"{name}.toml")
    return open_pipeline(run, offline=True), run


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way in each round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for place in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if place:
                seconds[name].append(time.process_time() - start)
    return seconds


def over(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median ratio of two ways within a round."""
    return round(statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True)), 2)


def network_costs(denoiser: Denoiser, condition: Condition, shape: tuple[int, ...], batch: int, rounds: int) -> dict[str, Any]:
    """Costs of derivatives over that of a forward, and the differences between them."""
    torch.manual_seed(1)
    x, dx, t = torch.randn(batch, *shape), torch.randn(batch, *shape), torch.linspace(0.2, 0.8, batch)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, condition).flow

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x, t)

    def along(**options: Any) -> Tensor:
        return derivative(function, denoiser, x, t, dx, **options)

    seconds = in_turns(
        {
            "forward": forward,
            "plain": lambda: along(way="plain"),
            "exact": along,
            "central": lambda: along(way="central"),
            "forward with its graph": lambda: function(x, t),
            "with the answer's graph": lambda: answer_and_derivative(lambda index: function, denoiser, x, t, dx),
        },
        rounds,
    )
    plain = along(way="plain")

    def apart(found: Tensor) -> float:
        return float(f"{float((found - plain).norm() / plain.norm()):.1e}")

    return {
        "forward_seconds": round(statistics.median(seconds["forward"]), 4),
        "over_forward": {name: over(seconds, name, "forward") for name in seconds if name != "forward"},
        "difference_from_plain": apart(along()),
        "error_of_central_differences": {f"{step:g}": apart(along(way="central", step=step)) for step in STEPS},
    }


def update_costs(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of an update's loss and gradient on the toy teacher, by plain forward mode and by ours."""
    pipeline, run = toy(name)
    kind: Any = methods.find(name)
    options = {} if name == "mean_flow" else {"warmup": 0}
    torch.manual_seed(0)
    made: dict[str, Any] = {way: kind(tangent=way, **options) for way in ("plain", "exact")}
    for method in made.values():
        method.setup(pipeline)
    student = made["plain"].student
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    made["exact"].student.load_state_dict(student.state_dict())
    shape = (batch, *pipeline.latent_shape)
    condition = pipeline.encode_prompts([PROMPTS[i % 2] for i in range(batch)])
    data = Batch(condition, shape, torch.randn(shape))

    def update(method: Any, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        loss = sum(method.loss(data).values())
        weights = [weight for weight in method.student.parameters() if weight.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    seeds = {way: iter(range(rounds + 1)) for way in made}

    def turn(way: str) -> list[Tensor]:
        return update(made[way], next(seeds[way]))

    turns: dict[str, Callable[[], object]] = {way: functools.partial(turn, way) for way in made}
    seconds = in_turns(turns, rounds)
    plain, exact = (torch.cat([each.flatten() for each in update(made[way], 99)]) for way in ("plain", "exact"))
    return {
        "plain_seconds": round(statistics.median(seconds["plain"]), 4),
        "exact_seconds": round(statistics.median(seconds["exact"]), 4),
        "times_as_fast": over(seconds, "plain", "exact"),
        "difference_of_gradients": float(f"{float((plain - exact).norm() / plain.norm()):.1e}"),
        "student": "lora" if run.role("student") == "lora" else "full",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jvp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds after the one that warms up (default 9)")
    parser.add_argument("--batch", type=int, default=4, help="samples of convolutions; four times as many of the toy's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, _ = toy("scm")
    several = 4 * options.batch
    condition = pipeline.encode_prompts([PROMPTS[i % 2] for i in range(several)])
    student = pipeline.trainable("student")
    record = {
        "command": " ".join(["python -m benchmarks.jvp", *sys.argv[1:]]),
        "machine": {"cpu": platform.machine(), "python": platform.python_version(), "threads": 1},
        "versions": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
        "networks": {
            "convolutions": network_costs(*convolutions(), options.batch, options.rounds),
            "toy": network_costs(student, condition, pipeline.latent_shape, several, options.rounds),
        },
        "updates": {name: update_costs(name, several, options.rounds) for name in ("scm", "mean_flow")},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
