"""Several processes learn what one process learns from the same joint batch: full weights and adapters, method by method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fastgen.config import TrainConfig
from tests.process_worlds import JointDraws, learnt, together, train

OPTIONS = TrainConfig(steps=5, batch=8, lr=1e-3, log_every=1, checkpoint_every=0, ema=0.9)
METHODS: dict[str, dict[str, Any]] = {
    "progressive": {"start_steps": 8, "stop_steps": 2},
    "dmd2": {"steps": 2, "student_every": 2, "gan_weight": 0.1},
    "sid": {"steps": 1},
    "ladd": {"steps": 4, "early_updates": 2},
}


def run(name: str, lora: bool, options: TrainConfig, folder: str, resume: Path | None = None) -> None:
    """One process of a run; the first writes what was learnt."""
    loop = train(name, METHODS[name], lora, options, Path(folder), resume)
    several = dist.is_initialized()
    assert bool(loop.sharding) == (several and options.sharding != "none")
    weights = learnt(loop)
    if not several or dist.get_rank() == 0:
        save_file(weights, Path(folder) / "weights.safetensors")


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def compare(name: str, lora: bool, processes: int, folder: Path, options: TrainConfig = OPTIONS) -> None:
    """Losses, gradient norms and weights of `processes` processes and of one, after 5 updates."""
    alone, several = folder / "alone", folder / "several"
    for each in (alone, several):
        each.mkdir()
    run(name, lora, options, str(alone))
    together(processes, run, name, lora, replace(options, batch=options.batch // processes), str(several))
    expected, found = losses(alone), losses(several)
    assert [set(line) for line in expected] == [set(line) for line in found]
    for one, other in zip(expected, found, strict=True):
        assert one.pop("health", None) == other.pop("health", None)
        assert other == pytest.approx(one, abs=1e-5, rel=1e-5)
    one, other = (load_file(each / "weights.safetensors") for each in (alone, several))
    assert one.keys() == other.keys()
    for key, weight in one.items():
        torch.testing.assert_close(other[key], weight, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_does(name: str, lora: bool, tmp_path: Path) -> None:
    compare(name, lora, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_four_processes_learn_what_one_does(name: str, lora: bool, tmp_path: Path) -> None:
    compare(name, lora, 4, tmp_path)


def test_joint_draws_are_parts_of_one_draw() -> None:
    def draw() -> list[torch.Tensor]:
        weights = torch.tensor([0.2, 0.3, 0.5])
        return [
            torch.randn(2, 3),
            torch.rand((2,)),
            torch.randint(9, (2,)),
            torch.randint(3, 9, size=(2, 2)),
            torch.randn_like(torch.zeros(2, 5)),
            torch.multinomial(weights, 2, replacement=True),
            torch.randint(4, (1,)),
            torch.rand(1, device="cpu"),
        ]

    parts = []
    for rank in range(3):
        torch.manual_seed(1)
        with JointDraws(rank, 3, 2):
            parts.append(draw())
    torch.manual_seed(1)
    weights = torch.tensor([0.2, 0.3, 0.5])
    whole = [torch.randn(6, 3), torch.rand(6), torch.randint(9, (6,)), torch.randint(3, 9, (6, 2)), torch.randn(6, 5)]
    whole += [torch.multinomial(weights, 6, replacement=True)]
    shared = [torch.randint(4, (1,)), torch.rand(1)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    assert all(torch.equal(part[i - 2], shared[i]) for part in parts for i in range(2))
