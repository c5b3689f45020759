"""Hyper-SD: what each stage minimises, who plays, feedback by hand, and what score distillation does for the single step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.analytic import Mixture
from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.method import Batch
from fastgen.methods import hyper_sd
from fastgen.methods.hyper_sd import HyperSD
from fastgen.methods.tscd import TSCD
from fastgen.samplers import FewStep, even_times
from tests.method_fakes import PROCESSES, TABLE, FakePipeline, batches, learn_teacher, train, wasserstein

OFF = {"guidance_low": 1.0, "guidance_high": 1.0}


class Decoding(FakePipeline):
    """A fake pipeline whose latents are half of its images."""

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * latents


def nearness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward of the images' mean being what the prompt says."""
    wanted = torch.tensor([float(prompt) for prompt in prompts])
    return -(images.flatten(1).mean(1) - wanted).abs()


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyper_sd, "load_reward", lambda name, device: {"near": nearness}[name])


def ready(pipeline: FakePipeline, **options: Any) -> HyperSD:
    method = HyperSD(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


def prompted(pipeline: FakePipeline, size: int) -> Batch:
    batch = next(batches(pipeline, size))
    batch.prompts = tuple("01"[i % 2] for i in range(size))
    return batch


def test_the_last_stage_adds_its_terms() -> None:
    pipeline = Decoding(TABLE, (3, 4, 4), default_guidance=3.0)
    method = ready(pipeline, segments=(2, 1), stage_shares=(1, 1, 2), rewards=("near",))
    found = []
    for step in range(8):
        moved = method.advance(step, 8)
        terms = set(method.loss(prompted(pipeline, 4)))
        found.append((moved, method.parts, [player.name for player in method.players()], terms))
        with torch.no_grad():
            for weight in method.student.parameters():
                weight.add_(0.1)
    early, late = (["student"], {"consistency"}), (["fake_score", "student"], {"consistency", "dmd", "anchor", "reward"})
    assert [each[:2] for each in found] == [(step in (2, 4), (2, 2, 1, 1, 1, 1, 1, 1)[step]) for step in range(8)]
    assert [each[2:] for each in found] == [early] * 4 + [late] * 4
    # The anchor is the student as the last stage found it, and a resumed run has it too.
    start = [weight - 0.4 for weight in method.student.parameters()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(start, method.anchor.parameters(), strict=True))
    again = ready(pipeline, segments=(2, 1), stage_shares=(1, 1, 2), rewards=("near",))
    again.load_state(method.state())
    assert again.is_last and [player.name for player in again.players()] == ["fake_score", "student"]
    assert all(torch.equal(a, b) for a, b in zip(method.anchor.parameters(), again.anchor.parameters(), strict=True))


def test_without_rewards_prompts_are_not_read() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    pipeline.decode = None  # type: ignore[attr-defined]
    method = ready(pipeline, segments=())
    assert method.is_last and set(method.loss(next(batches(pipeline, 4)))) == {"consistency", "dmd", "anchor"}
    assert set(ready(pipeline, segments=(), anchor_weight=0.0).loss(next(batches(pipeline, 4)))) == {"consistency", "dmd"}


def test_score_distillation_of_one_step() -> None:
    """Its gradient is zero where the fake score is the teacher, and else the difference of the two, on samples of one step."""
    pipeline = Decoding(TABLE, (3,), "v")
    method = ready(pipeline, segments=(), score_guidance=1.0)
    condition = next(batches(pipeline, 16)).condition
    x = torch.randn(16, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(method.matching(x, condition), x)
    assert gradient.abs().max() < 1e-7
    with torch.no_grad():
        method.fake_score.network.leave.bias.add_(1.0)
    torch.manual_seed(7)
    (gradient,) = torch.autograd.grad(method.matching(x, condition), x)
    torch.manual_seed(7)
    t = ((0.02 + 0.96 * torch.rand(16)) * 1000).floor().add(1) / 1000
    alpha, sigma = TABLE.coefficients(t, x)
    xt = (alpha * x + sigma * torch.randn(16, 3)).detach()
    with torch.no_grad():
        fake, real = method.fake(xt, t, condition).x0, pipeline.frozen()(xt, t, condition).x0
    expected = (fake - real) / (x - real).abs().mean(1, keepdim=True) / x.numel()
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-3, atol=1e-6)
    noise = torch.randn(4, 3)
    one = method.student(noise, torch.ones(4), condition[:4]).x0
    torch.testing.assert_close(method.single(method.student, noise, condition[:4]), one)


def test_the_last_stages_terms_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one noise: score_weight times DMD's gradient with a guided real score, anchor_weight times the squared distance to
    what the student before made, reward_weight times what the reward lacks; on a flow."""
    pipeline = Decoding(PROCESSES["flow"], (3, 2, 2), "flow")
    weights: dict[str, Any] = {"score_weight": 0.6, "anchor_weight": 0.7, "reward_weight": 0.3, "score_guidance": 3.0}
    method = ready(pipeline, segments=(), rewards=("near",), **weights)
    for network in (method.student, method.anchor, method.fake_score):
        torch.nn.init.normal_(network.network.leave.bias)
    monkeypatch.setattr(hyper_sd, "shared_choice", lambda count, device: 0)
    batch, one = prompted(pipeline, 16), torch.ones(16)
    torch.manual_seed(3)
    terms = method.loss(batch)
    torch.manual_seed(3)
    TSCD.loss(method, batch)
    mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]
    noise, t = torch.randn(16, 3, 2, 2), 0.02 + 0.96 * torch.rand(16)
    x, wide = noise - method.student.network(noise, one, mask, None), t.view(-1, 1, 1, 1)
    with torch.no_grad():
        xt = (1 - wide) * x + wide * torch.randn(16, 3, 2, 2)
        yes, no = (pipeline.base(xt, t, which, None) for which in (mask, null))
        fake, real = xt - wide * method.fake_score.network(xt, t, mask, None), xt - wide * (no + 3 * (yes - no))
        pull = 0.6 * (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        before = noise - method.anchor.network(noise, one, mask, None)
    leave = method.student.network.leave.weight
    gradients = [torch.autograd.grad(loss, leave, retain_graph=True)[0] for loss in (terms["dmd"], (x * pull).mean())]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(terms["anchor"], 0.7 * (x - before).square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["reward"], 0.3 * (1 - nearness(2 * x, batch.prompts)).clamp_min(0).mean())


def test_the_fake_score_learns_from_samples_of_one_step() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(pipeline, segments=()), next(batches(pipeline, 8))
    loss = method.fake_loss(batch)["score"]
    assert all(
        g is None for g in torch.autograd.grad(loss, list(method.student.parameters()), retain_graph=True, allow_unused=True)
    )
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(method.fake_score.parameters()))) > 0


@pytest.mark.parametrize("exit_at", [0, 2])
def test_feedback_by_hand(exit_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate at that call of the student's own sampler, decoded; above the margin nothing pulls."""
    pipeline = Decoding(TABLE, (3, 2, 2))
    method = ready(pipeline, segments=(), rewards=("near",), reward_margin=-0.5, gamma=0.0)
    monkeypatch.setattr(hyper_sd, "shared_choice", lambda count, device: exit_at)
    batch, noise = prompted(pipeline, 16), torch.randn(16, 3, 2, 2)
    seen: list[Any] = []
    method.sampler().sample(method.student, noise, batch.condition, watch=seen.append)
    reward = nearness(2 * seen[exit_at].x0, batch.prompts)
    found = method.feedback(noise, batch)
    assert 0 < int((reward > -0.5).sum()) < 16
    torch.testing.assert_close(found, (-0.5 - reward).clamp_min(0).mean())
    (pull,) = torch.autograd.grad(found, [method.student.network.leave.weight])
    assert pull.abs().max() > 0
    batch.prompts = ()
    with pytest.raises(UserError, match=r"rewards = \['near'\] read prompts, of which the data has 0"):
        method.feedback(noise, batch)


def test_one_student_for_all_numbers_of_steps() -> None:
    method = ready(FakePipeline(TABLE, (3,)), segments=(2, 1))
    method.advance(99, 100)
    assert [method.sampler(n).steps for n in range(1, 9)] == list(range(1, 9)) and method.sampler(1).times == (1.0,)
    assert method.sampler(4).scheduler(TABLE, "eps").class_name == "TCDScheduler"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": (4, 2), "steps": 4}, r"segments = \[4, 2\] must end with 1"),
        ({"score_weight": 0.0}, r"score_weight = 0 and rewards = \[\] .* leave nothing to the last stage"),
        ({"stage_shares": (1.0,) * 4}, "stage_shares has 4 values, but there are 5 stages"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HyperSD(**options)


def test_guidance_of_the_real_score() -> None:
    method = ready(FakePipeline(TABLE, (3,), default_guidance=3.0), segments=())
    assert isinstance(method.real, Guided) and method.real.scale == 3.0
    assert ready(FakePipeline(TABLE, (3,)), segments=(), score_guidance=5.0).real.scale == 5.0


def test_feedback_moves_the_student() -> None:
    pipeline = Decoding(PROCESSES["flow"], (1,), "flow")
    method = ready(pipeline, segments=(), score_weight=0.0, rewards=("near",), reward_weight=1.0, reward_margin=0.0, **OFF)
    optimizer = torch.optim.Adam(method.student.parameters(), 1e-2)
    found: list[float] = []
    for _ in range(60):
        loss = method.loss(prompted(pipeline, 64))["reward"]
        found.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(found[-5:]) < 0.5 * sum(found[:5])


@pytest.mark.slow
def test_score_distillation_mends_the_single_step() -> None:
    """Three modes in one dimension: after the stages of TSCD the last brings the distribution of one step nearer."""
    mixture = Mixture([0.4, 0.35, 0.25], torch.tensor([[-1.2], [0.2], [1.3]]), [0.2, 0.15, 0.25], PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (1,), "flow", teacher=mixture, labels=3, width=64)
    learn_teacher(pipeline, 1000)
    condition, noise = pipeline.encode_prompts([""] * 4000), torch.randn(4000, 1)
    ends = FewStep(even_times(64)).sample(mixture, noise, condition)
    method: TSCD
    common: dict[str, Any] = {"grid": 16, "huber_c": 0.1, "ema_decay": 0.9, "gamma": 0.3, "segments": (2, 1), **OFF}
    found = {}
    for name in ("tscd", "hyper"):
        method = TSCD(**common) if name == "tscd" else ready(pipeline, **(common | {"segments": ()}))
        if name == "tscd":
            method.setup(pipeline)  # type: ignore[arg-type]
            before = method
        else:
            method.student.load_state_dict(before.student.state_dict())
            method.target.load_state_dict(before.target.state_dict())  # type: ignore[union-attr]
            method.anchor.load_state_dict(before.student.state_dict())
        train(method, batches(pipeline, 128, ("0 1 2",)), 800, 3e-3 if name == "tscd" else 1e-3)
        with torch.no_grad():
            few = {steps: method.sampler(steps).sample(method.trained, noise, condition) for steps in (1, 2, 4)}
        found[name] = {steps: wasserstein(x, ends) for steps, x in few.items()}
    # Measured in one, two and four steps: TSCD 0.28, 0.15 and 0.15, then 0.13, 0.14 and 0.14.
    assert found["tscd"][1] > 0.2 > found["hyper"][1] and max(found["hyper"].values()) < 0.2, found
