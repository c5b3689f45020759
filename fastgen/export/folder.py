"""A whole diffusers pipeline folder with the student in the network's place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ClassifierFreeGuidance
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from fastgen.adapters import Adapter, without_adapters
from fastgen.denoiser import Denoiser
from fastgen.export.custom_pipeline import custom_name, stock_or_custom, write_pipeline_file
from fastgen.export.directory import describe, metadata, new_directory, write_description
from fastgen.export.lora import require_adapter
from fastgen.export.model_card import write_card
from fastgen.export.scheduler import stock_scheduler
from fastgen.pipelines import Pipeline
from fastgen.pipelines.gamma_flow import FILE
from fastgen.pipelines.probing import GUIDERS
from fastgen.samplers import Sampler


def export_folder(
    pipeline: Pipeline,
    student: Denoiser,
    sampler: Sampler,
    output: Path,
    *,
    record: Mapping[str, Any],
    format: str = "diffusers",
) -> Path:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads; see `fastgen.export.export`."""
    stock, gamma = stock_or_custom(student, sampler)
    spec, scheduler, call = stock_scheduler(pipeline, student, stock)
    whole = copy.copy(pipeline.diffusers)
    whole.register_modules(**{pipeline.network_name: merged(student), "scheduler": scheduler})
    # A pipeline with guiders guides by them alone; of those there are, the plain one does what our sampler does.
    scale = 1.0 if student.embeds_guidance else getattr(sampler, "guidance", 1.0)
    guider = None if scale == 1 else ClassifierFreeGuidance(guidance_scale=scale)
    whole.register_modules(**dict.fromkeys((name for name in GUIDERS if name in whole.components), guider))
    description = describe(pipeline, student, sampler, format, spec=spec, call=call, record=record)
    custom = gamma is not None or student.end_input is not None
    if custom:
        description["custom_pipeline"] = {"file": FILE, "class": custom_name(pipeline, gamma)}
    with new_directory(output) as folder:
        whole.save_pretrained(folder, safe_serialization=True)
        for file in (folder / pipeline.network_name).glob("*.safetensors"):
            _label(file, metadata(description))
        if custom:
            write_pipeline_file(pipeline, student, sampler, gamma, folder)
        write_description(folder, description)
        write_card(pipeline, description, folder, output)
    return output


def export_fused(pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, *, record: Mapping[str, Any]) -> Path:
    """Write what `export_folder` writes, of a student that is a LoRA, whose weights it adds to the base's.

    Raises UserError for a student that has nothing to add.
    """
    require_adapter(student, "fused")
    return export_folder(pipeline, student, sampler, output, record=record, format="fused")


def merged(student: Denoiser) -> nn.Module:
    """The student's network by itself: of a student with LoRA, a copy of the base with the adapter added to its weights."""
    if not isinstance(student.own, Adapter):
        return student.network
    network = copy.deepcopy(student.network)
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.merge(adapter_names=[student.own.key])
    return without_adapters(network)


def _label(file: Path, labels: dict[str, str]) -> None:
    """Add `labels` to the header of a safetensors file."""
    partial = file.with_suffix(".partial")
    save_file(load_file(file), partial, metadata=labels)
    partial.replace(file)
