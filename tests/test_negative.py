"""Negative prompts by attention (NASA): exact identities on tiny networks of real classes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.cli.sample import away
from fastgen.errors import UserError
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.negative import steered_away
from fastgen.pipelines.tiny import builders

STEERED = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline", "SanaPipeline"]


def wrapped(name: str, **options: Any) -> Pipeline:
    return Pipeline.wrap(builders()[name](), **options)


def call(pipeline: Pipeline, denoiser: Any, prompts: list[str]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(len(prompts), *pipeline.latent_shape, generator=generator)
    with torch.no_grad():
        return denoiser(xt, torch.full((len(prompts),), 0.9), pipeline.encode_prompts(prompts)).output


@pytest.mark.parametrize("name", STEERED)
def test_zero_changes_nothing_and_the_scale_is_continuous(name: str) -> None:
    pipeline = wrapped(name)
    denoiser, negative = pipeline.frozen(), pipeline.encode_prompts(["b"])
    prompts = ["a c", "d"]
    plain, outputs = call(pipeline, denoiser, prompts), {}
    for scale in (0.0, 1e-3, 0.5):
        with steered_away(denoiser, negative, pipeline.latent_shape, scale):
            outputs[scale] = call(pipeline, denoiser, prompts)
    assert torch.equal(outputs[0.0], plain) and torch.equal(call(pipeline, denoiser, prompts), plain)
    assert 0 < (outputs[1e-3] - plain).norm() < 0.1 * (outputs[0.5] - plain).norm()
    alone = pipeline.encode_prompts(["e"])
    with steered_away(denoiser, alone, pipeline.latent_shape, 0.5):
        assert not torch.equal(call(pipeline, denoiser, prompts), outputs[0.5])


@pytest.mark.parametrize("name", STEERED)
def test_away_from_the_prompt_itself_is_less_of_it(name: str) -> None:
    """K- = K+ and V- = V+ scale what every cross-attention hands to its output projection by 1 - a, exactly at the first."""
    pipeline = wrapped(name)
    denoiser, condition = pipeline.frozen(), pipeline.encode_prompts(["a c"])
    first: list[Tensor] = []
    cross = next(layer for key, layer in pipeline.network.named_modules() if key.endswith("attn2"))
    with cross.to_out[0].register_forward_hook(lambda module, args, output: first.append(args[0])):
        call(pipeline, denoiser, ["a c"])
        with steered_away(denoiser, condition, pipeline.latent_shape, 0.25):
            call(pipeline, denoiser, ["a c"])
    torch.testing.assert_close(first[-1], 0.75 * first[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", STEERED[:3])
def test_what_the_negative_prompt_finds_is_taken_away(name: str) -> None:
    """Z = Attention(Q, K+, V+) - a Attention(Q, K-, V-) at the first cross-attention, in softmaxes written out, with the masks
    of prompts of two lengths."""
    pipeline = wrapped(name)
    denoiser, prompts = pipeline.frozen(), ["a c e", "d"]
    layer: Any = next(layer for key, layer in pipeline.network.named_modules() if key.endswith("attn2"))
    asked: list[tuple[Any, ...]] = []
    projected: list[Tensor] = []

    def attention(states: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (layer.heads, -1)) for x in (layer.to_q(states), layer.to_k(text), layer.to_v(text)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        share = (scores if mask is None else scores + mask.view(len(mask), 1, 1, -1)).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", share, v).flatten(2)

    def look(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        asked.append((args[0] if args else given["hidden_states"], given["encoder_hidden_states"], given.get("attention_mask")))

    with layer.register_forward_pre_hook(look, with_kwargs=True):
        call(pipeline, denoiser, ["b d"])
        call(pipeline, denoiser, prompts)
    with (
        steered_away(denoiser, pipeline.encode_prompts(["b d"]), pipeline.latent_shape, 0.4),
        layer.to_out[0].register_forward_hook(lambda module, args, output: projected.append(args[0])),
    ):
        call(pipeline, denoiser, prompts)
    (_, negative, blind), (states, positive, mask) = asked
    with torch.no_grad():
        found = attention(states, positive, mask)
        away = attention(states, negative.expand(2, -1, -1), None if blind is None else blind.expand(2, -1, -1))
    torch.testing.assert_close(projected[-1], found - 0.4 * away, rtol=1e-4, atol=1e-5)
    assert (found - away).abs().max() > 1e-2


def test_an_adapted_student_is_steered_by_its_own_weights() -> None:
    pipeline = wrapped("StableDiffusionPipeline", roles={"student": "lora"}, lora=LoraOptions(rank=2))
    student, teacher, negative = pipeline.trainable("student"), pipeline.frozen(), pipeline.encode_prompts(["b"])
    with steered_away(student, negative, pipeline.latent_shape, 0.3):
        same, base = call(pipeline, student, ["a"]), call(pipeline, teacher, ["a"])
    torch.testing.assert_close(same, base)
    with torch.no_grad():
        for key, weight in student.named_parameters():
            if "to_k.lora_B" in key or "to_v.lora_B" in key:
                weight.normal_()
    with steered_away(student, negative, pipeline.latent_shape, 0.3):
        moved = call(pipeline, student, ["a"])
    assert not torch.allclose(moved, base, atol=1e-4)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_joint_attention_is_refused(name: str) -> None:
    pipeline = wrapped(name)
    negative = pipeline.encode_prompts(["b"])
    with (
        pytest.raises(UserError, match=r"Transformer2DModel has no cross-attention to text"),
        steered_away(pipeline.frozen(), negative, pipeline.latent_shape, 0.3),
    ):
        pass


def test_the_command_steers_students_without_guidance_alone() -> None:
    pipeline = wrapped("StableDiffusionPipeline")
    denoiser, asked = pipeline.frozen(), Namespace(negative_prompt="b", negative_scale=0.5)
    plain = call(pipeline, denoiser, ["a"])
    with away(asked, pipeline, denoiser, 1.0):
        assert not torch.equal(call(pipeline, denoiser, ["a"]), plain)
    with away(Namespace(negative_prompt=None), pipeline, denoiser, 7.5):
        assert torch.equal(call(pipeline, denoiser, ["a"]), plain)
    with pytest.raises(UserError, match=r"--negative-prompt is for students sampled without guidance.*guidance 7"):
        away(asked, pipeline, denoiser, 7.5)
