"""Transformer families with conditions of varying length or guidance of their own kind, against the pipelines themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Guided
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline
from fastgen.pipelines.tiny import transformers as tiny
from fastgen.samplers import FewStep

PROMPTS = ["a red cube", "two blue rings on a dark floor"]
SIZE = {"height": 64, "width": 64}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen-image": tiny.qwen_image,
    "z-image": tiny.z_image,
    "flux2-dev": tiny.flux2,
    "flux2-klein": tiny.flux2_klein,
    "lumina2": tiny.lumina2,
    "hunyuan-image": tiny.hunyuan_image,
    "hunyuan-image-distilled": lambda: tiny.hunyuan_image(guided=False),
    "aura-flow": tiny.aura_flow,
    "cogview4": tiny.cogview4,
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def run(diffusers: Any, pipeline: Pipeline, guidance: float, **options: Any) -> tuple[list[tuple[Tensor, Tensor, float]], Any]:
    """A user's run at our scale: for each step the output, the sample and the noise level; and what is returned."""
    diffusers.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"guidance_scale": guidance - pipeline.form.guidance_offset}
    if isinstance(diffusers, tiny.QwenImagePipeline):
        arguments = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(PROMPTS)}
    elif isinstance(diffusers, tiny.HunyuanImagePipeline):
        arguments = {"distilled_guidance_scale": guidance}
        if diffusers.guider is not None:
            diffusers.guider.guidance_scale = guidance
    seen: list[tuple[Tensor, Tensor, float]] = []
    scheduler, original = diffusers.scheduler, diffusers.scheduler.step

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **rest: Any) -> Any:
        seen.append((model_output, sample, float(scheduler.sigmas[len(seen)])))
        return original(model_output, timestep, sample, **rest)

    scheduler.step = step
    try:
        drawn = diffusers(prompt=list(PROMPTS), **arguments, **SIZE, **options).images
        # FLUX.2 klein alone hands out the autoencoder's latents.
        klein = isinstance(diffusers, tiny.Flux2KleinPipeline) and options["output_type"] == "latent"
        return seen, pipeline.pack(drawn) if klein else drawn
    finally:
        del scheduler.step


def unpacked(name: str, noise: Tensor) -> Tensor:
    """FLUX.2 takes a user's noise before it is packed."""
    return noise.transpose(1, 2).unflatten(2, (4, 4)) if name.startswith("flux2") else noise


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_scheduler_gets(name: str, guidance: float) -> None:
    diffusers = FAMILIES[name]()
    pipeline = Pipeline.wrap(diffusers, **SIZE)
    seen, _ = run(diffusers, pipeline, guidance, num_inference_steps=3, output_type="latent")
    together = pipeline.encode_prompts(PROMPTS)
    guided = Guided(pipeline.frozen(), guidance)
    assert len(seen) == 3
    for output, sample, sigma in seen:
        with torch.no_grad():
            ours = guided(sample, torch.full((2,), sigma), together).output
        assert relative(ours, output) < 1e-5
    assert relative(seen[0][0][:1], seen[0][0][1:]) > 1e-4  # Two prompts, two answers.


@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_reproduces_the_pipeline(name: str) -> None:
    diffusers = FAMILIES[name]()
    pipeline = Pipeline.wrap(diffusers, **SIZE)
    noise = torch.randn(2, *pipeline.latent_shape)
    options = {"latents": unpacked(name, noise.clone()), "num_inference_steps": 4, "output_type": "latent"}
    _, latents = run(diffusers, pipeline, 4.0, **options)
    sampler = FewStep(tuple(diffusers.scheduler.sigmas[:-1].double().tolist()), guidance=4.0)
    with torch.no_grad():
        ours = sampler.sample(pipeline.frozen(), noise, pipeline.encode_prompts(PROMPTS))
    assert relative(ours, latents) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels(name: str) -> None:
    diffusers = FAMILIES[name]()
    pipeline = Pipeline.wrap(diffusers, **SIZE)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = pipeline.encode(images)
    assert latents.shape == (2, *pipeline.latent_shape)
    vae, frames = diffusers.vae, images.unsqueeze(2) if name == "qwen-image" else images
    with torch.no_grad():
        expected = vae.decode(vae.encode(frames).latent_dist.mode(), return_dict=False)[0]
    expected = expected.squeeze(2) if name == "qwen-image" else expected
    assert relative(pipeline.decode(latents), expected) < 1e-5

    noise = torch.randn(2, *pipeline.latent_shape)
    drawn = []
    for kind in ("latent", "pt"):
        options = {"latents": unpacked(name, noise.clone()), "num_inference_steps": 2, "output_type": kind}
        drawn.append(run(diffusers, pipeline, 1.0, **options)[1])
    assert torch.allclose((pipeline.decode(drawn[0]) / 2 + 0.5).clamp(0, 1), drawn[1], atol=1e-5)


