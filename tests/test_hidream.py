"""HiDream's mixture of experts learns, whatever mode its network is in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.pipelines import HiDream, LoraOptions, Pipeline, tiny


def ready(mode: Any = "full") -> Pipeline:
    torch.manual_seed(0)
    pipeline = Pipeline.wrap(tiny.builders()["HiDreamImagePipeline"](), roles={"student": mode}, lora=LoraOptions(rank=2))
    assert isinstance(pipeline, HiDream)
    return pipeline


@pytest.mark.parametrize("training", [True, False])
def test_experts_learn(training: bool) -> None:
    pipeline = ready()
    student, condition = pipeline.trainable("student").train(training), pipeline.encode_prompts(["a", "b c"])
    xt, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([0.9, 0.4])
    output = student(xt, t, condition).output
    torch.testing.assert_close(output, pipeline.frozen()(xt, t, condition).output)
    output.square().sum().backward()
    experts = {name: weight for name, weight in student.named_parameters() if ".experts." in name or ".gate." in name}
    assert len(experts) > 8 and all(weight.grad is not None for weight in student.parameters())
    assert all(float(weight.grad.abs().sum()) > 0 for weight in experts.values())


def test_gradients_pass_through_frozen_experts() -> None:
    """Against a difference, in double precision but for what the network itself casts; discriminators need it."""
    pipeline = ready("lora")
    pipeline.network.double()
    teacher, condition = pipeline.frozen(), pipeline.encode_prompts(["a"])
    xt, t = torch.randn(1, *pipeline.latent_shape, dtype=torch.float64, requires_grad=True), torch.tensor([0.6])
    condition, along, step = condition.to(dtype=torch.float64), torch.randn_like(xt), 1e-4
    (gradient,) = torch.autograd.grad(teacher(xt, t, condition).output.square().sum(), xt)
    with torch.no_grad():
        ends = [teacher(xt + sign * step * along, t, condition).output.square().sum() for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((gradient * along).sum(), expected, rtol=1e-2, atol=1e-3)
