"""Families whose prompts have masks, schedulers or encoders of their own, against the pipelines themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, SD3Transformer2DModel

from fastgen.denoiser import Condition, Guided
from fastgen.pipelines import Pipeline
from fastgen.pipelines.autoencoding import decode_latents, encode_images
from fastgen.pipelines.check import relative, watch
from fastgen.pipelines.recording import step_time
from fastgen.pipelines.tiny import builders
from fastgen.pipelines.tiny.encoders import PROMPTS
from fastgen.pipelines.tiny.unets import BETAS, sd15
from fastgen.process import VP
from fastgen.samplers import FewStep

SIZE: dict[str, Any] = {"height": 64, "width": 64}
BOUND = 1e-5


def sd21() -> Any:
    """Stable Diffusion 2.1: v-prediction, linear projections."""
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    return sd15(scheduler=scheduler, use_linear_projection=True, attention_head_dim=(2, 4))


def sd35() -> Any:
    """Stable Diffusion 3.5: normalised queries and keys, a second attention in the first blocks."""
    pipeline = builders()["StableDiffusion3Pipeline"]()
    config = {**pipeline.transformer.config, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    network = SD3Transformer2DModel.from_config(config)
    pipeline.register_modules(transformer=network.eval())
    return pipeline


def named(name: str) -> Callable[[], Any]:
    return lambda: builders()[name]()


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1.5": named("StableDiffusionPipeline"),
    "sd2.1": sd21,
    "sd3.5": sd35,
    "sana": named("SanaPipeline"),
    "pixart-alpha": named("PixArtAlphaPipeline"),
    "pixart-sigma": named("PixArtSigmaPipeline"),
    "hunyuan-dit": named("HunyuanDiTPipeline"),
    "kolors": named("KolorsPipeline"),
    "chroma": named("ChromaPipeline"),
}
OWN_GRID = ("sd3.5", "sana", "kolors", "chroma")
"""Those whose own scheduler is a deterministic first-order one; the others get DDIM, as one samples them in few steps."""


@functools.cache
def family(name: str) -> tuple[Any, Pipeline, Condition]:
    torch.manual_seed(0)
    diffusers = FAMILIES[name]()
    diffusers.set_progress_bar_config(disable=True)
    if name not in OWN_GRID:
        options = {"timestep_spacing": "trailing", "clip_sample": False}
        diffusers.scheduler = DDIMScheduler.from_config(diffusers.scheduler.config, **options)
    pipeline = Pipeline.wrap(diffusers, **SIZE)
    return diffusers, pipeline, pipeline.encode_prompts(PROMPTS)


def run(name: str, guidance: float = 4.0, **options: Any) -> Any:
    """What a user's run hands its scheduler, and what it returns."""
    diffusers, _, _ = family(name)
    binning = {} if name in ("sd1.5", "sd2.1", "sd3.5", "kolors", "chroma") else {"use_resolution_binning": False}
    usual = {**SIZE, **binning, "guidance_scale": guidance, "output_type": "latent", "return_dict": False}
    return watch(diffusers, PROMPTS, **(usual | options))


def times_of(diffusers: Any, pipeline: Pipeline) -> tuple[float, ...]:
    """The grid of the run that has just ended, as our times."""
    if isinstance(pipeline.process, VP):
        return tuple(pipeline.process.time(diffusers.scheduler.timesteps.double()).tolist())
    return tuple(diffusers.scheduler.sigmas[:-1].double().tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_scheduler_gets(name: str) -> None:
    _, pipeline, condition = family(name)
    assert len(condition) == len(condition.null or []) == 2
    for guidance in (1.0, 4.0):
        seen, _ = run(name, guidance, num_inference_steps=3)
        guided = Guided(pipeline.frozen(), guidance)
        assert len(seen) == 3
        for step in seen:
            t = torch.full((2,), step_time(pipeline.process, step.timestep, step.level), dtype=torch.float64)
            with torch.no_grad():
                ours = guided(step.sample, t, condition).output
            theirs = step.output[:, : ours.shape[1]]  # Some hand over a variance too.
            assert relative(ours, theirs) < BOUND
            assert relative(theirs[:1], theirs[1:]) > 1e-3  # Two prompts, two answers.
        with torch.no_grad():
            assert relative(guided(step.sample, t, condition[[1, 0]]).output, ours) > BOUND


@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_reproduces_the_pipeline(name: str) -> None:
    diffusers, pipeline, condition = family(name)
    noise = torch.randn(2, *pipeline.latent_shape)
    _, (latents, *_) = run(name, latents=noise.clone(), num_inference_steps=4)
    with torch.no_grad():
        ours = FewStep(times_of(diffusers, pipeline), guidance=4.0).sample(pipeline.frozen(), noise, condition)
    assert relative(ours, latents) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels(name: str) -> None:
    _, pipeline, _ = family(name)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = pipeline.encode(images)
    assert latents.shape == (2, *pipeline.latent_shape)
    with torch.no_grad():
        expected = decode_latents(pipeline.autoencoder, encode_images(pipeline.autoencoder, images))
        assert relative(pipeline.decode(latents), expected) < BOUND
        seen, (drawn, *_) = run(name, 1.0, num_inference_steps=2, output_type="np")
        ours = (pipeline.decode(seen[-1].after) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(ours, torch.as_tensor(drawn).movedim(-1, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["sana", "pixart-alpha", "hunyuan-dit", "kolors"])
def test_prompts_of_different_lengths_do_not_disturb_each_other(name: str) -> None:
    _, pipeline, condition = family(name)
    xt, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([0.4, 0.9])
    guided = Guided(pipeline.frozen(), 4.0)
    mixed = Condition.cat([pipeline.encode_prompts([prompt]) for prompt in PROMPTS])
    with torch.no_grad():
        together = guided(xt, t, condition).output
        assert relative(guided(xt, t, mixed).output, together) < BOUND
        for i in range(2):
            one = guided(xt[i : i + 1], t[i : i + 1], mixed[[i]]).output
            assert relative(one, together[i : i + 1]) < BOUND
