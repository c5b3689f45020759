"""MeanFlow and shortcut models: exact mean velocities are fixed points, and losses are the ones derived by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.analytic import Exact, Gaussian, Mixture
from fastgen.denoiser import Retimed
from fastgen.errors import UserError
from fastgen.methods.mean_flow import MeanFlow
from fastgen.methods.shortcut import Shortcut
from fastgen.process import Flow, Kind
from fastgen.samplers import FewStep, MeanVelocity, even_times
from tests.method_fakes import PROCESSES, TABLE, FakePipeline, batches, learn_teacher, train, wasserstein

WORLDS: list[tuple[str, Kind]] = [("flow", "flow"), ("vp", "v")]


def ready(kind: Any, pipeline: FakePipeline, **options: Any) -> Any:
    method = kind(**options)
    method.setup(pipeline)
    return method


def woken(method: Any) -> Any:
    """With weights at random, so that the second time has an effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in method.student.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        nn.init.normal_(method.student.end_input.leave.weight, std=0.3)
    return method


def exact_mean(teacher: Mixture) -> Exact:
    """The perfect student of a teacher with a closed form: one step lands where the flow leads, none is the teacher."""
    return Exact(teacher, lambda t: t)


@pytest.mark.parametrize("way", ["exact", "central"])
@pytest.mark.parametrize(("process", "kind"), WORLDS)
def test_the_exact_mean_velocity_is_a_fixed_point(process: str, kind: Kind, way: str) -> None:
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8, -0.3]), 0.5, p)
    pipeline = FakePipeline(p, teacher=teacher, labels=1)
    batch = next(batches(pipeline, 64, ("0",)))
    method = ready(MeanFlow, pipeline, guidance=1.0, power=0.0, tangent=way)
    method.flow = Retimed(exact_mean(teacher), Flow())
    assert float(method.loss(batch)["mean_flow"]) < 1e-5  # squares; the velocities themselves are about 1
    method.flow = Retimed(teacher, Flow())
    method.mean_velocity = lambda x, t, s, condition: method.flow(x, t, condition).flow
    assert float(method.loss(batch)["mean_flow"]) > 1e-3, "the teacher's own velocity is not the mean one"
    # The shortest of a shortcut model's steps are told no step, which leaves their error, O(h) in the velocity.
    found = []
    for finest in (8, 32):
        short = ready(Shortcut, pipeline, guidance=1.0, bootstrap=1.0, finest=finest)
        short.student = exact_mean(teacher)
        torch.manual_seed(0)
        found.append(float(short.loss(batch)["shortcut"]))
    assert found[0] < 0.05 and found[1] < found[0] / 6


