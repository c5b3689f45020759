"""Adversarial score distillation: the discriminator's objective and its minimum, the student's gradient, where students end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.analytic import Gaussian
from fastgen.errors import UserError
from fastgen.methods.adversarial_score_distillation import AdversarialScoreDistillation
from fastgen.samplers import FewStep
from tests.method_fakes import (
    LABELS,
    PROCESSES,
    TABLE,
    FakePipeline,
    batches,
    furthest_marginal,
    learn_teacher,
    student_gradient,
    train,
    two_labels,
)


def ready(pipeline: FakePipeline, **options: Any) -> AdversarialScoreDistillation:
    method = AdversarialScoreDistillation(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


def test_the_discriminators_objective_by_hand() -> None:
    """The authors' two squares, in predicted noise: of the noise, and -0.75 times of the unguided teacher's prediction."""
    pipeline = FakePipeline(TABLE, (3,), "eps", default_guidance=7.5)
    method = ready(pipeline, steps=1)
    nn.init.normal_(method.critic.fake.network.leave.bias)
    batch = next(batches(pipeline, 16))
    torch.manual_seed(4)
    terms = method.fake_loss(batch)
    torch.manual_seed(4)
    with torch.no_grad():
        x = method.generate(batch)
        index = (1000 * torch.rand(16)).long()
        noise = torch.randn(16, 3)
        table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[index]
        xt, t = table.sqrt().float()[:, None] * x + (1 - table).sqrt().float()[:, None] * noise, (index + 1) / 1000
        mask = batch.condition.inputs["components"]
        fake, pretrained = method.critic.fake.network(xt, t, mask, None), pipeline.base(xt, t, mask, None)
    assert terms.keys() == {"score", "real"}
    torch.testing.assert_close(terms["score"], (fake - noise).square().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["real"], -0.75 * (fake - pretrained).square().mean(), rtol=1e-4, atol=1e-5)
    everybody = [list(module.parameters()) for module in (method.critic, method.student, pipeline.base.requires_grad_(True))]
    for term in terms.values():
        learnt, *held = (torch.autograd.grad(term, some, retain_graph=True, allow_unused=True) for some in everybody)
        assert all(grad is None for grads in held for grad in grads)
        assert max(float(grad.abs().max()) for grad in learnt if grad is not None) > 1e-3


class Says(nn.Module):
    """A network that answers the same whatever it is asked."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        return self.answer.expand_as(x)


@pytest.mark.parametrize("push", [0.0, 0.5, 0.75])
def test_the_minimum_of_the_objective(push: float) -> None:
    """Of a fake score that can say one thing alone the best is mean + push / (1 - push) (mean - teacher), where the loss has
    no slope, and moves the student 1 / (1 - push) times as far as the mean of the noise would."""
    teacher, found = torch.randn(3), []
    torch.manual_seed(4)
    torch.rand(400)
    mean = torch.randn(400, 3).mean(0)  # the noise that the loss below draws
    for answer in (mean + push / (1 - push) * (mean - teacher), mean):
        pipeline = FakePipeline(TABLE, (3,), "eps", networks={"fake_score": lambda answer=answer: Says(answer)})
        pipeline.base = Says(teacher).requires_grad_(False)
        method, batch = ready(pipeline, push=push), next(batches(pipeline, 400))
        method.generate = lambda batch: torch.zeros(400, 3)  # type: ignore[method-assign]
        torch.manual_seed(4)
        loss = torch.stack(list(method.fake_loss(batch).values())).sum()
        slope = torch.autograd.grad(loss, list(method.critic.parameters()))[0].abs().max()
        torch.manual_seed(5)
        x = torch.randn(400, 3, requires_grad=True)
        found.append((slope, torch.autograd.grad(method.adversary(x, batch.condition), x)[0]))
    (at_best, best), (at_mean, plain) = found
    assert at_best < 1e-5 and (at_mean > 0.1 or push == 0)
    torch.testing.assert_close(best * (1 - push), plain, rtol=1e-3, atol=1e-6)


