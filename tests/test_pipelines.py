"""The recorded pipelines against the pipelines themselves: what reaches the scheduler, final latents, pixels, refusals."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from fastgen.denoiser import Condition, Guided
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline
from fastgen.process import VP, Flow
from fastgen.samplers import FewStep, even_times
from tests import tiny_models as tiny
from tests.tiny_models import BETAS, PROMPTS


def trailing(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, steps_offset=1, **options)


MODELS: dict[str, Callable[[], Any]] = {
    "sd15-pndm": tiny.sd15,
    "sd15-ddim": lambda: tiny.sd15(scheduler=trailing()),
    "sd15-v": lambda: tiny.sd15(scheduler=trailing(prediction_type="v_prediction")),
    "sd15-euler": lambda: tiny.sd15(scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1)),
    "sd15-lcm": lambda: tiny.sd15(scheduler=trailing(), time_cond_proj_dim=16),
    "toy": tiny.toy,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux-dev": tiny.flux,
    "flux-schnell": lambda: tiny.flux(guidance=False),
    "chroma": tiny.chroma,
}
PACKED = ("flux", "chroma")
SIZE = {"height": 64, "width": 64}


def size_of(name: str) -> dict[str, int]:
    """FLUX's default resolution is fixed at 1024; the others' is tiny already."""
    return SIZE if name.startswith(PACKED) else {}


def guided_by(name: str, guidance: float) -> dict[str, Any]:
    """FLUX.1 schnell guides only when asked with a negative prompt."""
    if name == "flux-schnell":
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * len(PROMPTS)}
    return {"guidance_scale": guidance}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def watch(diffusers: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """Run a pipeline as a user would; what it handed its scheduler at each step, and its final latents."""
    seen: list[dict[str, Any]] = []
    scheduler, original = diffusers.scheduler, diffusers.scheduler.step

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True, **options: Any) -> Any:
        network_sample = sample
        if hasattr(scheduler, "scale_model_input"):
            network_sample = scheduler.scale_model_input(sample, timestep)
        seen.append({"output": model_output, "timestep": timestep, "sample": network_sample})
        return original(model_output, timestep, sample, return_dict=return_dict, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "step", step)
        latents = diffusers(prompt=PROMPTS, output_type="latent", **arguments).images
    return seen, latents


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_scheduler_gets(name: str, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = MODELS[name]()
    pipeline = Pipeline.wrap(diffusers, **size_of(name))
    seen, _ = watch(diffusers, monkeypatch, num_inference_steps=3, **guided_by(name, guidance), **size_of(name))
    condition = pipeline.encode_prompts(PROMPTS)
    guided = Guided(pipeline.frozen(), guidance)
    assert len(seen) >= 3
    for step in seen:
        t = pipeline.process.time(torch.full((2,), float(step["timestep"]), dtype=torch.float64))
        with torch.no_grad():
            output = guided(step["sample"], t, condition).output
        assert relative(output, step["output"]) < 1e-5
    assert relative(seen[0]["output"][:1], seen[0]["output"][1:]) > 1e-4  # Two prompts, two answers.


@pytest.mark.parametrize("name", ["sd15-ddim", "sd15-v", "toy", "sdxl", "sd3", "flux-dev", "flux-schnell"])
def test_sampler_reproduces_the_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = 4.0
    diffusers = MODELS[name]()
    pipeline = Pipeline.wrap(diffusers, **size_of(name))
    noise = torch.randn(2, *pipeline.latent_shape)
    _, latents = watch(
        diffusers, monkeypatch, latents=noise.clone(), num_inference_steps=4, **guided_by(name, guidance), **size_of(name)
    )
    if isinstance(pipeline.process, VP):
        times = even_times(4, pipeline.process)
    else:
        times = tuple((diffusers.scheduler.timesteps.double() / 1000).tolist())
    sampler = FewStep(times, guidance=guidance)
    with torch.no_grad():
        ours = sampler.sample(pipeline.frozen(), noise, pipeline.encode_prompts(PROMPTS))
    assert relative(ours, latents) < 1e-4


@pytest.mark.parametrize("name", ["toy", "sdxl", "sd3", "flux-dev", "chroma"])
def test_pixels(name: str) -> None:
    diffusers = MODELS[name]()
    pipeline = Pipeline.wrap(diffusers, **size_of(name))
    pixels = 32 if name == "toy" else 64
    images = torch.rand(2, 3, pixels, pixels) * 2 - 1
    latents = pipeline.encode(images)
    assert latents.shape == (2, *pipeline.latent_shape)
    with torch.no_grad():
        expected = diffusers.vae.decode(diffusers.vae.encode(images).latent_dist.mode(), return_dict=False)[0]
    assert relative(pipeline.decode(latents), expected) < 1e-5

    noise = torch.randn(2, *pipeline.latent_shape)
    options = {"prompt": PROMPTS, "num_inference_steps": 2, **size_of(name)}
    final = diffusers(latents=noise.clone(), output_type="latent", **options).images
    drawn = diffusers(latents=noise.clone(), output_type="pt", **options).images
    assert torch.allclose((pipeline.decode(final) / 2 + 0.5).clamp(0, 1), drawn, atol=1e-5)

    latents.requires_grad_(True)
    pipeline.decode(latents).square().sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_latent_statistics() -> None:
    diffusers = tiny.sdxl()
    diffusers.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 2.0, 0.5, 1.0])
    pipeline = Pipeline.wrap(diffusers)
    latents = torch.randn(2, *pipeline.latent_shape)
    options = {"prompt": PROMPTS, "num_inference_steps": 2}
    final = diffusers(latents=latents.clone(), output_type="latent", **options).images
    drawn = diffusers(latents=latents.clone(), output_type="pt", **options).images
    assert torch.allclose((pipeline.decode(final) / 2 + 0.5).clamp(0, 1), drawn, atol=1e-5)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = diffusers.vae.decode(diffusers.vae.encode(images).latent_dist.mode(), return_dict=False)[0]
    assert relative(pipeline.decode(pipeline.encode(images)), expected) < 1e-5


def test_the_process_is_the_schedulers() -> None:
    toy, sd3, flux = Pipeline.wrap(tiny.toy()), Pipeline.wrap(tiny.sd3()), Pipeline.wrap(tiny.flux(), **SIZE)
    assert isinstance(toy.process, VP) and toy.kind == "v"
    assert float(toy.process.alpha(torch.tensor(1.0, dtype=torch.float64))) < 1e-12  # Zero terminal signal is honoured.
    assert isinstance(sd3.process, Flow) and sd3.kind == "flow" and not sd3.embeds_guidance
    assert Pipeline.wrap(tiny.flux(guidance=False), **SIZE).default_guidance == 1.0
    assert flux.embeds_guidance and flux.default_guidance == 3.5 and sd3.default_guidance == 7.0
    assert flux.form.time_scale == 1e-3 and flux.latent_shape == (16, 16)
    assert Pipeline.wrap(tiny.sd15()).kind == "eps"


def test_forms() -> None:
    guides = {name: Pipeline.wrap(MODELS[name](), **size_of(name)).form for name in ("toy", "flux-dev", "chroma", "sd15-lcm")}
    assert {name: form.guides for name, form in guides.items()} == {
        **{"toy": "batched", "flux-dev": "single", "chroma": "paired", "sd15-lcm": "single"}
    }
    assert guides["sd15-lcm"].embeds_guidance and not guides["sd15-lcm"].takes_guidance


def test_many_prompts_are_encoded_as_one_by_one() -> None:
    pipeline = Pipeline.wrap(tiny.sdxl())
    prompts = [f"cube {i}" for i in range(19)]
    many = pipeline.encode_prompts(prompts)
    one = pipeline.encode_prompts([prompts[17]])
    assert len(many) == len(many.null or []) == 19
    ours, theirs = many[[17]], one
    assert relative(ours.inputs["encoder_hidden_states"], theirs.inputs["encoder_hidden_states"]) < 1e-5
    assert relative(ours.inputs["added_cond_kwargs"]["text_embeds"], theirs.inputs["added_cond_kwargs"]["text_embeds"]) < 1e-5
    assert torch.equal(many.dropout(torch.ones(19, dtype=torch.bool)).inputs["encoder_hidden_states"], torch.zeros(19, 32, 64))


def test_resolution_is_part_of_the_condition() -> None:
    pipeline = Pipeline.wrap(tiny.sdxl())
    wide = pipeline.encode_prompts(PROMPTS, height=64, width=128)
    assert wide.inputs["added_cond_kwargs"]["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * 2
    flux = Pipeline.wrap(tiny.flux(), **SIZE)
    assert len(flux.encode_prompts(PROMPTS).shared["img_ids"]) == 16
    assert len(flux.encode_prompts(PROMPTS, height=64, width=128).shared["img_ids"]) == 32


def test_null_without_guidance_is_the_empty_prompt() -> None:
    pipeline = Pipeline.wrap(tiny.flux(guidance=False), **SIZE)
    condition = pipeline.encode_prompts(PROMPTS)
    empty = pipeline.encode_prompts([""])
    assert condition.null is not None
    for key in ("encoder_hidden_states", "pooled_projections"):
        assert torch.equal(condition.null.inputs[key], empty.inputs[key].expand_as(condition.null.inputs[key]))


def test_wrapping_leaves_the_pipeline_and_the_random_state_alone() -> None:
    diffusers = tiny.sd15()
    diffusers.set_progress_bar_config(leave=False)
    before = torch.get_rng_state()
    pipeline = Pipeline.wrap(diffusers)
    pipeline.encode_prompts(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)
    assert "forward" not in vars(diffusers.unet) and "step" not in vars(diffusers.scheduler)
    assert diffusers._progress_bar_config == {"leave": False}


def test_learned_variance_is_dropped() -> None:
    scheduler = DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=False, steps_offset=1)
    diffusers = tiny.sd15(scheduler=scheduler, out_channels=8)
    pipeline = Pipeline.wrap(diffusers)
    xt, t, condition = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), pipeline.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = pipeline.frozen()(xt, t, condition).output
        theirs = diffusers.unet(xt, 499, condition.inputs["encoder_hidden_states"]).sample
    assert theirs.shape[1] == 8 and relative(ours, theirs[:, :4]) < 1e-6


def test_learned_variance_is_dropped_before_guidance() -> None:
    from fastgen.pipelines.tiny.prompted_transformers import pixart

    pipeline = Pipeline.wrap(pixart(), height=64, width=64)
    assert (pipeline.form.guides, pipeline.form.learns_variance) == ("batched", True)
    condition, xt, t = pipeline.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        assert pipeline.frozen()(xt, t, condition).output.shape == xt.shape


def test_learning_a_pipeline_prints_nothing_and_leaves_the_loggers_alone() -> None:
    seen: list[str] = []
    watching = logging.Handler()
    watching.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(watching)
        each.setLevel(logging.WARNING)
    try:
        diffusers = tiny.sd15()
        seen.clear()
        pipeline = Pipeline.wrap(diffusers)
        assert seen == [] and [each.level for each in loggers] == [logging.WARNING] * 2
        pipeline.encode_prompts(["a prompt of the user's that is far too long " * 8])
        assert any("truncated" in each for each in seen)
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.removeHandler(watching)
            each.setLevel(level)


def test_half_precision_networks_get_what_they_can_read() -> None:
    pipeline = Pipeline.wrap(tiny.sd3().to(dtype=torch.bfloat16))
    condition = pipeline.encode_prompts(PROMPTS).to(dtype=torch.float32)
    prediction = pipeline.frozen()(torch.randn(2, 16, 8, 8), torch.full((2,), 0.5), condition)
    assert prediction.output.dtype == torch.bfloat16 and prediction.x0.dtype == torch.float32


@pytest.mark.parametrize("name", ["toy", "sd3", "flux-dev"])
def test_roles_in_full(name: str) -> None:
    pipeline = Pipeline.wrap(MODELS[name](), **size_of(name))
    teacher, student = pipeline.frozen(), pipeline.trainable("student")
    condition, xt = pipeline.encode_prompts(PROMPTS), torch.randn(2, *pipeline.latent_shape)
    t = torch.tensor([0.3, 0.9])
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in student.parameters())
    prediction = student(xt, t, condition, features=pipeline.feature_layers)
    assert torch.equal(prediction.output, teacher(xt, t, condition).output)
    assert set(prediction.features or {}) == set(pipeline.feature_layers) and pipeline.feature_layers
    prediction.x0.square().mean().backward()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1e-2 * torch.randn_like(p))
    assert relative(student(xt, t, condition).output, teacher(xt, t, condition).output) > 1e-4
    assert all(p.grad is None for p in teacher.parameters())


def test_guidance_embedding_starts_as_the_teacher_and_means_what_diffusers_means() -> None:
    diffusers = tiny.toy()
    pipeline = Pipeline.wrap(diffusers)
    student = pipeline.trainable("student", guidance_embedding=True)
    condition, xt, t = pipeline.encode_prompts(PROMPTS), torch.randn(2, 6, 8, 8), torch.tensor([0.4, 1.0])
    plain = pipeline.frozen()(xt, t, condition).output
    assert student.embeds_guidance and relative(Guided(student, 5.0)(xt, t, condition).output, plain) < 1e-6
    with torch.no_grad():
        student.network.time_embedding.cond_proj.weight.normal_()
    output = Guided(student, 5.0)(xt, t, condition).output
    assert relative(output, plain) > 1e-3

    diffusers.unet = student.network
    noise = torch.randn(2, 6, 8, 8)
    theirs = diffusers(
        prompt=PROMPTS, latents=noise.clone(), num_inference_steps=2, guidance_scale=5.0, output_type="latent"
    ).images
    ours = FewStep(even_times(2, pipeline.process), guidance=5.0).sample(student, noise, condition)
    assert relative(ours, theirs) < 1e-4


def test_guidance_embedding_where_it_cannot_be() -> None:
    with pytest.raises(UserError, match="merge one fixed guidance"):
        Pipeline.wrap(tiny.toy(), roles={"student": "lora"}).trainable("student", guidance_embedding=True)
    with pytest.raises(UserError, match="SD3Transformer2DModel has no input for a guidance scale"):
        Pipeline.wrap(tiny.sd3()).trainable("student", guidance_embedding=True)
    assert Pipeline.wrap(tiny.flux(), **SIZE).trainable("student", guidance_embedding=True).embeds_guidance


def test_pipelines_that_cannot_be_distilled() -> None:
    from diffusers import DDPMPipeline, EDMEulerScheduler, UNet2DModel

    unconditional = UNet2DModel(
        **{"sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1},
        **{"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    )
    with pytest.raises(UserError, match="takes no prompt"):
        Pipeline.wrap(DDPMPipeline(unconditional, DDPMScheduler()))
    with pytest.raises(UserError, match="neither a variance-preserving nor a flow-matching"):
        Pipeline.wrap(tiny.sdxl(scheduler=EDMEulerScheduler()))
    with pytest.raises(UserError, match='must be "full" or "lora", not \'lra\''):
        Pipeline.wrap(tiny.toy(), roles={"student": "lra"})


def test_an_output_that_is_changed_on_its_way_is_refused() -> None:
    class Negated(StableDiffusionPipeline):
        @functools.wraps(StableDiffusionPipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            step = self.scheduler.step
            self.scheduler.step = lambda model_output, timestep, sample, **rest: step(-model_output, timestep, sample, **rest)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler.step = step

    with pytest.raises(UserError, match="in an unknown way"):
        Pipeline.wrap(Negated(**tiny.toy().components, requires_safety_checker=False))


def test_conditions_survive_the_disk(tmp_path: Path) -> None:
    condition = Pipeline.wrap(tiny.sdxl()).encode_prompts(PROMPTS)
    condition.save(tmp_path / "condition.safetensors")
    again: Condition = condition[[0, 0]].load(tmp_path / "condition.safetensors")
    assert torch.equal(again.inputs["added_cond_kwargs"]["text_embeds"], condition.inputs["added_cond_kwargs"]["text_embeds"])
