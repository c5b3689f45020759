"""From a sampler to the stock diffusers scheduler, with its config, and the arguments of the pipeline's call."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import diffusers
import torch

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline
from fastgen.pipelines.probing import guidance_argument
from fastgen.process import VP
from fastgen.samplers import Sampler, SchedulerSpec


def stock_scheduler(pipeline: Pipeline, student: Denoiser, sampler: Sampler) -> tuple[SchedulerSpec, Any, dict[str, Any]]:
    """The sampler's scheduler as a spec and as an object, and the arguments with which the pipeline has to be called.

    What the sampler leaves open comes from the pipeline's own scheduler. Raises UserError where diffusers has no such scheduler
    or the pipeline does not take the arguments that it needs.
    """
    spec = sampler.scheduler(student.process, student.kind)
    scheduler_class: Any = getattr(diffusers, spec.class_name)
    # Every value explicitly: for what the base left at its defaults, `from_config` would take the other class's.
    known = inspect.signature(scheduler_class.__init__).parameters
    values = {**pipeline.diffusers.scheduler.config, **spec.config}
    scheduler = scheduler_class(**{key: value for key, value in values.items() if key in known})
    if isinstance(student.process, VP):
        angles = VP(scheduler.alphas_cumprod).angles
        if angles.shape != student.process.angles.shape or not torch.allclose(angles, student.process.angles, atol=1e-3):
            base = type(pipeline.diffusers.scheduler).__name__
            raise UserError(f"{spec.class_name}, which this sampler needs, cannot be given the noise table of {base}")
    return spec, scheduler, _call(pipeline, student, spec)


def _call(pipeline: Pipeline, student: Denoiser, spec: SchedulerSpec) -> dict[str, Any]:
    name = type(pipeline.diffusers).__name__
    known = inspect.signature(type(pipeline.diffusers).__call__).parameters
    call = dict(spec.call)
    if "sigmas" in call and "sigmas" not in known and "timesteps" in known:
        call["timesteps"] = [sigma * spec.config["num_train_timesteps"] for sigma in call.pop("sigmas")]
    if "sigmas" in call and type(pipeline).network_time is not Pipeline.network_time:
        # Such a pipeline tells its network whole timesteps, which it takes beside the levels.
        times = pipeline.network_time(torch.tensor(call["sigmas"], dtype=torch.float64))
        call["timesteps"] = [round(float(time)) for time in times]
    call |= _guidance(pipeline, student, call.pop("guidance_scale"), known)
    for key in call:
        if key not in known:
            raise UserError(f"{name} takes no {key!r}, which this sampler needs; choose evenly spaced times for the student")
    sizes = {"height": pipeline.height, "width": pipeline.width}
    if "use_resolution_binning" in known:
        call["use_resolution_binning"] = False  # The student was trained at just this size, not at one near by.
    return call | {key: value for key, value in sizes.items() if value is not None and key in known}


def _guidance(pipeline: Pipeline, student: Denoiser, scale: float, known: Collection[str]) -> dict[str, Any]:
    """The arguments with which the pipeline guides as the sampler does; none where a guider of its own does it."""
    own = scale - pipeline.form.guidance_offset
    embeds = student.embeds_guidance
    if "guidance_scale" not in known:
        return {"distilled_guidance_scale": own} if embeds and "distilled_guidance_scale" in known else {}
    asked = guidance_argument(pipeline.diffusers) == "true_cfg_scale"
    unguided = pipeline.form.guides == "single" and scale != 1
    if embeds or not (asked or unguided):
        return {"guidance_scale": own}
    if "true_cfg_scale" not in known:
        name = type(pipeline.diffusers).__name__
        raise UserError(f"{name} never guides, so it has no sampler with guidance {scale:g}; train the student to need none")
    # Without a negative prompt, even an empty one, there is no guidance in silence.
    return {"true_cfg_scale": own, **({"negative_prompt": ""} if scale != 1 else {})}
