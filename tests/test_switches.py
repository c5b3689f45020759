"""What an update does not do: keep graphs that no gradient goes through, and wait for the device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from benchmarks import costs as counting
from fastgen import config, methods
from fastgen.cli.methods import costs
from fastgen.data.source import Source
from fastgen.denoiser import Denoiser, Guided
from fastgen.losses import distribution_matching
from fastgen.rollouts import time_grid, walk
from fastgen.samplers import FewStep
from fastgen.training.loop import Trainer
from tests.method_fakes import PROCESSES, FakePipeline

SHAPE, SAMPLES = (3, 4, 4), 16
RECIPES = Path(__file__).parents[1] / "configs" / "toy"
OURS = [name for name in methods.names() if methods.find(name).__module__.startswith("fastgen.methods.")]
BY_CHANCE = ("snapfusion",)
EVERY = pytest.mark.parametrize("name", OURS)


def recipe(name: str) -> config.RunConfig:
    own = ["method.backbone='tiny'", "method.backbone_size=16"] if name == "add" else []
    own += ["method.layers=[]"] if name == "ladd" else []
    return config.load(RECIPES / f"{name}.toml", own)


def fake(process: str = "vp") -> FakePipeline:
    return FakePipeline(PROCESSES[process], SHAPE, "eps" if process == "vp" else "flow", default_guidance=3.0)


# -- graphs -----------------------------------------------------------------------------------------


@EVERY
def test_networks_build_graphs_only_where_gradients_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all calls of an update only those counted in costs.json: of a rollout its last alone, of targets none."""
    counter = counting.Counter()

    def watched(run: Any) -> tuple[Any, counting.Counter, list[str]]:
        pipeline = fake()
        trainable = pipeline.trainable
        counter.watch(pipeline.base)

        def noted(role: str, **options: Any) -> Denoiser:
            denoiser = trainable(role, **options)
            counter.watch(denoiser.network)
            return denoiser

        monkeypatch.setattr(pipeline, "trainable", noted)
        return pipeline, counter, []

    monkeypatch.setattr(counting, "watched", watched)
    monkeypatch.setattr(counting, "PROMPTS", ("0", "1"))
    run = recipe(name)
    monkeypatch.setattr(counting.config, "load", lambda path: run)
    found = counting.cost(name)
    if name in BY_CHANCE:  # how often a second network learns in an update
        assert 1 <= found["trained"] <= 2
    else:
        assert found["trained"] == costs()[name]["trained"]


def kept(function: Any) -> int:
    """How many tensors a function keeps for a backward pass."""
    count = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return count


def test_targets_and_rollouts_keep_nothing() -> None:
    pipeline = fake()
    student, condition = pipeline.trainable("student"), pipeline.encode_prompts(["0", "1"])
    noise, t = torch.randn(2, *SHAPE), torch.full((2,), 0.5)
    sampler, one = FewStep((1.0, 0.75, 0.5, 0.25)), kept(lambda: student(noise, t, condition))
    assert one > 0
    rollout = kept(lambda: sampler.sample(student, noise, condition, exit_at=3))
    assert rollout <= one + 4, "of a rollout the last call alone, and the step from it"
    x = torch.randn(2, *SHAPE, requires_grad=True)
    assert kept(lambda: distribution_matching(x, t, condition, student, Guided(student, 3.0))) <= 4
    times = time_grid("grid", 8, pipeline.process)
    with torch.no_grad():
        assert kept(lambda: walk(student, noise, times, torch.tensor([0, 3]), 2, condition)) == 0


# -- waiting for the device -------------------------------------------------------------------------

WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero")
"""What waits for the device where a tensor is on one."""
ON_THE_CPU = {
    ("source.py", "at"): "positions of samples, which are drawn on the CPU",
    ("draws.py", "shared_choice"): "drawn on the CPU by one process; several wait for one another anyway",
    ("draws.py", "shared_uniform"): "the same",
    ("loop.py", "check"): "in every update on a CPU only",
    ("score_distillation.py", "times_after"): "numbers of Python",
}
WAITED_FOR = {
    ("ways.py", "answer_and_derivative"): "how many samples a derivative is taken of decides shapes",
    ("optimizers.py", "step"): "an optimiser that is not fused",
    ("process.py", "time_at"): "the last angle of a noise table, for methods that see it through another process",
    ("forward.py", "__torch_function__"): "the same, where derivatives are taken",
}


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Within, waits are counted by file and function of ours."""
    found: Counter[tuple[str, str]] = Counter()

    def watch(name: str) -> Any:
        plain = getattr(Tensor, name)

        def wait(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame: Any = sys._getframe(1)
            while frame is not None and "/fastgen/" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None:
                code = frame.f_code
                found[Path(code.co_filename).name, code.co_name] += 1
            return plain(x, *args, **kwargs)

        return patch.object(Tensor, name, wait)

    with ExitStack() as stack:
        for name in WAITS:
            stack.enter_context(watch(name))
        yield found


def trainer(name: str) -> Trainer:
    run, pipeline = recipe(name), fake()
    method: Any = run.method
    if hasattr(method, "student_every"):
        method.student_every = 1
    method.setup(pipeline)
    condition = pipeline.encode_prompts([str(i % 2) for i in range(SAMPLES)])
    pairs = type(condition)({"noise": torch.randn(SAMPLES, *SHAPE), "target": torch.randn(SAMPLES, *SHAPE)})
    prompts = [str(i % 2) for i in range(SAMPLES)]
    data = Source(condition, SHAPE, torch.randn(SAMPLES, *SHAPE), pairs=pairs, prompts=prompts)
    options = replace(run.train, steps=1000, batch=4, micro_batches=1, precision="fp32", log_every=500, checkpoint_every=0)
    return Trainer(method, data, options, device="cpu")


@EVERY
def test_an_update_does_not_wait_for_the_device(name: str) -> None:
    trained = trainer(name)
    trained.update()
    with counted() as found:
        trained.update()
        trained.update()
    assert set(found) <= ON_THE_CPU.keys() | WAITED_FOR.keys(), found


def test_waits_are_seen() -> None:
    trained = trainer("lcm")
    with counted() as found:
        trained.update()
        trained.log()
    assert ("loop.py", "log") in found
