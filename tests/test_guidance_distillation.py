"""Guidance distillation: the student's target is the guided teacher at every scale, and progressive goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.analytic import Mixture
from fastgen.denoiser import Condition, Guided
from fastgen.errors import UserError
from fastgen.families.progressive import truncated_snr
from fastgen.methods.guidance_distillation import GuidanceDistillation
from fastgen.process import Prediction
from fastgen.samplers import FewStep, even_times
from tests.method_fakes import PROCESSES, TABLE, FakePipeline, batches, learn_teacher, train

MEANS = torch.tensor([[-1.0, 0.6], [1.0, 0.6], [0.0, -1.0]])


def ready(pipeline: FakePipeline, **options: Any) -> GuidanceDistillation:
    method = GuidanceDistillation(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


class GuidedInOne(nn.Module):
    """A mixture's guided denoiser as one network that is told its scale: the perfect student. Answers x0."""

    def __init__(self, teacher: Mixture):
        super().__init__()
        self.teacher, self.unused = teacher, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        assert guidance is not None
        condition = Condition({"components": mask}, null=Condition({"components": torch.ones_like(mask)}))
        return Guided(self.teacher, guidance)(x, t, condition).x0 + self.unused


@pytest.mark.parametrize("process", ["vp", "flow", "trig"])
def test_the_guided_teacher_is_the_fixed_point(process: str) -> None:
    """A student that is the guided mixture for every scale has no loss; another has."""
    p = PROCESSES[process]
    teacher = Mixture([0.3, 0.3, 0.4], MEANS, [0.3, 0.4, 0.3], p)
    pipeline = FakePipeline(p, (2,), "x0", teacher=teacher, labels=3, networks={"student": lambda: GuidedInOne(teacher)})
    method, source = ready(pipeline, guidance_low=1.0, guidance_high=6.0), batches(pipeline, 32, ("0 1", "2"))
    exact = float(method.loss(next(source))["x0"].detach())
    method.student.network.unused.data.fill_(0.1)
    assert exact < 1e-9 < 1e-3 < float(method.loss(next(source))["x0"].detach())


def test_the_loss_by_hand() -> None:
    """Epsilon-prediction on a table, in the paper's w, from the table's own numbers."""
    pipeline = FakePipeline(TABLE, (3,), "eps")
    method, batch = ready(pipeline), next(batches(pipeline, 64))
    nn.init.normal_(method.student.network.told.weight)
    torch.manual_seed(5)
    loss = float(method.loss(batch)["x0"].detach())
    torch.manual_seed(5)
    index = (1000 * torch.rand(64)).long()
    w, eps = 2 + 12 * torch.rand(64), torch.randn(64, 3)
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[index]
    a, s = table.sqrt()[:, None], (1 - table).sqrt()[:, None]
    assert batch.latents is not None and (index < 999).all()  # at the last index the input would be noise alone
    x, t = (a * batch.latents + s * eps).float(), (index + 1) / 1000
    mask, null = batch.condition.inputs["components"], batch.condition.null.inputs["components"]
    with torch.no_grad():
        yes, no = (pipeline.base(x, t, which, None) for which in (mask, null))
        teacher = (x - s * ((1 + w[:, None]) * yes - w[:, None] * no)) / a
        student = (x - s * method.student.network(x, t, mask, w + 1)) / a
        expected = ((a / s).square().clamp_min(1) * (student - teacher).square()).mean()
    assert abs(loss / float(expected) - 1) < 1e-4


def test_it_is_sampled_as_the_teacher_is_with_the_scale_told() -> None:
    pipeline = FakePipeline(TABLE, (3,), default_guidance=7.5)
    method = ready(pipeline)
    assert method.sampler() == FewStep(even_times(50, TABLE), guidance=7.5) and method.sampler(8).steps == 8
    assert ready(pipeline, guidance=4.0).sampler().guidance == 4.0
    assert ready(FakePipeline(TABLE, (3,), default_guidance=1.0)).sampler().guidance == 3.0  # within what it was trained for
    spec = method.sampler().scheduler(TABLE, "v")
    assert spec.class_name == "DDIMScheduler" and spec.call["guidance_scale"] == 7.5
    with pytest.raises(UserError, match="1 to steps = 50 steps, not 51"):
        method.sampler(51)


def test_one_fixed_scale_needs_no_input() -> None:
    """The student is told nothing; its loss is its distance from the teacher guided by that scale."""
    pipeline = FakePipeline(TABLE, (3,))
    method = ready(pipeline, guidance_low=4.0, guidance_high=4.0, embed_guidance=False)
    assert not method.student.embeds_guidance and method.sampler().guidance == 1.0
    seen: list[Prediction] = []
    method.student.register_forward_hook(lambda module, args, prediction: seen.append(prediction))
    batch = next(batches(pipeline, 8))
    loss = float(method.loss(batch)["x0"].detach())
    (student,) = seen
    with torch.no_grad():
        goal = Guided(pipeline.frozen(), 4.0)(student.xt, student.t, batch.condition).x0
        expected = float((truncated_snr(TABLE, student.t, goal) * (student.x0 - goal).square()).mean())
    assert loss == pytest.approx(expected, rel=1e-5) and loss > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_low": 8.0, "guidance_high": 3.0}, "guidance_low = 8 must be at most guidance_high = 3"),
        ({"embed_guidance": False}, "learns one scale, but guidance_low = 3 and guidance_high = 15 are two"),
        ({"guidance": 20.0}, "guidance = 20 is outside .* guidance_low = 3 to guidance_high = 15"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceDistillation(**options)


def test_a_network_that_embeds_guidance_already_is_refused() -> None:
    with pytest.raises(UserError, match=r"input already.* guidance_low = 3 to guidance_high = 15; begin with progressive"):
        ready(FakePipeline(TABLE, (3,), embeds_guidance=True))


@pytest.mark.slow
def test_every_scale_of_a_mixture_is_learnt() -> None:
    """One network for the scales 1 to 5; its eight steps land where the guided teacher's eight steps do."""
    teacher = Mixture([0.3, 0.3, 0.4], MEANS, [0.3, 0.3, 0.3], PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (2,), "flow", teacher=teacher, labels=3, width=64)
    learn_teacher(pipeline, 1000)
    method = ready(pipeline, guidance_low=1.0, guidance_high=5.0)
    train(method, batches(pipeline, 128, ("0", "1", "2")), 2500, 3e-3)
    condition, noise = pipeline.encode_prompts(["0", "1", "2"] * 200), torch.randn(600, 2)
    # Measured 0.028, 0.038 and 0.088 apart; without guidance the goals are 0.10, 0.26 and 0.36 away.
    for scale, bound in ((1.5, 0.05), (3.0, 0.07), (4.5, 0.15)):
        with torch.no_grad():
            x = method.sampler(8).sample(method.trained, noise, condition, guidance=scale)
        goal = FewStep(even_times(8), guidance=scale).sample(teacher, noise, condition)
        unguided = FewStep(even_times(8)).sample(teacher, noise, condition)
        assert (x - goal).abs().mean() < bound < (unguided - goal).abs().mean()
