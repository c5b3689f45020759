"""DMD2: its gradient, its inputs, its two players, and where a Gaussian student ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.analytic import Gaussian
from fastgen.errors import UserError
from fastgen.families import score_distillation
from fastgen.methods import dmd2
from fastgen.methods.dmd2 import DMD2
from fastgen.process import Prediction
from fastgen.samplers import FewStep
from tests.method_fakes import (
    LABELS,
    PROCESSES,
    TABLE,
    FakePipeline,
    GaussianScore,
    batches,
    furthest_marginal,
    student_gradient,
    train,
    two_labels,
)

PLAIN: dict[str, Any] = {"gan_weight": 0.0}


def ready(pipeline: FakePipeline, **options: Any) -> DMD2:
    method = DMD2(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


def test_what_it_needs_follows_from_the_gan() -> None:
    assert DMD2().needs == {"prompts", "images"} and DMD2(gan_weight=0).needs == {"prompts"}
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(pipeline, **PLAIN), next(batches(pipeline, 4))
    batch.latents = None
    assert [set(player.loss(batch)) for player in method.players()] == [{"score"}, {"dmd"}]
    assert method.critic.heads is None
    method, batch = ready(pipeline), next(batches(pipeline, 4))
    assert [set(player.loss(batch)) for player in method.players()] == [{"score", "gan"}, {"dmd", "gan"}]


def test_two_time_scales() -> None:
    fake, student = ready(FakePipeline(TABLE, (3,)), fake_lr_scale=2.0).players()
    assert (fake.name, fake.every, fake.lr_scale) == ("fake_score", 1, 2.0) and (student.name, student.every) == ("student", 5)


def test_the_papers_timesteps() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    four = ready(pipeline).sampler()
    assert four == ready(pipeline, timesteps=(999, 749, 499, 249)).sampler()
    assert four.gamma == 1.0 and four.guidance == 1.0
    assert ready(pipeline, timesteps=(399,)).sampler().times == (0.4,)
    spec = four.scheduler(TABLE, "eps")
    assert spec.class_name == "LCMScheduler" and spec.call["guidance_scale"] == 1.0
    with pytest.raises(UserError, match="trained for 4 steps, not for 2"):
        ready(pipeline).sampler(2)


def test_the_gradient_by_hand() -> None:
    """Guided teacher and fake score on a table, against the authors' formula with the table's own numbers."""
    pipeline = FakePipeline(TABLE, (3,), "eps")
    method = ready(pipeline, guidance=8.0, **PLAIN)
    nn.init.normal_(method.critic.fake.network.leave.bias)
    batch, x = next(batches(pipeline, 16)), torch.randn(16, 3, requires_grad=True)
    torch.manual_seed(7)
    (gradient,) = torch.autograd.grad(method.matching(x, batch.condition), x)
    torch.manual_seed(7)
    index = (1000 * (0.02 + 0.96 * torch.rand(16))).long()
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[index]
    a, s = table.sqrt().float()[:, None], (1 - table).sqrt().float()[:, None]
    with torch.no_grad():
        xt, t = a * x + s * torch.randn(16, 3), (index + 1) / 1000
        mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]
        fake = (xt - s * method.critic.fake.network(xt, t, mask, None)) / a
        yes, no = (pipeline.base(xt, t, which, None) for which in (mask, null))
        real = (xt - s * (no + 8 * (yes - no))) / a
        p_real, p_fake = x - real, x - fake
        expected = (p_real - p_fake) / p_real.abs().mean(1, keepdim=True) / x.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_nothing_pulls_when_the_fake_score_is_the_teacher() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(pipeline, **PLAIN), next(batches(pipeline, 8))
    assert student_gradient(method, batch).abs().max() < 1e-8


@pytest.mark.parametrize("exit_at", range(4))
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_training_inputs_are_inference_inputs(process: str, exit_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline(PROCESSES[process], (3,))
    method, batch = ready(pipeline, **PLAIN), next(batches(pipeline, 64))
    inputs: list[tuple[Tensor, Tensor]] = []
    method.student.register_forward_hook(lambda module, args, prediction: inputs.append((prediction.xt, prediction.t)))
    monkeypatch.setattr(score_distillation, "shared_choice", lambda count, device: exit_at)
    torch.manual_seed(11)
    trained = method.generate(batch)
    trained_inputs = list(inputs)
    seen: list[Prediction] = []
    torch.manual_seed(11)
    method.sampler().sample(method.student, torch.randn(batch.shape), batch.condition, watch=seen.append)
    assert len(trained_inputs) == exit_at + 1
    for (xt, t), prediction in zip(trained_inputs, seen, strict=False):
        assert torch.equal(xt, prediction.xt) and torch.equal(t, prediction.t)
    assert torch.equal(trained, seen[exit_at].x0) and trained.requires_grad and not trained_inputs[-1][0].requires_grad


def test_the_gan_reaches_the_student_in_its_own_turn_only() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    method, batch = ready(pipeline), next(batches(pipeline, 4))
    terms = method.fake_loss(batch)
    for term in terms.values():
        grads = torch.autograd.grad(term, list(method.student.parameters()), retain_graph=True, allow_unused=True)
        assert all(grad is None for grad in grads)
    heads = list(method.critic.heads.parameters())
    assert all(g is None for g in torch.autograd.grad(terms["score"], heads, retain_graph=True, allow_unused=True))
    shared = method.critic.fake.network.enter.weight
    assert torch.autograd.grad(terms["gan"], [shared, *heads])[0].abs().max() > 0
    (pull,) = torch.autograd.grad(method.student_loss(batch)["gan"], [method.student.network.leave.weight])
    assert pull.abs().max() > 0


def test_the_gan_half_by_hand() -> None:
    """Both turns on a flow, -log of the right answer and -log of being taken for real (section 4.3): the one weight is on the
    critic's term, the other on the student's, and neither is on anything else."""
    pipeline = FakePipeline(PROCESSES["flow"], (3, 4, 4), "flow")
    method, batch = ready(pipeline, gan_weight=0.3, critic_weight=0.7, guidance=2.0), next(batches(pipeline, 16))
    nn.init.normal_(method.critic.fake.network.leave.bias)
    x, real = torch.randn(16, 3, 4, 4, requires_grad=True), batch.latents
    method.generate = lambda batch: x  # type: ignore[method-assign]

    def logits(x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = t.view(-1, 1, 1, 1)
        prediction = method.critic.fake((1 - wide) * x + wide * eps, t, batch.condition, features=("middle",))
        return prediction.output, method.critic.heads([prediction.features["middle"]])

    torch.manual_seed(3)
    found = method.fake_loss(batch)
    torch.manual_seed(3)
    t, eps, other = torch.rand(16), torch.randn(16, 3, 4, 4), torch.randn(16, 3, 4, 4)
    (output, on_fake), (_, on_real) = logits(x.detach(), eps, t), logits(real, other, t)
    torch.testing.assert_close(found["score"], (output - (eps - x.detach())).square().mean(), rtol=1e-4, atol=1e-5)
    expected = -(1 - on_fake.sigmoid()).log().mean() - on_real.sigmoid().log().mean()
    torch.testing.assert_close(found["gan"], 0.7 * expected, rtol=1e-4, atol=1e-5)

    torch.manual_seed(3)
    found = method.student_loss(batch)
    torch.manual_seed(3)
    torch.testing.assert_close(found["dmd"], method.matching(x, batch.condition))
    t, eps = torch.rand(16), torch.randn(16, 3, 4, 4)
    expected = -0.3 * logits(x, eps, t)[1].sigmoid().log().mean()
    torch.testing.assert_close(found["gan"], expected, rtol=1e-4, atol=1e-5)
    pulls = [torch.autograd.grad(loss, x)[0] for loss in (found["gan"], expected)]
    assert pulls[0].abs().max() > 0
    torch.testing.assert_close(*pulls, rtol=1e-3, atol=1e-8)


def test_where_the_scores_agree_the_gan_is_all_that_moves_the_student() -> None:
    """A fake score that is the teacher leaves the gradient of a GAN on noised samples, in proportion to its weight."""
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    batch, pulls = next(batches(pipeline, 8)), {}
    for weight in (0.1, 0.4):
        method = ready(pipeline, gan_weight=weight)
        torch.manual_seed(1)
        for head in method.critic.heads.parameters():
            nn.init.normal_(head, 0, 0.1)
        torch.manual_seed(2)
        pulls[weight] = student_gradient(method, batch)
    torch.manual_seed(2)
    parts = torch.autograd.grad(method.student_loss(batch)["gan"], list(method.student.parameters()), allow_unused=True)
    alone = torch.cat([part.flatten() for part in parts if part is not None])
    assert alone.abs().max() > 1e-4
    torch.testing.assert_close(pulls[0.4], alone, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(pulls[0.1], alone / 4, rtol=1e-3, atol=1e-7)


def test_the_discriminator_sees_real_as_real() -> None:
    """Trained on its own loss alone, the head puts data above samples, and the student's loss pushes towards data."""
    teacher = Gaussian(torch.tensor([3.0, 3.0]), 0.1, PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (2,), "flow", teacher=teacher, labels=1)
    method = ready(pipeline, steps=1)
    source = batches(pipeline, 64, ("0",))
    optimizer = torch.optim.Adam(method.critic.parameters(), 3e-3)
    for _ in range(60):
        method.fake_loss(next(source))["gan"].div(method.critic_weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch, t = next(source), torch.full((64,), 0.2)
    x = method.generate(batch).detach().requires_grad_()

    def logits(x: Tensor) -> Tensor:
        xt = method.process.add_noise(x, torch.zeros_like(x), t)
        return method.critic.logits(method.critic.fake(xt, t, batch.condition, features=method.critic.layers).features)

    assert logits(batch.latents).mean() > logits(x).mean() + 1
    (step,) = torch.autograd.grad(dmd2.nonsaturating_student(logits(x)), x)
    assert (-step * (batch.latents - x)).sum() > 0


def test_a_network_that_answers_nonsense_does_no_harm() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(pipeline, **PLAIN), next(batches(pipeline, 8))
    with torch.no_grad():
        method.critic.fake.network.leave.bias.fill_(torch.nan)
    assert student_gradient(method, batch).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"timesteps": (499, 999)}, r"timesteps must decrease .* \[499, 999\]"),
        ({"timesteps": (999, -1)}, "timesteps must .* not be negative"),
        ({"timesteps": (1999, 999)}, "timesteps begin at 1999, but the pipeline's last is 999"),
        ({"timesteps": (999,), "shift": 3.0}, r"timesteps = \[999\] .* shift = 3"),
        ({"student_every": 0}, "student_every must be at least 1"),
        ({"gan_weight": -1.0}, "gan_weight = -1 and critic_weight = 0.01 must not be negative"),
        ({"critic_weight": 0.0}, "gan_weight = 0.005 needs .* critic_weight must be above 0"),
        ({"low": 0.9, "high": 0.1}, "low = 0.9 and high = 0.1"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(FakePipeline(TABLE, (3,)), **options)


def test_a_gan_without_features_is_refused() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    pipeline.feature_layers = ()
    with pytest.raises(UserError, match=r"gan_weight = 0\.005 needs feature layers"):
        ready(pipeline)


class Linear(nn.Module):
    """x0 = a z + b: the student of which two numbers are to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        return self.a * x + self.b


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_a_linear_student_becomes_the_gaussian(process: str) -> None:
    """G(z) = a z + b under N(0.8, 0.5^2), with a fake score that is a Gaussian's: b comes to 0.8 and |a| to 0.5."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.full((16,), 0.8), 0.5, p)
    networks = {"student": Linear, "fake_score": lambda: GaussianScore(p, -0.5, 1.0)}
    pipeline = FakePipeline(p, (16,), "x0", teacher=teacher, labels=1, networks=networks)
    method = ready(pipeline, steps=1, student_every=2, **PLAIN)
    train(method, batches(pipeline, 64, ("0",)), 800, 0.05)
    a, b = float(method.student.network.a.detach()), float(method.student.network.b.detach())
    # Measured 0.010 and 0.002.
    assert abs(abs(a) - 0.5) < 0.05 and abs(b - 0.8) < 0.02


@pytest.mark.slow
def test_the_gan_alone_finds_the_distribution_and_not_the_pairing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the difference of scores a linear student begun at -z - 0.5 comes to the Gaussian too; its sign stays."""
    teacher = Gaussian(torch.full((2,), 0.8), 0.5, PROCESSES["flow"], "x0")
    pipeline = FakePipeline(PROCESSES["flow"], (2,), "x0", teacher=teacher, labels=1, networks={"student": Linear})
    method = ready(pipeline, steps=1, student_every=1, gan_weight=1.0, critic_weight=1.0)
    nn.init.constant_(method.student.network.a, -1.0)
    monkeypatch.setattr(method, "matching", lambda x, condition: 0 * x.sum())
    train(method, batches(pipeline, 64, ("0",)), 800, 0.005, betas=(0.0, 0.99))
    a, b = float(method.student.network.a.detach()), float(method.student.network.b.detach())
    # Measured -0.490 and 0.808.
    assert abs(a + 0.5) < 0.06 and abs(b - 0.8) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("gan_weight", [0.0, 5e-3])
def test_a_mixture_is_learnt_in_one_step(gan_weight: float) -> None:
    """Two labels of a mixture in two dimensions; the student's marginals come near the data's."""
    pipeline = two_labels()
    method = ready(pipeline, steps=1, gan_weight=gan_weight, student_every=3)
    train(method, batches(pipeline, 128, LABELS), 2000, 2e-3, betas=(0.0, 0.99))
    # Measured at most 0.113 without the GAN and 0.093 with it, from 0.80 before.
    assert furthest_marginal(pipeline, method.trained, method.sampler()) < 0.17
    assert furthest_marginal(pipeline, pipeline.frozen(), FewStep((1.0,))) > 0.6
