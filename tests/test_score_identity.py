"""SiD, long and short guidance, few-step SiD: identity, gradient through held denoisers, guidance, where students end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.analytic import Gaussian
from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.families.score_identity import ScoreIdentity, Unconditional, score_identity, time_weight
from fastgen.losses import contrast
from fastgen.methods.sid import SiD
from fastgen.methods.sid_few_step import SiDFewStep, pooled
from fastgen.methods.sid_lsg import SiDLSG
from fastgen.process import Prediction
from fastgen.samplers import FewStep
from tests.method_fakes import (
    LABELS,
    PROCESSES,
    TABLE,
    FakePipeline,
    GaussianScore,
    batches,
    train,
    two_labels,
    wasserstein,
)

BARS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def ready(cls: type[ScoreIdentity], pipeline: FakePipeline, **options: Any) -> Any:
    method = cls(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


def other_fake(method: ScoreIdentity) -> None:
    """Move the fake score off the teacher."""
    with torch.no_grad():
        for weight in method.critic.fake.parameters():
            weight.add_(0.3 * torch.randn_like(weight))


def test_cut_off_from_the_samples_it_is_distribution_matching() -> None:
    x, fake, real = (torch.randn(8, 3, 4, 4) for _ in range(3))
    x.requires_grad_()
    weight = time_weight("normalised", TABLE, torch.rand(8), x, real)
    (expected,) = torch.autograd.grad(contrast(x, fake, real), x)
    for alpha in (0.5, 1.0, 1.2):
        (gradient,) = torch.autograd.grad(score_identity(x, fake, real, alpha, weight), x)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_with_an_exact_fake_score_it_is_the_squared_difference() -> None:
    """E[(real - fake) (fake - x)] = 0 for a Gaussian student, so the loss is (1 - alpha) E[(real - fake)^2]."""
    p, count = PROCESSES["flow"], 200_000
    fake, real = Gaussian(torch.tensor([-0.5]), 1.0, p), Gaussian(torch.tensor([0.8]), 0.5, p)
    x = -0.5 + torch.randn(count, 1, dtype=torch.float64)
    t, condition = 0.02 + 0.96 * torch.rand(count, dtype=torch.float64), fake.unconditional(count)
    xt = p.add_noise(x, torch.randn_like(x), t)
    n, q = fake(xt, t, condition).x0, real(xt, t, condition).x0
    square = (q - n).square().mean()
    for alpha in (0.5, 1.0, 1.2):
        assert abs(score_identity(x, n, q, alpha) - (1 - alpha) * square) < 0.01 * square
    assert square > 0.3


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_loss_and_gradient_by_hand(alpha: float) -> None:
    """The authors' expression on a table with its own numbers, its gradient through both networks and through the samples."""
    pipeline = FakePipeline(TABLE, (3,), "eps")
    method = ready(SiDLSG, pipeline, guidance=2.0, fake_guidance=3.0, alpha=alpha)
    other_fake(method)
    batch, x = next(batches(pipeline, 16)), torch.randn(16, 3, requires_grad=True)
    torch.manual_seed(7)
    loss = method.identity(x, batch.condition)[0]
    (gradient,) = torch.autograd.grad(loss, x)
    torch.manual_seed(7)
    index = (1000 * (0.02 + 0.96 * torch.rand(16))).long()
    a, s = BARS[index].sqrt().float()[:, None], (1 - BARS[index]).sqrt().float()[:, None]
    xt, t = a * x + s * torch.randn(16, 3), (index + 1) / 1000
    mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]

    def clean(network: nn.Module, scale: float) -> Tensor:
        yes, no = (network(xt, t, which, None) for which in (mask, null))
        return (xt - s * (no + scale * (yes - no))) / a

    y_real, y_fake = clean(pipeline.base, 2.0), clean(method.critic.fake.network, 3.0)
    factor = (x - y_real).abs().mean(1, keepdim=True).clip(min=1e-5).detach()
    terms = (y_real - y_fake) * ((y_real - x) - alpha * (y_real - y_fake)) / factor
    (expected,) = torch.autograd.grad(terms.sum() / x.numel(), x)
    torch.testing.assert_close(loss, terms.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-6)
    detached = score_identity(x, y_fake.detach(), y_real.detach(), alpha, 1 / factor)
    assert (torch.autograd.grad(detached, x)[0] - expected).abs().max() > 1e-3, "the path through the networks counts"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpha", lambda s: 1 - s),
        ("alpha_squared", lambda s: (1 - s) ** 2),
        ("inverse_sigma", lambda s: 1 / s),
        ("inverse_sigma_squared", lambda s: 1 / s**2),
        ("sqrt_snr", lambda s: (1 - s) / s),
        ("snr", lambda s: ((1 - s) / s) ** 2),
    ],
)
def test_weights_of_a_flow_are_sid_dits(name: Any, expected: Any) -> None:
    t, x = torch.tensor([0.05, 0.5, 0.9]), torch.randn(3, 2, 4)
    torch.testing.assert_close(time_weight(name, PROCESSES["flow"], t, x, x).flatten(), expected(t), rtol=1e-4, atol=1e-6)
    for end in (0.0, 1.0):
        assert time_weight(name, PROCESSES["flow"], torch.full((3,), end), x, x).isfinite().all()