def test_without_push_it_is_variational_score_distillation() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    batch = next(batches(pipeline, 4))
    assert ready(pipeline, push=0.0).fake_loss(batch).keys() == {"score"}


@pytest.mark.parametrize("weight", ["sigma_squared", "sigma_over_alpha"])
def test_the_generators_gradient_by_hand(weight: Any) -> None:
    """w (eps_teacher - eps_fake) with the authors' w: 1 - alpha-bar, or its root over that of alpha-bar."""
    pipeline = FakePipeline(TABLE, (3,), "eps")
    method = ready(pipeline, guidance=7.5, weight=weight)
    nn.init.normal_(method.critic.fake.network.leave.bias)
    batch, x = next(batches(pipeline, 16)), torch.randn(16, 3, requires_grad=True)
    torch.manual_seed(7)
    (gradient,) = torch.autograd.grad(method.adversary(x, batch.condition), x)
    torch.manual_seed(7)
    index = (1000 * (0.02 + 0.96 * torch.rand(16))).long()
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[index].float()
    with torch.no_grad():
        xt, t = table.sqrt()[:, None] * x + (1 - table).sqrt()[:, None] * torch.randn(16, 3), (index + 1) / 1000
        mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]
        yes, no = (pipeline.base(xt, t, which, None) for which in (mask, null))
        fake = method.critic.fake.network(xt, t, mask, None)
        w = (1 - table if weight == "sigma_squared" else ((1 - table) / table).sqrt())[:, None]
        expected = w * (no + 7.5 * (yes - no) - fake) / x.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_nothing_pulls_when_the_fake_score_is_the_teacher() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(pipeline), next(batches(pipeline, 8))
    assert student_gradient(method, batch).abs().max() < 1e-8


def test_a_network_that_answers_nonsense_does_no_harm() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(pipeline), next(batches(pipeline, 8))
    with torch.no_grad():
        method.critic.fake.network.leave.bias.fill_(torch.nan)
    assert student_gradient(method, batch).isfinite().all()


def test_what_it_is() -> None:
    method = ready(FakePipeline(TABLE, (3,)))
    assert method.needs == {"prompts"} and method.family == "adversarial"
    assert [(p.name, p.every) for p in method.players()] == [("fake_score", 1), ("student", 1)]
    with pytest.raises(UserError, match="trained for 4 steps, not for 1"):
        method.sampler(1)


@pytest.mark.slow
def test_a_mixture_is_learnt_in_one_step() -> None:
    pipeline = two_labels()
    method = ready(pipeline, steps=1, student_every=3)
    train(method, batches(pipeline, 128, LABELS), 2000, 2e-3, betas=(0.0, 0.99))
    # Measured at most 0.135, from 0.81 before.
    assert furthest_marginal(pipeline, method.trained, method.sampler()) < 0.2
    assert furthest_marginal(pipeline, pipeline.frozen(), FewStep((1.0,))) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_a_gaussian_is_learnt_in_one_step(process: str) -> None:
    p = PROCESSES[process]
    teacher = Gaussian(torch.full((4,), 0.8), 0.5, p)
    pipeline = FakePipeline(p, (4,), "v", teacher=teacher, labels=1, width=32)
    learn_teacher(pipeline, 500)
    method = ready(pipeline, steps=1, student_every=3)
    train(method, batches(pipeline, 128, ("0",)), 1000, 2e-3, betas=(0.0, 0.99))
    condition = pipeline.encode_prompts(["0"] * 2000)
    with torch.no_grad():
        x = method.sampler().sample(method.trained, torch.randn(2000, 4), condition)
    # Measured 0.029 and 0.021 (VP), 0.033 and 0.010 (flow); the standard deviation of one call of the teacher is 0.
    assert (x.mean(0) - 0.8).abs().max() < 0.08 and (x.std(0) - 0.5).abs().max() < 0.06
