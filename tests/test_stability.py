"""2,000 updates of the real loop by every method, in both precisions, without a loss, gradient or weight that is no number."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import config, losses, methods
from fastgen.analytic import Mixture
from fastgen.config import TrainConfig
from fastgen.data.source import Source
from fastgen.denoiser import Condition
from fastgen.method import Batch, Loss
from fastgen.methods.add import ADD
from fastgen.methods.ladd import LADD
from fastgen.process import Kind
from fastgen.training.loop import Trainer, Turn
from tests.method_fakes import PROCESSES, FakePipeline, learn_teacher
from tests.training_fakes import Duel, fake_source
from tests.training_fakes import FakePipeline as LinearPipeline

UPDATES, BATCH, SAMPLES, SHAPE = 2000, 8, 256, (3, 4, 4)
RECIPES = Path(__file__).parents[1] / "configs" / "toy"
OTHERWISE = {"add": ["method.backbone='tiny'", "method.backbone_size=16"], "ladd": ["method.layers=[]"]}
"""What of a recipe is the toy teacher's network alone."""
RUNS: list[tuple[str, Kind, str]] = [("vp", "eps", "fp32"), ("vp", "v", "bf16"), ("flow", "flow", "bf16")]


class Strict(Trainer):
    """Refuses a loss, a gradient (by its norm) or a weight that is not finite where the trainer itself would step over it."""

    def move(self, turn: Turn) -> None:
        super().move(turn)
        for name, total in self.averages.sums.items():
            assert total.isfinite(), f"{name} is {float(total)} in update {self.step}"
        largest = torch.stack([weight.detach().abs().amax() for weight in turn.weights]).amax()
        assert largest.isfinite(), f"a weight of {turn.player.name} is not finite in update {self.step}"


@functools.cache
def world(process: str, kind: Kind) -> tuple[dict[str, Tensor], Condition, Tensor, Condition]:
    """A small network that has learnt to denoise two clusters; labels, samples, and pairs of noise and where it leads."""
    means = torch.stack([torch.linspace(-1, 1, math.prod(SHAPE)).view(SHAPE), torch.full(SHAPE, 0.4)])
    teacher = Mixture([0.5, 0.5], means, [0.3, 0.2], PROCESSES[process], kind)
    pipeline = FakePipeline(PROCESSES[process], SHAPE, kind, teacher=teacher)
    learn_teacher(pipeline, 300, size=64)
    condition = pipeline.encode_prompts([str(i % 2) for i in range(SAMPLES)])
    one, noise = torch.ones(SAMPLES), torch.randn(SAMPLES, *SHAPE)
    start = noise * pipeline.process.initial_scale(one).view(-1, 1, 1, 1)
    target = teacher.flow_map(start, one, torch.zeros(SAMPLES), condition, steps=32).float()
    return (
        pipeline.base.state_dict(),
        condition,
        teacher.sample(condition).float(),
        Condition({"noise": noise, "target": target}),
    )


def prepared(name: str, process: str, kind: Kind, precision: Any) -> Strict:
    """A run by the options and rates of the method's toy recipe; all players move in every update."""
    weights, condition, latents, pairs = world(process, kind)
    pipeline = FakePipeline(PROCESSES[process], SHAPE, kind, default_guidance=3.0)
    pipeline.base.load_state_dict(weights)
    recipe = config.load(RECIPES / f"{name}.toml", OTHERWISE.get(name, []))
    method: Any = recipe.method
    if hasattr(method, "student_every"):
        method.student_every = 1
    method.setup(pipeline)
    data = Source(condition, SHAPE, latents, pairs=pairs, prompts=[str(i % 2) for i in range(SAMPLES)])
    changes: dict[str, Any] = {"steps": UPDATES, "batch": BATCH, "micro_batches": 1, "precision": precision}
    return Strict(method, data, replace(recipe.train, checkpoint_every=0, **changes), device="cpu")


OURS = [name for name in methods.names() if methods.find(name).__module__.startswith("fastgen.methods.")]


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("process", "kind", "precision"), RUNS, ids=["-".join(each) for each in RUNS])
def test_two_thousand_updates(name: str, process: str, kind: Kind, precision: str) -> None:
    trainer = prepared(name, process, kind, precision)
    trainer.fit()
    assert trainer.step == UPDATES and trainer.ema is not None
    assert all(weight.isfinite().all() for weight in trainer.ema.tensors().values())
    with torch.no_grad(), trainer.ema.applied(trainer.method.trained), trainer.accelerator.autocast():
        condition = trainer.data.take(torch.arange(64))
        x = trainer.method.sampler().sample(trainer.method.trained, torch.randn(64, *SHAPE), condition)
    print(f"mean size of samples {x.abs().mean():.3g}, of data {world(process, kind)[2].abs().mean():.3g}")
    assert x.isfinite().all()