def handed_over(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    forward = network.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(network, "forward", watched)
    return calls


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "lumina2", "hunyuan-image"])
def test_cached_prompts_mix_into_the_batch_that_the_pipeline_would_make(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.wrap(FAMILIES[name](), **SIZE)
    others = ["b", "three small green squares left of a wheel"]
    first, second = pipeline.encode_prompts([PROMPTS[0], others[0]]), pipeline.encode_prompts([others[1], PROMPTS[1]])
    mixed = Condition.cat([first, second])[[0, 3]]
    together = pipeline.encode_prompts(PROMPTS)
    xt, t = torch.randn(2, *pipeline.latent_shape), torch.full((2,), 0.7)
    calls = handed_over(pipeline.network, monkeypatch)
    with torch.no_grad():
        outputs = [Guided(pipeline.frozen(), 4.0)(xt, t, condition).output for condition in (mixed, together)]
        alone = pipeline.frozen()(xt, t, mixed).output
    assert relative(outputs[0], outputs[1]) < 1e-5
    key = "cap_feats" if name == "z-image" else "encoder_hidden_states"
    assert [x.shape for x in calls[0][key]] == [x.shape for x in calls[1][key]]
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            one = pipeline.frozen()(xt[i : i + 1], t[:1], pipeline.encode_prompts([prompt])).output
        assert relative(alone[i : i + 1], one) < 1e-5


def test_qwen_gets_a_mask_only_where_prompts_differ_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.wrap(tiny.qwen_image(), **SIZE)
    calls = handed_over(pipeline.network, monkeypatch)
    xt, t = torch.randn(2, *pipeline.latent_shape), torch.full((2,), 0.7)
    condition = pipeline.encode_prompts(["short", "a longer prompt"])
    calls.clear()
    with torch.no_grad():
        pipeline.frozen()(xt, t, condition)
        pipeline.frozen()(xt, t, condition[[0, 0]])
    mask, none = (call["encoder_hidden_states_mask"] for call in calls)
    assert mask.sum(1).tolist() == condition.inputs["encoder_hidden_states"]["lengths"].tolist() and none is None
    assert calls[1]["encoder_hidden_states"].shape[1] < calls[0]["encoder_hidden_states"].shape[1]


def test_without_a_mask_each_length_is_a_call_of_its_own() -> None:
    pipeline = Pipeline.wrap(tiny.cogview4(), **SIZE)
    parts = [pipeline.encode_prompts([prompt]) for prompt in PROMPTS]
    mixed = Condition.cat([parts[1], parts[0], parts[1]])
    assert mixed.inputs["encoder_hidden_states"]["lengths"].tolist() == [32, 16, 32]
    xt, t = torch.randn(3, *pipeline.latent_shape), torch.tensor([0.2, 0.5, 0.9])
    layers = pipeline.feature_layers
    with torch.no_grad():
        prediction = Guided(pipeline.frozen(), 4.0)(xt, t, mixed, features=layers)
        for i, part in enumerate((parts[1], parts[0], parts[1])):
            one = Guided(pipeline.frozen(), 4.0)(xt[i : i + 1], t[i : i + 1], part, features=layers)
            assert relative(prediction.output[i : i + 1], one.output) < 1e-5
            for layer in layers:
                assert relative((prediction.features or {})[layer][i : i + 1], (one.features or {})[layer]) < 1e-5


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "cogview4"])
def test_dropped_prompts_are_as_long_as_the_empty_one(name: str) -> None:
    pipeline = Pipeline.wrap(FAMILIES[name](), **SIZE)
    condition = pipeline.encode_prompts(PROMPTS)
    assert condition.null is not None
    dropped = condition.dropout(torch.tensor([True, False]))
    xt, t = torch.randn(2, *pipeline.latent_shape), torch.full((2,), 0.7)
    with torch.no_grad():
        output = pipeline.frozen()(xt, t, dropped).output
        for i, part in enumerate((condition.null[[0]], condition[[1]])):
            assert relative(output[i : i + 1], pipeline.frozen()(xt[i : i + 1], t[:1], part).output) < 1e-5


def test_defaults_are_the_pipelines_in_our_convention() -> None:
    expected = {"qwen-image": 4.0, "z-image": 6.0, "flux2-dev": 4.0, "hunyuan-image": 3.5, "lumina2": 4.0}
    found = {name: Pipeline.wrap(FAMILIES[name](), **SIZE).default_guidance for name in expected}
    assert found == expected


def test_a_student_guides_as_its_pipeline_does() -> None:
    pipeline = Pipeline.wrap(tiny.qwen_image(), **SIZE)
    condition, t = pipeline.encode_prompts(PROMPTS), torch.full((2,), 0.7)
    xt = torch.randn(2, *pipeline.latent_shape)
    with torch.no_grad():
        ours, teachers = (Guided(each, 4.0)(xt, t, condition) for each in (pipeline.trainable("student"), pipeline.frozen()))
        plain = pipeline.frozen()(xt, t, condition).output
    assert relative(ours.output, teachers.output) < 1e-6
    assert torch.allclose(ours.output.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4)


def test_guidance_without_an_unconditional_twin_is_refused() -> None:
    pipeline = Pipeline.wrap(tiny.aura_flow(), **SIZE)
    condition = pipeline.encode_prompts(PROMPTS)
    condition.null = None
    xt, t = torch.randn(2, *pipeline.latent_shape), torch.full((2,), 0.7)
    with pytest.raises(UserError, match="needs an unconditional twin"):
        Guided(pipeline.frozen(), 4.0)(xt, t, condition)
