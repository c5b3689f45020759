"""DMD with teacher pairs, and f-distill: what they add to distribution matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.analytic import Gaussian
from fastgen.errors import UserError
from fastgen.method import Batch
from fastgen.methods.dmd import DMD
from fastgen.methods.dmd2 import DMD2
from fastgen.methods.f_distill import WEIGHTS, FDistill
from tests.method_fakes import (
    LABELS,
    PROCESSES,
    TABLE,
    FakePipeline,
    GaussianScore,
    batches,
    furthest_marginal,
    train,
    two_labels,
)

FLOW = PROCESSES["flow"]
DIVERGENCES = list(WEIGHTS)


def ready(pipeline: FakePipeline, kind_of: type[Any], **options: Any) -> Any:
    method = kind_of(**options)
    method.setup(pipeline)
    return method


# -- DMD ------------------------------------------------------------------------------------------


def test_dmd_is_matching_and_a_regression_on_pairs() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    method, batch = ready(pipeline, DMD), next(batches(pipeline, 4, pairs=True))
    assert method.needs == {"prompts", "pairs"} and [player.every for player in method.players()] == [1, 1]
    assert DMD(regression_weight=0).needs == {"prompts"}
    nn.init.normal_(method.critic.fake.network.leave.bias)
    alone = ready(pipeline, DMD2, steps=1, gan_weight=0)
    alone.critic.fake.load_state_dict(method.critic.fake.state_dict())
    torch.manual_seed(0)
    terms = method.student_loss(batch)
    torch.manual_seed(0)
    torch.testing.assert_close(terms["dmd"], alone.student_loss(batch)["dmd"])
    with torch.no_grad():
        x = method.student(batch.noise, torch.ones(4), batch.condition).x0
    torch.testing.assert_close(terms["regression"].detach(), 0.25 * (x - batch.target).square().mean())
    batch.noise = batch.target = None
    assert set(ready(pipeline, DMD, regression_weight=0).student_loss(batch)) == {"dmd"}


def test_pairs_can_be_compared_as_images() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    method, batch = ready(pipeline, DMD, regression_in="images"), next(batches(pipeline, 4, pairs=True))
    x = method.student(batch.noise, torch.ones(4), batch.condition).x0
    expected = (pipeline.decode(x) - pipeline.decode(batch.target)).square().mean()
    found = method.regression(batch)
    torch.testing.assert_close(found, expected)
    (pull,) = torch.autograd.grad(found, [method.student.network.leave.weight])
    assert pull.abs().max() > 0


@pytest.mark.parametrize("options", [{"steps": 4}, {"timesteps": (999, 499)}])
def test_pairs_make_one_step_students(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"students of 1 step.* not of [42]; use dmd2"):
        DMD(**options)


class Linear(nn.Module):
    """x0 = a z + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        return self.a * x + self.b


@pytest.mark.slow
def test_pairs_say_which_noise_makes_which_sample() -> None:
    """Begun with the wrong sign, which matching alone does not mind, a linear student comes to the teacher's own map."""
    teacher = Gaussian(torch.full((16,), 0.8), 0.5, FLOW, "x0")
    networks = {"student": Linear, "fake_score": lambda: GaussianScore(FLOW, -0.5, 1.0)}
    pipeline = FakePipeline(FLOW, (16,), "x0", teacher=teacher, labels=1, networks=networks)
    method = ready(pipeline, DMD)
    train(method, batches(pipeline, 64, ("0",), pairs=True), 800, 0.05)
    a, b = float(method.student.network.a.detach()), float(method.student.network.b.detach())
    # Measured 0.511 and 0.764.
    assert abs(a - 0.5) < 0.04 and abs(b - 0.8) < 0.06