@pytest.mark.parametrize("training", [False, True])
def test_the_mean_flow_loss_by_hand(training: bool) -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    options: dict[str, Any] = {"training": True} if training else {"guidance": 2.5}
    method = woken(ready(MeanFlow, pipeline, warmup=10, constant=0.01, **options))
    method.advance(4, 100)
    batch = next(batches(pipeline, 16))
    assert batch.latents is not None
    torch.manual_seed(7)
    loss = method.loss(batch)["mean_flow"]
    torch.manual_seed(7)
    one, other = ((-0.4 + torch.randn(16)).sigmoid() for _ in range(2))
    t, s = torch.maximum(one, other), torch.minimum(one, other)
    s = torch.where(torch.rand(16) < 0.75, s, t)
    assert 8 <= int((s < t).sum()) < 16
    eps, mask = torch.randn(16, 3), batch.condition.inputs["components"]
    x = (1 - t)[:, None] * batch.latents + t[:, None] * eps
    v = eps - batch.latents
    if not training:
        yes, no = (pipeline.base(x, t, which, None) for which in (mask, torch.ones_like(mask)))
        v = yes + 1.5 * (yes - no)
    network, more = method.student.network, method.student.end_input

    def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with network.known.register_forward_hook(lambda module, args, output: output + more(t - s)):
            return network(x, t, mask, None)

    change = torch.func.jvp(u, (x, t, s), (v, torch.ones(16), torch.zeros(16)))[1].detach()
    answer = u(x, t, s)
    error = (answer - (v - 0.5 * (t - s)[:, None] * change)).square().mean(1)
    expected = (error / (error.detach() + 0.01)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(loss, list(method.student.parameters()))
    for a, b in zip(found, torch.autograd.grad(expected, list(method.student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_shortcut_loss_by_hand(training: bool) -> None:
    """The flow form of the paper: the mean of two velocities, the second from where the first leads, and neither learns.

    Where there is no step it is the guided teacher's velocity, or from data alone that of the very data and noise.
    """
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    options: dict[str, Any] = {"training": True} if training else {"guidance": 2.5}
    method = woken(ready(Shortcut, pipeline, finest=8, bootstrap=0.5, **options))
    if training:
        method.teacher = None  # nobody asks it
    batch = next(batches(pipeline, 32))
    assert batch.latents is not None
    torch.manual_seed(3)
    loss = method.loss(batch)["shortcut"]
    torch.manual_seed(3)
    long = int(16 + torch.rand(1))
    cells = 2 ** torch.randint(1, 4, (32,))
    d = torch.where(torch.arange(32) < long, cells, 0) / 8
    start = (torch.rand(32) * (8 // torch.where(torch.arange(32) < long, cells, 1))).long()
    t = 1 - start * torch.where(torch.arange(32) < long, cells, 1) / 8
    assert set((d * 8).int().tolist()) == {0, 2, 4, 8} and float((t - d).min()) >= 0
    eps, mask = torch.randn(32, 3), batch.condition.inputs["components"]
    x = (1 - t)[:, None] * batch.latents + t[:, None] * eps
    network, more = method.student.network, method.student.end_input

    def u(x: Tensor, t: Tensor, d: Tensor, mask: Tensor) -> Tensor:
        with network.known.register_forward_hook(lambda module, args, output: output + more(d)):
            return network(x, t, mask, None)

    with torch.no_grad():
        yes, no = (pipeline.base(x, t, which, None) for which in (mask, torch.ones_like(mask)))
        target, half, which = eps - batch.latents if training else yes + 1.5 * (yes - no), d[:long] / 2, mask[:long]
        told = torch.where(half == 1 / 8, 0.0, half)
        first = u(x[:long], t[:long], told, which)
        second = u(x[:long] - half[:, None] * first, t[:long] - half, told, which)
        target[:long] = ((first + second) / 2).clamp(-4, 4)
    expected = (u(x, t, d, mask) - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(loss, list(method.student.parameters()))
    for a, b in zip(found, torch.autograd.grad(expected, list(method.student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_every_share_of_long_steps_is_taken() -> None:
    """Also of a batch of one, and of none: no mean over nothing."""
    pipeline = FakePipeline(TABLE, (3,), "eps")
    for share, finest in ((1.0, 2), (0.1, 128), (0.5, 16)):
        method = ready(Shortcut, pipeline, bootstrap=share, finest=finest, guidance=2.0, steps=1)
        for seed in range(8):
            torch.manual_seed(seed)
            assert method.loss(next(batches(pipeline, 1)))["shortcut"].isfinite()
    torch.manual_seed(0)
    start, stop = method.draw_steps(1000, 600, torch.device("cpu"))
    cells = stop - start
    assert set(cells[:600].tolist()) == {2, 4, 8, 16} and bool((cells[600:] == 0).all()) and int(stop.max()) == 16
    assert bool((start[:600] % cells[:600] == 0).all()) and int(start[600:].max()) == 15


@pytest.mark.parametrize(("process", "kind"), WORLDS)
def test_the_sampler_lands_where_the_flow_leads(process: str, kind: Kind) -> None:
    """Any number of steps of the exact mean velocity, which Euler's steps of the teacher are far from."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8, -0.3]), 0.5, p)
    noise, condition = torch.randn(6, 2).double(), teacher.unconditional(6)
    method = ready(MeanFlow, FakePipeline(p, teacher=teacher, labels=1), guidance=1.0)
    exact = teacher.flow_map(noise, torch.ones(6), torch.zeros(6), condition)
    for steps in (1, 2, 4):
        sampler = method.sampler(steps)
        assert sampler == MeanVelocity(even_times(steps, p)) and sampler.steps == steps
        torch.testing.assert_close(sampler.sample(exact_mean(teacher), noise, condition), exact, rtol=1e-5, atol=1e-5)
    assert (FewStep(even_times(4)).sample(teacher, noise, condition) - exact).abs().max() > 0.05
    if process == "flow":
        # The formula of the paper.
        student, t = ready(MeanFlow, FakePipeline(p, (2,), "flow")), torch.ones(6)
        woken(student)
        c, x = student.student, noise.float()
        known = FakePipeline(p, (2,), "flow").encode_prompts(["0"] * 6)
        with torch.no_grad():
            x = x - 0.5 * c(x, t, known, end=t / 2).output
            x = x - 0.5 * c(x, t / 2, known, end=t * 0).output
            torch.testing.assert_close(student.sampler(2).sample(c, noise.float(), known), x)


def test_samplers_are_refused_where_they_cannot_be_had() -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    method = ready(MeanFlow, pipeline)
    with pytest.raises(UserError, match="a network that is told where a step ends, and this one is not"):
        method.sampler().sample(pipeline.frozen(), torch.randn(1, 3), pipeline.encode_prompts(["0"]))
    with pytest.raises(UserError, match="no stock scheduler of diffusers tells a network where its step ends"):
        method.sampler().scheduler(method.process, "flow")
    with pytest.raises(UserError, match="at least 1 step, not 0"):
        method.sampler(0)
    with pytest.raises(UserError, match="a power of two of steps up to half of finest = 128, not 3"):
        ready(Shortcut, pipeline).sampler(3)
    with pytest.raises(ValueError, match="gamma must be 0"):
        MeanVelocity((1.0,), gamma=1.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MeanFlow, {"steps": 0}, "steps must be at least 1, not 0"),
        (MeanFlow, {"training": True, "guidance": 3.0}, "training = true asks no teacher, so guidance = 3"),
        (Shortcut, {"finest": 100}, "finest must be a power of two, at least 2, not 100"),
        (Shortcut, {"steps": 3}, "a power of two of steps up to half of finest = 128, not 3"),
        (Shortcut, {"finest": 2048}, "finest = 2048 is finer than the pipeline's own times"),
    ],
)
def test_contradictions_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(kind, FakePipeline(TABLE, (3,)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MeanFlow, Shortcut])
def test_a_mixture_is_learnt(kind: Any) -> None:
    """Three modes in one dimension, in one step and in four."""
    p = PROCESSES["flow"]
    teacher = Mixture([0.4, 0.35, 0.25], torch.tensor([[-1.2], [0.2], [1.3]]), [0.2, 0.15, 0.25], p)
    pipeline = FakePipeline(p, (1,), "flow", teacher=teacher, labels=3, width=64)
    everything = pipeline.encode_prompts
    pipeline.encode_prompts = lambda prompts: everything([""] * len(prompts))  # type: ignore[method-assign]
    torch.manual_seed(0)
    learn_teacher(pipeline, 600)
    # A sample's error is one number here, so that divided by itself it hardly has a gradient; and times reach both ends.
    options = {"finest": 16} if kind is Shortcut else {"power": 0.5, "time_std": 1.5, "warmup": 200}
    method = ready(kind, pipeline, guidance=1.0, **options)
    train(method, batches(pipeline, 128), 1000, 1.5e-3)
    condition, noise = pipeline.encode_prompts([""] * 4000), torch.randn(4000, 1)
    ends = FewStep(even_times(64)).sample(teacher, noise, condition)
    with torch.no_grad():
        found = [wasserstein(method.sampler(n).sample(method.trained, noise, condition), ends) for n in (1, 4)]
    blur = wasserstein(FewStep((1.0,)).sample(teacher, noise, condition), ends)
    # Measured 0.143 and 0.133, shortcut 0.158 and 0.124, from 0.88; the teacher's own four steps are at 0.18.
    assert found[0] < 0.3 and found[1] < 0.25 and blur > 0.7
