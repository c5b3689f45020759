"""Running a diffusers pipeline up to its first scheduler step, to see what its network is given and its scheduler handed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.denoiser import map_tensors
from fastgen.errors import UserError
from fastgen.pipelines.autoencoding import autoencoder
from fastgen.pipelines.guidance import PROBE_GUIDANCE

PROBE_LATENTS = 16
PROBE_PROMPT = "a far longer prompt " * 8
PROBE_FRAMES = 9

# Components of a pipeline that hold a guidance scale of their own.
GUIDERS = ("guider", "ocr_guider")

# Where pipelines keep by how much the autoencoder shrinks height and width.
FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")


class _FirstStep(Exception):
    """The pipeline has reached its scheduler: everything has been seen."""


@dataclass(frozen=True)
class Recording:
    """What happened before the first scheduler step."""

    calls: list[dict[str, Any]]
    outputs: list[Any]
    handed: Tensor
    sample: Tensor
    timestep: Tensor
    level: float | None


@dataclass(frozen=True)
class Probe:
    """What was seen of a pipeline: three prompts at full size, two (or one) through the real network, a long prompt, and a step
    that tells the scale of time. `alone`: one prompt a call. `pixels`: the height and width of the full size.
    """

    full: Recording
    real: Recording
    long: Recording
    timed: Recording
    alone: bool
    pixels: tuple[int, int]


def record(
    pipeline: Any,
    network: nn.Module,
    prompts: Sequence[str],
    *,
    height: int | None,
    width: int | None,
    pretend: bool = False,
    after: int = 0,
    frames: int | None = None,
    alone: bool = False,
) -> Recording:
    """Run `pipeline` with guidance on up to its first scheduler step, or the one after so many.

    With `pretend`, zeros answer in the network's place. `frames` is the number of a video's, by default the pipeline's own.
    `alone`: the pipeline is given the only prompt by itself, not a list of it.
    """
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    index = after
    calls: list[dict[str, Any]] = []
    outputs: list[Any] = []
    reached: dict[str, Any] = {}
    forward, step = network.forward, pipeline.scheduler.step
    signature = inspect.signature(forward)

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        calls.append(arguments)
        answer = (
            map_tensors(functools.partial(_no_answer, network), _samples(next(iter(arguments.values()))))
            if pretend
            else answered(forward(*args, **(kwargs | {"return_dict": False})))
        )
        outputs.append(answer)
        return Transformer2DModelOutput(sample=answer)

    @functools.wraps(step)
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal after
        if after:
            after -= 1
            calls.clear()
            outputs.clear()
            return step(*args, **kwargs)
        reached.update(inspect.signature(step).bind(*args, **kwargs).arguments)
        raise _FirstStep

    guiders = [guider for name in GUIDERS if (guider := getattr(pipeline, name, None)) is not None]
    with ExitStack() as stack:
        stack.enter_context(_replaced(network, "forward", watched_forward))
        stack.enter_context(_replaced(pipeline.scheduler, "step", watched_step))
        for guider in guiders:
            stack.enter_context(_replaced(guider, "guidance_scale", PROBE_GUIDANCE))
        stack.enter_context(_quiet(pipeline))
        try:
            pipeline(**_call_arguments(pipeline, prompts[0] if alone else list(prompts), height, width, frames))
        except _FirstStep:
            pass
        finally:
            pipeline.maybe_free_model_hooks()
    if not calls or not reached:
        raise UserError(f"{type(pipeline).__name__} calls no network and scheduler in the usual way; it cannot be distilled")
    sigmas = getattr(pipeline.scheduler, "sigmas", None)
    level = None if sigmas is None else float(sigmas[index])
    timestep = torch.as_tensor(reached["timestep"]).flatten()[0]
    return Recording(calls, outputs, reached["model_output"], reached["sample"], timestep, level)


def answered(output: Any) -> Any:
    """What a network answered without `return_dict`: most put it into a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _samples(given: Any) -> Any:
    """The noisy latents, out of the lists in which some networks take them among other pictures."""
    return [each[-1] for each in given] if isinstance(given, list) and isinstance(given[0], list) else given


def _no_answer(network: Any, sample: Tensor) -> Tensor:
    """Zeros in the shape of what `network` answers to `sample`: twice the channels where it predicts a variance too."""
    config = network.config
    channels, out = config.get("in_channels"), config.get("out_channels")
    doubled = bool(config.get("learn_sigma")) or (channels is not None and out == 2 * channels)
    zeros = torch.zeros_like(sample)
    return torch.cat([zeros, zeros], 1) if doubled else zeros