def test_times_of_both_laws() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    t = ready(SiD, pipeline).draw_times(5000)
    steps = TABLE.timestep(t)
    assert 20 <= steps.min() < 25 and 975 < steps.max() <= 979
    flow = ready(SiDFewStep, FakePipeline(PROCESSES["flow"], (3,)), noise_law="logit_normal").draw_times(50_000)
    logit = torch.logit(flow.double())
    assert abs(logit.mean() - 0.693) < 0.05 and abs(logit.std() - 1.6) < 0.05


@pytest.mark.parametrize("cls", [SiD, SiDLSG, SiDFewStep])
def test_the_weights_of_teacher_and_fake_score_are_held_and_the_student_moves(cls: type[ScoreIdentity]) -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(cls, pipeline, guidance=2.0), next(batches(pipeline, 8))
    other_fake(method)
    fake, student = method.players()
    assert (fake.name, fake.every, student.name, student.every) == ("fake_score", 1, "student", 1)
    assert method.needs == {"prompts"} and method.family == "score identity"
    fake.weights.requires_grad_(False)
    sum(student.loss(batch).values()).backward()
    assert all(p.grad is None for p in [*pipeline.base.parameters(), *fake.weights.parameters()])
    assert method.student.network.leave.weight.grad.abs().max() > 0
    fake.weights.requires_grad_(True)
    method.student.zero_grad()
    sum(fake.loss(batch).values()).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in method.student.parameters())
    assert method.critic.fake.network.leave.weight.grad.abs().max() > 0


def test_nothing_pulls_when_the_fake_score_is_the_teacher() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(SiDLSG, pipeline, guidance=3.0), next(batches(pipeline, 8))
    loss = method.student_loss(batch)["identity"]
    loss.backward()
    assert abs(loss) < 1e-5
    # The difference is zero, but not its gradient's expectation term by term: what remains is (d real - d fake) (fake - x).
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in method.student.parameters())


def test_a_network_that_answers_nonsense_does_no_harm() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(SiD, pipeline), next(batches(pipeline, 8))
    with torch.no_grad():
        method.critic.fake.network.leave.bias.fill_(torch.nan)
    loss = method.student_loss(batch)["identity"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in method.student.parameters())