# -- f-distill ------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_weights_are_second_derivatives(divergence: Any) -> None:
    """h(r) = f''(r) r^2, by automatic differentiation of the generators."""
    generators = {
        "reverse_kl": lambda r: -r.log(),
        "forward_kl": lambda r: r * r.log(),
        "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
        "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
        "jeffreys": lambda r: (r - 1) * r.log(),
        "neyman": lambda r: 0.5 * (1 - r) ** 2 / r,
    }
    r = torch.linspace(0.1, 5, 20, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(generators[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(WEIGHTS[divergence](r), second * r**2)


def test_reverse_kl_is_dmd2() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    mine, dmd2 = ready(pipeline, FDistill, divergence="reverse_kl"), ready(pipeline, DMD2)
    nn.init.normal_(mine.critic.fake.network.leave.bias)
    dmd2.critic.load_state_dict(mine.critic.state_dict())
    batch = next(batches(pipeline, 8))
    pulls = []
    for method in (mine, dmd2):
        torch.manual_seed(2)
        terms = method.student_loss(batch)
        pulls.append(torch.autograd.grad(terms["dmd"], [method.student.network.leave.weight])[0])
    torch.testing.assert_close(pulls[0], pulls[1])
    torch.manual_seed(2)
    found = mine.fake_loss(batch)
    torch.manual_seed(2)
    for key, value in dmd2.fake_loss(batch).items():
        torch.testing.assert_close(found[key], value)


def test_the_weight_by_hand() -> None:
    """NVIDIA's arithmetic, whose means are those of the batch: two bins of time, three logits a sample."""
    method = ready(FakePipeline(TABLE, (3,)), FDistill, divergence="forward_kl", ratio_bins=2, ratio_decay=0.0)
    logits = torch.tensor([[0.0, 0.3, 0.6], [2.0, 1.0, 0.0], [-1.0, -1.0, -1.0], [40.0, 40.0, 40.0], [-9.0, -9.0, -9.0]])
    t = torch.tensor([0.1, 0.4, 0.6, 0.9, 1.0])
    r = torch.tensor([0.3, 1.0, -1.0, 10.0, -9.0]).exp().clamp(0.1, 20)
    r = torch.cat([r[:2] / r[:2].mean(), r[2:] / r[2:].mean()])
    torch.testing.assert_close(method.weight(logits, t), r / r.mean())
    running = ready(FakePipeline(TABLE, (3,)), FDistill, divergence="forward_kl", ratio_bins=0)
    one = running.weight(torch.full((1, 1), 3.0).log(), torch.full((1,), 0.5))
    torch.testing.assert_close(one, torch.tensor([3.0 / (0.9 + 0.1 * 3.0)]))


@pytest.mark.parametrize(
    ("divergence", "h"),
    [("forward_kl", lambda r: r), ("jensen_shannon", lambda r: r / (1 + r)), ("neyman", lambda r: 1 / r)],
)
def test_the_students_gradient_is_the_weighted_difference_of_scores(divergence: Any, h: Any) -> None:
    """h(r) over its mean, times DMD2's gradient (f-distill, theorem 1), under logits that are given; on a flow."""
    pipeline = FakePipeline(FLOW, (3, 4, 4), "flow")
    options: dict[str, Any] = {"ratio_bins": 0, "ratio_decay": 0.0, "guidance": 3.0, "gan_weight": 0.2}
    method, batch = ready(pipeline, FDistill, divergence=divergence, **options), next(batches(pipeline, 8))
    nn.init.normal_(method.critic.fake.network.leave.bias)
    x, logits = torch.randn(8, 3, 4, 4, requires_grad=True), 3 * torch.randn(8, 5)
    method.generate, method.critic.logits = lambda batch: x, lambda features: logits
    torch.manual_seed(7)
    terms = method.student_loss(batch)
    (gradient,) = torch.autograd.grad(terms["dmd"], x)
    torch.manual_seed(7)
    t = 0.02 + 0.96 * torch.rand(8)
    wide = t.view(-1, 1, 1, 1)
    with torch.no_grad():
        xt = (1 - wide) * x + wide * torch.randn(8, 3, 4, 4)
        mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]
        yes, no = (pipeline.base(xt, t, which, None) for which in (mask, null))
        fake, real = xt - wide * method.critic.fake.network(xt, t, mask, None), xt - wide * (no + 3 * (yes - no))
        plain = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True) / x.numel()
        weight = h(logits.mean(1).exp().clamp(0.1, 20))
        weight = (weight / weight.mean()).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, weight * plain, rtol=1e-3, atol=1e-6)
    assert weight.max() > 1.2 > 0.9 > weight.min(), "a gradient without it is another"
    torch.testing.assert_close(terms["gan"], -0.2 * logits.sigmoid().log().mean())