def _call_arguments(
    pipeline: Any, prompts: str | list[str], height: int | None, width: int | None, frames: int | None
) -> dict[str, Any]:
    wanted = {
        "prompt": prompts,
        "height": height,
        "width": width,
        "num_frames": frames,
        "use_resolution_binning": False,
        "use_kv_cache": False,
        "pag_scale": 0.0,
        "num_inference_steps": 2,
        "guidance_scale": PROBE_GUIDANCE,
        "distilled_guidance_scale": PROBE_GUIDANCE,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    known = inspect.signature(type(pipeline).__call__).parameters
    if guidance_argument(pipeline) == "true_cfg_scale":
        empty = "" if isinstance(prompts, str) else [""] * len(prompts)
        wanted |= {"true_cfg_scale": PROBE_GUIDANCE, "negative_prompt": empty, "guidance_scale": None}
    if "prompt" not in known:
        raise UserError(f"{type(pipeline).__name__} takes no prompt; only text-conditioned pipelines can be distilled")
    return {key: value for key, value in wanted.items() if key in known and value is not None}


def guidance_argument(pipeline: Any) -> str:
    """By which argument the pipeline guides unless it is told otherwise."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("true_cfg_scale")
    usual = parameter is not None and isinstance(parameter.default, (int, float)) and parameter.default > 1
    return "true_cfg_scale" if usual else "guidance_scale"


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    from diffusers import DiffusionPipeline

    stages = [pipeline, *(part for part in vars(pipeline).values() if isinstance(part, DiffusionPipeline))]
    before = [getattr(stage, "_progress_bar_config", {}) for stage in stages]
    for stage, settings in zip(stages, before, strict=True):
        stage._progress_bar_config = {**settings, "disable": True}
    try:
        yield
    finally:
        for stage, settings in zip(stages, before, strict=True):
            stage._progress_bar_config = settings


@contextmanager
def silent() -> Iterator[None]:
    """Probing is no user's doing, so nobody is warned of the odd prompts it takes."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(each, each.get_verbosity()) for each in (diffusers_logging, transformers_logging)]
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)


def sample_and_time(network: nn.Module) -> tuple[str, str]:
    """What a network calls its noisy latents and its time."""
    names = list(inspect.signature(network.forward).parameters)
    return names[0], "timestep" if "timestep" in names else names[1]


def probe(pipeline: Any, network: nn.Module, height: int | None, width: int | None) -> Probe:
    """See a pipeline at work; with one prompt at a time where it takes, or manages, no more."""
    try:
        return _probe(pipeline, network, height, width, alone=False)
    except UserError:
        raise
    except Exception as problem:
        try:
            return _probe(pipeline, network, height, width, alone=True)
        except Exception:
            raise problem from None


def _probe(pipeline: Any, network: nn.Module, height: int | None, width: int | None, alone: bool) -> Probe:
    def see(prompts: Sequence[str], **options: Any) -> Recording:
        size = {"height": height, "width": width, "pretend": True}
        return record(pipeline, network, prompts[:1] if alone else prompts, **size | options, alone=alone)

    full = see(["a", "b c", "d"])
    pixels = _pixels(pipeline, full.sample, height, width)
    small = PROBE_LATENTS * max(_vae_factor(pipeline), 8)
    real = see(["a", "b c"], height=min(pixels[0], small), width=min(pixels[1], small), pretend=False, frames=PROBE_FRAMES)
    long = see([PROBE_PROMPT])
    tells = torch.as_tensor(real.calls[0][sample_and_time(network)[1]]).any()
    # A time that runs the other way starts at 0, which tells no scale.
    return Probe(full, real, long, real if tells else see(["a"], after=1), alone, pixels)


def _pixels(pipeline: Any, sample: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    """The resolution of a recorded call in pixels."""
    if height and width:
        return height, width
    factor = _vae_factor(pipeline)
    if sample.ndim >= 4:
        return height or sample.shape[-2] * factor, width or sample.shape[-1] * factor
    known = inspect.signature(type(pipeline).__call__).parameters
    default = getattr(pipeline, "default_sample_size", PROBE_LATENTS) * factor
    return height or known["height"].default or default, width or known["width"].default or default


def _vae_factor(pipeline: Any) -> int:
    """By how much the autoencoder shrinks height and width; 1 where there is none."""
    if autoencoder(pipeline) is None:
        return 1
    return next((int(getattr(pipeline, name)) for name in FACTORS if hasattr(pipeline, name)), 8)
