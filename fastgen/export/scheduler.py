"""From a sampler to the stock diffusers scheduler, with its config, and the arguments of the pipeline's call."""

from __future__ import annotations

import inspect
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
    return spec, scheduler, _call(pipeline, spec)


def _call(pipeline: Pipeline, spec: SchedulerSpec) -> dict[str, Any]:
    name = type(pipeline.diffusers).__name__
    known = inspect.signature(type(pipeline.diffusers).__call__).parameters
    call = dict(spec.call)
    if "sigmas" in call and "sigmas" not in known and "timesteps" in known:
        call["timesteps"] = [sigma * spec.config["num_train_timesteps"] for sigma in call.pop("sigmas")]
    call["guidance_scale"] -= pipeline.form.guidance_offset
    if "guidance_scale" not in known:
        guidance = call.pop("guidance_scale")
        if pipeline.embeds_guidance and "distilled_guidance_scale" in known:
            call["distilled_guidance_scale"] = guidance
    elif guidance_argument(pipeline.diffusers) == "true_cfg_scale" and not pipeline.embeds_guidance:
        call["true_cfg_scale"] = call.pop("guidance_scale")
    for key in call:
        if key not in known:
            raise UserError(f"{name} takes no {key!r}, which this sampler needs; choose evenly spaced times for the student")
    sizes = {"height": pipeline.height, "width": pipeline.width}
    return call | {key: value for key, value in sizes.items() if value is not None and key in known}
