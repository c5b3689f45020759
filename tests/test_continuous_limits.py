"""Continuous-time consistency at its limits: small steps, a weight at its optimum, rCM and SANA-Sprint without a term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.families.consistency import Chain
from fastgen.families.continuous import RIGHT, TRIG, AdaptiveWeight
from fastgen.losses import squared
from fastgen.methods.consistency import ConsistencyModel
from fastgen.methods.dmd2 import DMD2
from fastgen.methods.rcm import RCM
from fastgen.methods.sana_sprint import SanaSprint
from fastgen.methods.scm import SCM
from tests.method_fakes import PROCESSES, FakePipeline, batches


def ready(pipeline: FakePipeline, kind: Any = SCM, **options: Any) -> Any:
    """A method whose networks have left the teacher, those of one role alike in every method."""
    method = kind(**options)
    pipeline.made.clear()
    method.setup(pipeline)
    for role, denoiser in pipeline.made.items():
        generator = torch.Generator().manual_seed(len(role))
        for weight in denoiser.network.parameters():
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return method


def slope(loss: Tensor, method: Any) -> Tensor:
    """The gradient of a loss with respect to the student's weights, as one vector."""
    grads = torch.autograd.grad(loss, list(method.student.parameters()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def test_small_steps_of_discrete_consistency_pull_as_scm_does() -> None:
    """(f_t - f_r)^2 / h of a DDIM step of h sends back 2 df / dangle times the gradient of f = cos x - sin F, in the limit.

    That of sCM is -2 g times the gradient of F, with g = cos df / dangle: under weights 1 / tan^2 and 1 / tan they are one.
    """
    pipeline = FakePipeline(PROCESSES["trig"], (3,))
    pipeline.base.double()
    scm = ready(pipeline, guidance=1.0, warmup=0, weighting="prior", sigma_data=1.0)
    discrete = ready(pipeline, ConsistencyModel, solver="ddim", ema_decay=0.0)
    discrete.student = scm.student.double()
    condition, x, t = pipeline.encode_prompts(["0"] * 6), torch.randn(6, 3).double(), torch.linspace(0.2, 0.8, 6).double()
    (cos, sin), speed = TRIG.coefficients(t, x), scm.teacher(x, t, condition).v
    answer, turning = scm.answer_and_turning(x, t, condition, speed, None)
    g = scm.direction(x, t, answer.detach(), speed, turning)
    limit, errors = slope(scm.weighted(answer, answer.detach() + g, t), scm), []
    for h in (2e-3, 1e-3):
        r = t - h / RIGHT
        discrete.times = torch.stack([t, r], 1).flatten()
        xr = discrete.solve(x, 2 * torch.arange(6), condition, torch.ones(6))
        here, there = discrete.meet(Chain(x, t, xr, r, torch.zeros_like(t), condition, torch.ones(6)))
        found = slope(squared(here, there, (cos / sin).square()) / h, scm)
        errors.append(float((found - limit).norm() / limit.norm()))
    assert errors[0] < 0.02 and 1.9 < errors[0] / errors[1] < 2.1


def test_the_learnt_weight() -> None:
    """exp(w) L - w (sCM, section 4.2), L the squares over sigma_data tan; its slope exp(w) L - 1 is 0 where w = -log L."""
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    method = ready(pipeline, guidance=1.0, weighting="adaptive", sigma_data=0.7)
    learnt = method.learnt
    assert isinstance(learnt, AdaptiveWeight)
    (player,) = method.players()
    names = {name for name, _ in player.weights.named_parameters()}
    assert {"weight.out.weight", "weight.out.bias"} < names and len(names) == 2 + len(list(method.student.parameters()))
    (answer, target), t = torch.randn(2, 6, 3), torch.linspace(0.1, 0.9, 6)
    error = (answer - target).square().mean(1) / (0.7 * (t * RIGHT).tan())
    torch.testing.assert_close(method.weighted(answer, target, t), error.mean())  # with a weight of 1 at first
    nn.init.normal_(learnt.out.weight)
    expected = (learnt(t).exp() * error - learnt(t)).mean()
    torch.testing.assert_close(method.weighted(answer, target, t), expected)
    for log, wanted in ((-error.log(), torch.zeros(6)), (torch.zeros(6), (error - 1) / 6)):
        log.requires_grad_()
        method.learnt = lambda t, log=log: log
        (found,) = torch.autograd.grad(method.weighted(answer, target, t), log)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    learnt.out.weight.data.fill_(1e4)
    assert learnt(torch.linspace(0, 1, 100)).abs().max() <= 3.0


def test_rcm_without_distribution_matching_is_scm() -> None:
    """With the weight of it at 0 the student's loss is sCM's once the tangent is let in, where the two pulls are cos^2."""
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    same: dict[str, Any] = {"guidance": 3.0, "warmup": 0, "noise_mean": 0.7, "sigma_data": 1.0}
    batch, found = next(batches(pipeline, 16)), []
    for method in (ready(pipeline, RCM, dmd_weight=0.0, **same), ready(pipeline, SCM, **same)):
        torch.manual_seed(5)
        terms = method.loss(batch)
        found.append((terms["consistency"], slope(sum(terms.values()), method)))
    (ours, ours_back), (theirs, theirs_back) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours_back, theirs_back, rtol=1e-4, atol=1e-6)
    assert theirs_back.abs().max() > 0.01


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_rcm_without_the_tangent_is_dmd2(weight: float) -> None:
    """Times its weight: what is left is DMD2's loss of the student, at the same samples, times and noise."""
    pipeline = FakePipeline(PROCESSES["trig"], (3,))
    rcm = ready(pipeline, RCM, guidance=3.0, dmd_weight=weight)
    dmd2 = ready(pipeline, DMD2, guidance=3.0, gan_weight=0.0)
    x, t = torch.randn(16, 3, requires_grad=True), 0.05 + 0.9 * torch.rand(16)
    rcm.consistency = lambda batch: torch.zeros(())
    rcm.generate, rcm.noise_times = lambda batch, told: x, lambda count: t
    dmd2.generate, dmd2.score_times = lambda batch: x, lambda count: t
    batch, found = next(batches(pipeline, 16)), []
    for loss in (rcm.loss, dmd2.student_loss):
        torch.manual_seed(5)
        total = torch.stack(list(loss(batch).values())).sum()
        found.append((total.detach(), torch.autograd.grad(total, x)[0]))
    (ours, ours_back), (theirs, theirs_back) = found
    torch.testing.assert_close(ours, weight * theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours_back, weight * theirs_back, rtol=1e-4, atol=1e-6)
    assert theirs_back.abs().max() > 1e-3


def test_sprint_without_its_adversary_is_scm() -> None:
    """The term left is sCM's loss to the digit, and as the adversary's weight falls the gradient comes as near to sCM's."""
    pipeline = FakePipeline(PROCESSES["flow"], (3, 4, 4), "flow")
    same: dict[str, Any] = {"guidance": 2.0, "warmup": 0}
    scm, batch = ready(pipeline, SCM, **same), next(batches(pipeline, 16))
    torch.manual_seed(5)
    alone = scm.loss(batch)["consistency"]
    back, apart = slope(alone, scm), []
    for weight in (0.2, 0.002):
        method = ready(pipeline, SanaSprint, gan_weight=weight, **same)
        seeded(method, "consistency", 5)
        torch.manual_seed(4)
        terms = method.loss(batch)
        assert torch.equal(terms["consistency"], alone)
        apart.append(float((slope(sum(terms.values()), method) - back).norm()))
    assert apart[1] < 0.01 * float(back.norm()) and apart[0] / apart[1] == pytest.approx(100, rel=1e-2)


def seeded(method: Any, name: str, seed: int) -> None:
    """Let a loss of a method begin with this seed."""
    inner = getattr(method, name)

    def begin(batch: Any) -> Tensor:
        torch.manual_seed(seed)
        return inner(batch)

    setattr(method, name, begin)
