"""Gradients by hand: what losses of regression and of consistency send back to the very output of the student's network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.method import Batch
from fastgen.methods.consistency import ConsistencyModel
from fastgen.methods.guidance_distillation import GuidanceDistillation
from fastgen.methods.lcm import LCM
from fastgen.methods.pcm import PCM
from fastgen.methods.progressive import Progressive
from fastgen.methods.shortcut import Shortcut
from fastgen.methods.snapfusion import SnapFusion
from fastgen.methods.tcd import TCD
from fastgen.methods.tdd import TDD
from fastgen.methods.tscd import TSCD
from tests.method_fakes import PROCESSES, FakePipeline, batches

COUNT, C = 48, 0.1
SAME: dict[str, Any] = {"guidance_low": 3.0, "guidance_high": 3.0, "huber_c": C}
STEPS: dict[str, Any] = {"start_steps": 8, "stop_steps": 4}


class Answers(nn.Module):
    """A flow's network whose answer is a leaf, a row for each sample, but for half the input: elsewhere it is another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.known = nn.Parameter(torch.randn(2 * COUNT, 3)), nn.Identity()

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        return self.rows[: len(x)] + x / 2


def answering(method: Any) -> tuple[Any, FakePipeline, Batch, list[Any]]:
    """A method whose student is `Answers`, with a batch; last, the student's predictions and the ends that it was told."""
    roles = ("student", "target", "previous")
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow", networks={role: Answers for role in roles})
    method.setup(pipeline)
    seen: list[Any] = []
    method.student.register_forward_hook(
        lambda module, args, options, prediction: seen.append((prediction, options.get("end"))), with_kwargs=True
    )
    return method, pipeline, next(batches(pipeline, COUNT)), seen


def sent_back(loss: Tensor, method: Any) -> Tensor:
    (found,) = torch.autograd.grad(loss, method.student.network.rows)
    assert found.abs().max() > 1e-4
    return found


def velocity(pipeline: FakePipeline, x: Tensor, t: Tensor, batch: Batch, scale: float = 1.0) -> Tensor:
    """The teacher's, guided."""
    mask = batch.condition.inputs["components"]
    with torch.no_grad():
        yes, no = (pipeline.base(x, t, which, None) for which in (mask, torch.ones_like(mask)))
    return no + scale * (yes - no)


MEETING: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCM, SAME),
    "lcm with an average": (LCM, SAME | {"ema_decay": 0.5}),
    "heun": (ConsistencyModel, SAME | {"ema_decay": 0.0}),
    "alone": (ConsistencyModel, {"teacher": False, "ema_decay": 0.0, "huber_c": C}),
    "pcm": (PCM, SAME),
    "tcd": (TCD, SAME),
    "tdd": (TDD, SAME),
    "tscd": (TSCD, SAME | {"ema_decay": 0.0}),
}


@pytest.mark.parametrize("name", MEETING)
def test_two_jumps_that_meet(name: str) -> None:
    """d = x_t - (t - s) u - (x_r - (r - s) u'), the second jump held: -(t - s) d / sqrt(d^2 + c^2), over the elements."""
    kind, options = MEETING[name]
    method, _, batch, _ = answering(kind(**options))
    if method.target is not None:
        method.target.network.rows.data.mul_(0.5)
    if name == "alone":
        method.advance(3, 8)  # in the first stage many of the nearer points are clean data
    chain = method.chain(batch)
    method.chain = lambda batch: chain
    found = sent_back(method.loss(batch)["consistency"], method)
    t, r, s = (time[:, None] for time in (chain.t, chain.r, chain.s))
    with torch.no_grad():
        here = method.student.network.rows[:COUNT] + chain.xt / 2
        there = (method.target or method.student).network.rows[:COUNT] + chain.xr / 2
    gap = chain.xt - (t - s) * here - (chain.xr - (r - s) * there)
    weight = 1 / (t / (1 - t) - r / (1 - r)) if name == "alone" else 1.0
    expected = -weight * (t - s) * gap / (gap.square() + C**2).sqrt() / gap.numel()
    torch.testing.assert_close(found[:COUNT], expected, rtol=1e-3, atol=1e-6)
    assert not found[COUNT:].any()