class Seen(nn.Module):
    """A fake score whose features are what it is asked about: x_t and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.scale = nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        return self.scale * self.middle(torch.cat([x, t[:, None]], 1))[:, :1]


def test_the_best_critic_says_the_log_of_the_ratio() -> None:
    """Where logits are log(density of noised data / of noised samples), the critic's loss is stationary, and the weights of
    forward KL make of the mean over samples that over data."""
    data, made, count = Gaussian(torch.tensor([0.8]), 0.8, FLOW), Gaussian(torch.tensor([-0.4]), 1.0, FLOW), 50_000
    pipeline = FakePipeline(FLOW, (1,), "flow", teacher=data, labels=1, networks={"fake_score": Seen})
    options: dict[str, Any] = {"divergence": "forward_kl", "ratio_bins": 0, "ratio_decay": 0.0, "ratio_low": 1e-3}
    method, condition = ready(pipeline, FDistill, critic_weight=1.0, **options), data.unconditional(1)[[0] * count]
    moved, seen = torch.tensor([1.0, 0.0], requires_grad=True), []

    def logits(features: dict[str, Tensor]) -> Tensor:
        seen.append(features["middle"])
        xt, t = seen[-1].split(1, 1)
        ratio = data.log_density(xt, t[:, 0], condition) - made.log_density(xt, t[:, 0], condition)
        return (moved[0] * ratio + moved[1])[:, None]

    method.critic.logits = logits
    method.generate = lambda batch: made.sample(condition).float()
    loss = method.fake_loss(Batch(condition, (count, 1), data.sample(condition).float()))["gan"]
    (slope,) = torch.autograd.grad(loss, moved)
    fake, real = seen
    weight = method.weight(logits({"middle": fake}).detach().float(), fake[:, 1])
    weighted, of_data, of_samples = (float(x.mean()) for x in (weight * fake[:, 0], real[:, 0], fake[:, 0]))
    # Measured 0.003, and 0.91 for logits of the other sign; 0.388 for the data's 0.405, without weights -0.204.
    assert slope.abs().max() < 0.006 and abs(weighted - of_data) < 0.04 < 0.5 < of_data - of_samples


def test_a_sample_alone_keeps_its_weight_and_the_means_are_resumed() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method = ready(pipeline, FDistill, divergence="forward_kl")
    t = torch.full((1,), 0.5)
    for _ in range(50):
        method.weight(torch.zeros(1, 2), t)
    high, low = method.weight(torch.ones(1, 2), t), method.weight(-torch.ones(1, 2), t)
    assert float(high) > 2 * float(low)
    again = ready(pipeline, FDistill, divergence="forward_kl")
    again.load_state(method.state())
    assert torch.equal(again.weight(torch.ones(1, 2), t), method.weight(torch.ones(1, 2), t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gan_weight": 0.0}, "gan_weight = 0 leaves f_distill without its discriminator"),
        ({"ratio_low": 3.0, "ratio_high": 2.0}, "ratio_low = 3 must be below ratio_high = 2"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FDistill(**options)


@pytest.mark.slow
def test_a_mixture_is_learnt_in_one_step_by_f_distill() -> None:
    """Two labels of a mixture in two dimensions; the student's marginals come near the data's."""
    pipeline = two_labels()
    method = ready(pipeline, FDistill, steps=1, student_every=3)
    train(method, batches(pipeline, 128, LABELS), 1500, 2e-3, betas=(0.0, 0.99))
    # Measured at most 0.107.
    assert furthest_marginal(pipeline, method.trained, method.sampler()) < 0.17