def scales(method: ScoreIdentity, player: int, batch: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Who is asked under which guidance in one loss of a player."""
    asked: list[tuple[str, float]] = []
    names = {id(method.critic.fake): "fake", id(method.student): "student"}
    guided, bare = Guided.__call__, Unconditional.__call__

    def seen(self: Any, *args: Any, **options: Any) -> Prediction:
        scale = self.scale if isinstance(self, Guided) else 0.0
        inner = self.denoiser.denoiser if isinstance(self.denoiser, Guided) else self.denoiser
        asked.append((names.get(id(inner), "teacher"), scale))
        return (guided if isinstance(self, Guided) else bare)(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Guided, "__call__", seen)
        patch.setattr(Unconditional, "__call__", seen)
        method.players()[player].loss(batch)
    return [each for each in asked if each[0] != "student"]


def test_long_and_short_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline(TABLE, (3,), default_guidance=7.5)
    batch = next(batches(pipeline, 4))
    method = ready(SiDLSG, pipeline)
    assert scales(method, 0, batch, monkeypatch) == [("fake", 2.0)]
    assert scales(method, 1, batch, monkeypatch) == [("fake", 2.0), ("teacher", 2.0)]
    method = ready(SiDLSG, pipeline, guidance=None, fake_guidance=1.0, fake_training_guidance=3.0)
    assert scales(method, 0, batch, monkeypatch) == [("fake", 3.0)]
    assert scales(method, 1, batch, monkeypatch) == [("fake", 1.0), ("teacher", 7.5)]
    assert scales(ready(SiD, pipeline), 1, batch, monkeypatch) == [("fake", 1.0), ("teacher", 7.5)]


def test_strategies_of_few_step_sid(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline(TABLE, (3,), default_guidance=7.5)
    batch = next(batches(pipeline, 4))
    both = ready(SiDFewStep, pipeline, guidance=4.5)
    assert scales(both, 0, batch, monkeypatch) == [("fake", 4.5)]
    assert scales(both, 1, batch, monkeypatch) == [("fake", 4.5), ("teacher", 4.5)]
    zero, anti = ready(SiDFewStep, pipeline, strategy="zero"), ready(SiDFewStep, pipeline, strategy="anti")
    assert [scales(zero, i, batch, monkeypatch) for i in range(2)] == [[("fake", 0.0)], [("fake", 0.0)]]
    assert [scales(anti, i, batch, monkeypatch) for i in range(2)] == [[("fake", 1.0)], [("fake", -1.0)]]
    assert not isinstance(zero.teacher, Guided) and not isinstance(anti.teacher, Guided)


def test_zero_cfg_hides_the_prompt_from_the_fake_score() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method = ready(SiDFewStep, pipeline, strategy="zero")
    other_fake(method)
    xt, t = torch.randn(4, 3), torch.rand(4)
    one, two = (method.judged(0.0)(xt, t, pipeline.encode_prompts([prompt] * 4)).output for prompt in "01")
    assert torch.equal(one, two)
    one, two = (method.judged(1.0)(xt, t, pipeline.encode_prompts([prompt] * 4)).output for prompt in "01")
    assert not torch.equal(one, two)


def test_a_tenth_of_the_samples_has_no_prompt_when_a_guided_fake_score_learns() -> None:
    pipeline = FakePipeline(TABLE, (3,))
    condition = pipeline.encode_prompts(["0"] * 4000)
    for cls, options, share in (
        (SiDLSG, {}, 0.1),
        (SiDLSG, {"prompt_dropout": 0.5}, 0.5),
        (SiDLSG, {"guidance": 1.0}, 0.0),
        (SiDFewStep, {"strategy": "anti"}, 0.1),
        (SiD, {"guidance": 3.0}, 0.0),
    ):
        learnt = ready(cls, pipeline, **options).learnt(condition).inputs["components"]
        assert abs(float(learnt.all(1).float().mean()) - share) < 0.02, options
    embedding = FakePipeline(TABLE, (3,), embeds_guidance=True, default_guidance=3.5)
    method = ready(SiDLSG, embedding, guidance=None)
    assert method.drop_share == 0 and method.told == 3.5 and method.fake_scales == (3.5, 3.5)


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_noise_between_calls(noise: Any, process: str) -> None:
    """Every call's input by its definition: the estimate before it, with new noise, the first noise, or its own noise."""
    p = PROCESSES[process]
    pipeline = FakePipeline(p, (3,))
    method, condition, seen = ready(SiDFewStep, pipeline, noise=noise), pipeline.encode_prompts(["0"] * 64), []
    noise_at_first = torch.randn(64, 3)
    torch.manual_seed(3)
    with torch.no_grad():
        x = method.sampler().sample(method.student, noise_at_first, condition, watch=seen.append)
    assert len(seen) == 4 and torch.equal(x, seen[-1].x0)
    torch.manual_seed(3)
    for before, after in pairwise(seen):
        eps = {"fresh": lambda: torch.randn(64, 3), "fixed": lambda: noise_at_first, "ddim": lambda before=before: before.eps}
        torch.testing.assert_close(after.xt, p.add_noise(before.x0, eps[noise](), after.t))


def test_samplers_and_their_schedulers() -> None:
    table, flow = FakePipeline(TABLE, (3,), "eps"), FakePipeline(PROCESSES["flow"], (3,), "flow")
    unets = ready(SiDFewStep, table, timesteps=(625, 468, 312, 156)).sampler()
    assert unets.scheduler(TABLE, "eps").call["timesteps"] == [625, 468, 312, 156]
    assert ready(SiD, table).sampler().times == (1.0,) and ready(SiD, table, timesteps=(625,)).sampler().times == (0.626,)
    assert ready(SiDFewStep, flow).sampler().scheduler(flow.process, "flow").config["stochastic_sampling"] is True
    ddim = ready(SiDFewStep, flow, noise="ddim").sampler().scheduler(flow.process, "flow")
    assert ddim.config["stochastic_sampling"] is False
    with pytest.raises(UserError, match="no stock diffusers scheduler adds the first noise again"):
        ready(SiDFewStep, flow, noise="fixed").sampler().scheduler(flow.process, "flow")
    one = ready(SiDFewStep, flow, noise="fixed", steps=1).sampler()
    assert one.scheduler(flow.process, "flow").class_name == "FlowMatchEulerDiscreteScheduler"


def test_training_inputs_are_inference_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline(TABLE, (3,))
    method, batch = ready(SiDFewStep, pipeline, noise="fixed"), next(batches(pipeline, 16))
    monkeypatch.setattr("fastgen.families.score_distillation.shared_choice", lambda count, device: 2)
    torch.manual_seed(11)
    trained, exit_at = method.last_call(batch)
    seen: list[Prediction] = []
    torch.manual_seed(11)
    method.sampler().sample(method.student, torch.randn(batch.shape), batch.condition, watch=seen.append)
    assert exit_at == 2 and torch.equal(trained.xt, seen[2].xt) and not trained.xt.requires_grad
    assert torch.equal(trained.x0, seen[2].x0) and trained.x0.requires_grad


def test_the_gan_reads_the_fake_scores_own_features() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    method, batch = ready(SiDFewStep, pipeline, gan_weight=0.01, guidance=1.0), next(batches(pipeline, 6))
    assert method.needs == {"prompts", "images"} and ready(SiDFewStep, pipeline).needs == {"prompts"}
    assert [id(p) for p in method.critic.parameters()] == [id(p) for p in method.critic.fake.parameters()]
    seen: list[Tensor] = []
    method.critic.fake.network.middle.register_forward_hook(lambda module, args, output: seen.append(output))
    terms = method.fake_loss(batch)
    fake, real = (x.mean(1).flatten(1) for x in seen)
    softplus = nn.functional.softplus
    torch.testing.assert_close(terms["gan"], (softplus(fake).mean() + softplus(-real).mean()) / 2)
    (pull,) = torch.autograd.grad(terms["gan"], [method.critic.fake.network.enter.weight])
    assert pull.abs().max() > 0
    seen.clear()
    torch.manual_seed(1)
    terms = method.student_loss(batch)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = method.identity(method.generate(batch), batch.condition)[2].flatten()
    torch.testing.assert_close(terms["gan"], 0.01 * (weight * softplus(-seen[0].mean(1)).flatten(1).mean(1)).mean())
    (pull,) = torch.autograd.grad(terms["gan"], [method.student.network.leave.weight])
    assert pull.abs().max() > 0


def test_how_features_become_logits() -> None:
    maps, tokens, flat = torch.randn(2, 5, 3, 4), torch.randn(2, 7, 5), torch.randn(2, 6)
    assert torch.equal(pooled({"a": maps}), maps.mean(1).flatten(1))
    assert torch.equal(pooled({"a": tokens, "b": flat}), torch.cat([tokens.mean(1), flat], 1))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SiDFewStep, {"strategy": "zero", "guidance": 4.5}, r'strategy = "zero" has an unguided teacher, but guidance = 4\.5'),
        (SiDFewStep, {"strategy": "anti", "guidance": 2.0}, r'strategy = "anti" has an unguided teacher, but guidance = 2'),
        (SiD, {"weight": "gamma"}, "weight must be one of normalised, alpha, .*, not 'gamma'"),
        (SiDLSG, {"low": 0.9, "high": 0.1}, "low = 0.9 and high = 0.1"),
    ],
)
def test_contradictions_are_named(cls: type[ScoreIdentity], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(cls, FakePipeline(TABLE, (3,)), **options)


def test_what_a_pipeline_cannot_serve_is_refused() -> None:
    embedding = FakePipeline(TABLE, (3,), embeds_guidance=True)
    with pytest.raises(UserError, match='strategy = "zero" needs true guidance, but this network is told its scale'):
        ready(SiDFewStep, embedding, strategy="zero")
    pipeline = FakePipeline(TABLE, (3,))
    pipeline.feature_layers = ()
    with pytest.raises(UserError, match=r"gan_weight = 0\.01 needs feature layers"):
        ready(SiDFewStep, pipeline, gan_weight=0.01)


class Linear(nn.Module):
    """x0 = a z + b: the student of which two numbers are to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        return self.a * x + self.b


@pytest.mark.parametrize(("process", "alpha"), [("flow", 0.5), ("flow", 1.0), ("flow", 1.2), ("vp", 1.2)])
def test_a_linear_student_becomes_the_gaussian(process: str, alpha: float) -> None:
    """G(z) = a z + b under N(0.8, 0.5^2) with the exact fake score of what it makes: b comes to 0.8 and |a| to 0.5."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.full((16,), 0.8), 0.5, p)
    networks = {"student": Linear, "fake_score": lambda: GaussianScore(p)}
    pipeline = FakePipeline(p, (16,), "x0", teacher=teacher, labels=1, networks=networks)
    method = ready(SiD, pipeline, alpha=alpha)
    student, fake, source = method.student.network, method.critic.fake.network, batches(pipeline, 64, ("0",))
    method.critic.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for step in range(200):
        with torch.no_grad():
            fake.mean.copy_(student.b)
            fake.log_std.copy_(student.a.abs().log())
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        method.student_loss(next(source))["identity"].backward()
        optimizer.step()
        optimizer.zero_grad()
    a, b = float(student.a.detach()), float(student.b.detach())
    assert abs(abs(a) - 0.5) < 0.05 and abs(b - 0.8) < 0.05


MIXTURES: list[tuple[type[ScoreIdentity], dict[str, Any], float]] = [  # and the bound on the distance
    (SiD, {}, 0.2),
    (SiDLSG, {"guidance": 1.0}, 0.2),
    (SiDFewStep, {"guidance": 1.0, "weight": "alpha", "noise_law": "logit_normal"}, 0.2),
    (SiDFewStep, {"guidance": 1.0, "gan_weight": 0.01}, 0.3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options", "bound"), MIXTURES)
def test_a_mixture_is_learnt(cls: type[ScoreIdentity], options: dict[str, Any], bound: float) -> None:
    """Two labels of a mixture in two dimensions; marginals of what all calls make, taken together, come near the data's.

    One fake score for several calls sees no more than their mixture, and the mixture is what it brings to the data: the mean
    of single calls stays some way above and below.
    """
    pipeline = two_labels(800)
    teacher = pipeline.teacher
    method = ready(cls, pipeline, student_every=2, **options)
    train(method, batches(pipeline, 128, LABELS), 1600, 2e-3, betas=(0.0, 0.99))
    condition = pipeline.encode_prompts(["0 1", "2"] * 2000)
    seen: list[Prediction] = []
    with torch.no_grad():
        method.sampler().sample(method.trained, torch.randn(4000, 2), condition, watch=seen.append)
    calls = len(seen)
    data = teacher.sample(pipeline.encode_prompts(["0 1", "2"] * 2000 * calls))

    def distance(x: Tensor) -> float:
        return max(wasserstein(x[i::2, d], data[i : len(x) : 2, d]) for i in range(2) for d in range(2))

    before = distance(FewStep((1.0,)).sample(teacher, torch.randn(4000, 2), condition))
    found, last = distance(torch.cat([each.x0 for each in seen])), distance(seen[-1].x0)
    # Measured 0.132, 0.124, 0.133 and 0.208 of all calls, at most 0.334 of the last alone, from 0.80 before.
    assert found < bound and last < 0.45 and before > 0.6