@pytest.mark.parametrize(
    ("kind", "options", "scale", "own"),
    [
        (Progressive, {"guidance": 3.0}, 3.0, 1.0),
        (SnapFusion, {"cfg_share": 0.0, "denoising_share": 0.0, "caption_dropout": 0.0}, 1.0, 1.0),
        (SnapFusion, {"cfg_share": 1.0, "denoising_share": 0.0, "guidance_low": 3.0, "guidance_high": 3.0}, 3.0, 3.0),
    ],
    ids=["progressive", "snapfusion", "snapfusion, both guided"],
)
def test_two_steps_of_a_teacher_in_one(kind: Any, options: dict[str, Any], scale: float, own: float) -> None:
    """u* = (x_t - x'') / (t - t''), x0 moving by -t for u: 2 max(SNR, 1) t^2 (u - u*), over the elements.

    A guided student has w of it on its conditional half and 1 - w on the other.
    """
    method, pipeline, batch, seen = answering(kind(**STEPS, **options))
    (loss,) = method.loss(batch).values()
    found, (prediction, _) = sent_back(loss, method), seen[-1]
    x, t = prediction.xt[:COUNT], prediction.t[:COUNT]
    landed = x
    for at in (t, t - 1 / 8):
        landed = landed - velocity(pipeline, landed, at, batch, scale) / 8
    with torch.no_grad():
        yes, no = (rows + x / 2 for rows in method.student.network.rows.chunk(2))
    weight = ((1 - t) / t).square().clamp_min(1)[:, None]
    expected = 2 * weight * t[:, None] ** 2 * (no + own * (yes - no) - (x - landed) * 4) / x.numel()
    torch.testing.assert_close(found, torch.cat([own * expected, (1 - own) * expected]), rtol=1e-3, atol=1e-6)


def test_snapfusions_denoising() -> None:
    """0.2 L / L' of 2 (u - (eps - x0)), over the elements, without a gradient of the ratio of the two losses."""
    method, _, batch, seen = answering(SnapFusion(cfg_share=0.0, caption_dropout=0.0, **STEPS))
    terms = method.loss(batch)
    found, (prediction, _) = sent_back(terms["denoising"], method)[:COUNT], seen[-1]
    x, t, u = prediction.xt, prediction.t[:, None], prediction.output.detach()
    error = u - ((x - (1 - t) * batch.latents) / t - batch.latents)
    share = 0.2 * terms["step"].detach() / error.square().mean()
    torch.testing.assert_close(found, share * 2 * error / x.numel(), rtol=1e-3, atol=1e-6)


def test_a_guided_teacher_in_one_call() -> None:
    """2 max(SNR, 1) t^2 (u - u_w), over the elements, with u_w the guided teacher's."""
    options: dict[str, Any] = {"guidance_low": 4.0, "guidance_high": 4.0, "embed_guidance": False}
    method, pipeline, batch, seen = answering(GuidanceDistillation(**options))
    found, (prediction, _) = sent_back(method.loss(batch)["x0"], method)[:COUNT], seen[-1]
    x, t = prediction.xt, prediction.t
    error = prediction.output.detach() - velocity(pipeline, x, t, batch, 4.0)
    weight = ((1 - t) / t).square().clamp_min(1)[:, None]
    torch.testing.assert_close(found, 2 * weight * t[:, None] ** 2 * error / x.numel(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_a_shortcut(training: bool) -> None:
    """2 (u - u*), over the elements: u* the mean of two held steps half as long, or the velocity where there is no step."""
    options: dict[str, Any] = {"training": True} if training else {"guidance": 3.0}
    method, pipeline, batch, seen = answering(Shortcut(finest=8, bootstrap=0.5, **options))
    found, (prediction, end) = sent_back(method.loss(batch)["shortcut"], method)[:COUNT], seen[-1]
    x, t, u = prediction.xt, prediction.t, prediction.output.detach()
    half, long = (t - end)[:, None] / 2, end < t
    assert 20 < int(long.sum()) < 28
    second = u + (x - half * u) / 2 - x / 2
    eps = (x - (1 - t)[:, None] * batch.latents) / t[:, None]
    rest = eps - batch.latents if training else velocity(pipeline, x, t, batch, 3.0)
    wanted = torch.where(long[:, None], ((u + second) / 2).clamp(-4, 4), rest)
    torch.testing.assert_close(found, 2 * (u - wanted) / x.numel(), rtol=1e-3, atol=1e-6)