def linear(method: Duel, updates: int) -> Strict:
    pipeline = LinearPipeline()
    method.setup(pipeline)
    return Strict(method, fake_source(pipeline), TrainConfig(steps=updates, batch=4, checkpoint_every=0), device="cpu")


def test_a_single_loss_that_is_no_number_is_noticed() -> None:
    linear(Duel(), 6).fit()
    with pytest.raises(AssertionError, match="student/follow is nan in update 4"):
        linear(Duel(poison=(4,)), 6).fit()


class Endless(Duel):
    """Its losses are numbers, but the student's gradient is not: the derivative of a root at zero."""

    def student_loss(self, batch: Batch) -> Loss:
        terms = super().student_loss(batch)
        return terms | {"root": 0 * (terms["follow"] * 0).sqrt()}


def test_a_gradient_that_is_no_number_is_noticed() -> None:
    with pytest.raises(AssertionError, match="student/gradient_norm is nan in update 0"):
        linear(Endless(), 2).fit()


# -- regularisers of adversaries ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add", "ladd", "lightning"])
def test_discriminators_are_held_by_r1(name: str) -> None:
    """In the recipes that are run here, the penalty is among what the discriminator minimises, and its heads feel it."""
    trainer = prepared(name, "flow", "flow", "fp32")
    trainer.method.advance(UPDATES - 1, UPDATES)
    critic = next(player for player in trainer.method.players() if player.name == "critic")
    penalty = critic.loss(trainer.data.batch(BATCH))["r1"]
    weights = [weight for weight in critic.weights.parameters() if weight.requires_grad]
    gradients = [g for g in torch.autograd.grad(penalty, weights, allow_unused=True) if g is not None]
    assert penalty > 0 and all(g.isfinite().all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)


def test_no_recipe_gives_up_the_regulariser_of_its_paper() -> None:
    """ADD takes R1 with weight 1e-5 (section 3.2); a LADD whose real and fake samples share their noise overfits without."""
    assert ADD().r1_weight == 1e-5
    recipes = [path for path in RECIPES.parent.rglob("*.toml") if not path.name.startswith("teacher")]
    found = [method for path in recipes if isinstance(method := config.load(path).method, ADD | LADD)]
    assert len(found) > 3
    for method in found:
        assert method.r1_weight > 0 or (isinstance(method, LADD) and not method.shared_noise)


# -- where numbers end ----------------------------------------------------------------------------


def gradient(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(losses.contrast(x, fake, real, weight), x)
    return found


SMALLEST = {torch.float32: 1e-45, torch.bfloat16: 1e-40}
"""Numbers below the smallest normal one."""


@pytest.mark.parametrize("dtype", SMALLEST)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_contrast_without_a_normaliser_is_zero(dtype: torch.dtype, value: float) -> None:
    """Where the student's sample is the teacher's estimate, or one of them is no number, nothing is pulled anywhere."""
    x = torch.full((2, 3, 2, 2), value, dtype=dtype)
    fake = torch.randn_like(x)
    found = gradient(x, fake, x.clone())
    assert found.dtype == dtype and (found == 0).all()
    assert (gradient(x, torch.full_like(x, math.nan), torch.zeros_like(x)) == 0).all()
    assert (gradient(x, fake, torch.zeros_like(x), weight=math.nan) == 0).all()


@pytest.mark.parametrize("dtype", SMALLEST)
def test_a_contrast_of_denormal_numbers_is_finite(dtype: torch.dtype) -> None:
    tiny = SMALLEST[dtype]
    zero = torch.zeros(2, 3, 2, 2, dtype=dtype)
    near = torch.full_like(zero, tiny)
    assert near.ne(0).all()
    overflowing = gradient(zero, torch.ones_like(zero), near)  # 1 / 1e-45 is beyond float32
    assert overflowing.isfinite().all()
    assert (gradient(zero, near, near) == 0).all() and (gradient(near, near, zero).abs() <= 2 / zero.numel()).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_pulled_nowhere(wrong: float) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    direction = torch.randn(4, 5)
    direction[1, 2] = wrong
    (found,) = torch.autograd.grad(losses.pull(x, direction), x)
    assert found[1, 2] == 0
    expected = torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0) / x.numel()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
