"""The second time input: no effect until it is trained, told through every wrapper, the role's own weights, in both modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastgen.analytic import Gaussian
from fastgen.denoiser import Condition, Guided, Retimed
from fastgen.errors import UserError
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.end_time import end_input
from fastgen.pipelines.tiny import builders
from fastgen.process import Flow
from fastgen.tangents import derivative
from tests.method_fakes import PROCESSES, TABLE, FakePipeline
from tests.tiny_models import PROMPTS, sd3, sd15

OTHERS = ("SanaPipeline", "QwenImagePipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline")


def wake(student: Any) -> None:
    torch.manual_seed(0)
    nn.init.normal_(student.end_input.leave.weight, std=0.3)


@pytest.mark.parametrize(("build", "mode"), [(sd15, "full"), (sd15, "lora"), (sd3, "lora")])
def test_on_a_diffusers_network(build: Any, mode: Any) -> None:
    pipeline = Pipeline.wrap(build(), roles={"student": mode}, lora=LoraOptions(rank=2), gradient_checkpointing=True)
    student, teacher = pipeline.trainable("student", end_time=True), pipeline.frozen()
    assert student.takes_end and not teacher.takes_end
    condition = pipeline.encode_prompts(list(PROMPTS[:2]))
    xt, t, end = torch.randn(2, *pipeline.latent_shape), torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.5])

    with torch.no_grad():
        base = teacher(xt, t, condition).output
        torch.testing.assert_close(student(xt, t, condition, end=end).output, base)
        wake(student)
        told = student(xt, t, condition, end=end).output
        assert (told[0] - base[0]).abs().max() > 1e-4
        # No step is what the network is told where nothing else is said.
        torch.testing.assert_close(student(xt, t, condition, end=t).output, student(xt, t, condition).output)
        torch.testing.assert_close(told[1], student(xt, t, condition).output[1])
        assert torch.equal(teacher(xt, t, condition).output, base), "the others on this base are told nothing"
    student(xt, t, condition, end=end).output.square().mean().backward()
    weights = dict(student.named_parameters())
    assert weights["end_input.leave.weight"].grad is not None and weights["end_input.enter.weight"].grad is not None
    assert all(weight.grad is None for weight in teacher.network.parameters() if not weight.requires_grad)
    assert {key.split(".")[0] for key in student.state_dict()} == {"own", "end_input"}
    twin = copy.deepcopy(student.end_input)
    assert twin is not None and twin.place == student.end_input.place  # type: ignore[union-attr]


def test_through_wrappers_and_groups() -> None:
    pipeline = FakePipeline(TABLE, (3,), "eps")
    student = pipeline.trainable("student", end_time=True)
    wake(student)
    condition = pipeline.encode_prompts(["0", "1"])
    xt, t, end = torch.randn(2, 3), torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.2])
    yes, no = (student(xt, t, c, end=end).output for c in (condition, Condition(condition.null.inputs)))  # type: ignore[union-attr]
    torch.testing.assert_close(Guided(student, 3.0)(xt, t, condition, end=end).output, no + 3 * (yes - no))
    # In another process the same two noise levels are meant.
    flow = Retimed(student, Flow())
    at, to = (Flow().time_at(TABLE.ratio(time.double())).float() for time in (t, end))
    alpha, sigma = TABLE.coefficients(t, xt)
    seen = flow(xt / (alpha + sigma), at, condition, end=to)
    torch.testing.assert_close(seen.eps, student(xt, t, condition, end=end).eps, rtol=1e-3, atol=1e-4)
    student.groups = lambda some: [torch.tensor([1]), torch.tensor([0])] if len(some) == 2 else []
    torch.testing.assert_close(student(xt, t, condition, end=end).output, yes)
    perfect = Gaussian(torch.zeros(3), 1.0, TABLE)
    for other, what in ((pipeline.frozen(), condition), (Guided(perfect, 1.0), perfect.unconditional(2))):
        with pytest.raises(ValueError, match="no input for the time at which a step ends"):
            other(xt, t, what, end=end)


@pytest.mark.parametrize("way", ["central", "semi"])
def test_the_derivative_sees_both_times(way: Any) -> None:
    """The span t - s grows with t, where s stays."""
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    student = pipeline.trainable("student", end_time=True)
    wake(student)
    student.double()
    condition, end = pipeline.encode_prompts(["0", "1"]), torch.tensor([0.4, 0.2]).double()
    x, t = torch.randn(2, 3).double(), torch.tensor([0.9, 0.5]).double()

    def both(x: Any, t: Any) -> Any:
        return student(x, t, condition, end=end).output

    exact = derivative(both, student, x, t, torch.zeros_like(x))
    found = derivative(both, student, x, t, torch.zeros_like(x), way=way, step=1e-5)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert exact.abs().max() > 1e-2


@pytest.mark.parametrize("name", OTHERS)
def test_where_other_networks_embed_the_time(name: str) -> None:
    """One module, called once with a row a sample."""
    pipeline = Pipeline.wrap(builders()[name]())
    found, seen = end_input(pipeline.network), []
    pipeline.network.get_submodule(found.place).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        xt = torch.randn(2, *pipeline.latent_shape)
        pipeline.frozen()(xt, torch.tensor([0.9, 0.5]), pipeline.encode_prompts(list(PROMPTS[:2])))
    assert seen == [(2, found.leave.out_features)]


def test_a_network_that_embeds_the_time_elsewhere_is_refused() -> None:
    with pytest.raises(UserError, match="Small has no embedding of the time that fastgen knows"):
        end_input(FakePipeline(TABLE, (3,)).base)
