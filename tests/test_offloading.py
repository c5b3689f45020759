"""Text encoders and autoencoder under group offload answer as before, and refuse what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from torch import nn

from fastgen.adapters import LoraOptions
from fastgen.data.encoding import free_text_encoders
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline, load_pipeline
from tests import tiny_models as tiny
from tests.tiny_models import PROMPTS


@pytest.fixture(scope="module", params=["toy", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / request.param
    getattr(tiny, request.param)().save_pretrained(path)
    return path


def is_offloaded(module: nn.Module) -> bool:
    return _get_top_level_group_offload_hook(module) is not None


def load(folder: Path, offload: str) -> Pipeline:
    return load_pipeline(str(folder), offload=offload, roles={"student": "lora"}, lora=LoraOptions(rank=2))  # type: ignore[arg-type]


def test_answers_are_the_same_and_the_base_trains(folder: Path) -> None:
    whole, offloaded = load(folder, "none"), load(folder, "encoders")
    parts = {name: part for name, part in offloaded.diffusers.components.items() if isinstance(part, nn.Module)}
    assert {name for name, part in parts.items() if is_offloaded(part)} == set(parts) - {offloaded.network_name}
    assert not any(is_offloaded(part) for part in whole.diffusers.components.values() if isinstance(part, nn.Module))
    torch.manual_seed(0)
    xt, t = torch.randn(2, *whole.latent_shape), torch.tensor([0.4, 0.9])
    conditions = [pipeline.encode_prompts(PROMPTS) for pipeline in (whole, offloaded)]
    answers = [p.frozen()(xt, t, c) for p, c in zip((whole, offloaded), conditions, strict=True)]
    assert torch.equal(answers[0].output, answers[1].output)
    with torch.no_grad():
        images = [pipeline.decode(xt) for pipeline in (whole, offloaded)]
        assert torch.equal(*images) and torch.equal(*(p.encode(images[0]) for p in (whole, offloaded)))
    student = offloaded.trainable("student")
    free_text_encoders(offloaded)
    student(xt, t, conditions[1]).x0.square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_gradients_through_an_offloaded_component_are_refused(folder: Path) -> None:
    pipeline = load(folder, "encoders")
    latents = torch.randn(1, *pipeline.latent_shape, requires_grad=True)
    with pytest.raises(UserError, match=r'offload = "encoders" moves the weights of the vae away .* set offload = "none"'):
        pipeline.decode(latents)
    load(folder, "none").decode(latents).sum().backward()
    assert latents.grad is not None and bool(latents.grad.any())
