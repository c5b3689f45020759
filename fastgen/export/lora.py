"""A student's LoRA beside the scheduler that samples it: in diffusers' format, in kohya-ss' and in ComfyUI's.

In each the scale alpha / rank is in the weights, so the LoRA is right at strength 1. diffusers takes that scale where a file
names none; the others want it written, an `.alpha` that equals the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgen.adapters import Adapter
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export.directory import describe, metadata, new_directory, write_description
from fastgen.export.layouts import Factors, Layout, layout_of, original_lora
from fastgen.export.model_card import write_card
from fastgen.export.scheduler import stock_scheduler
from fastgen.pipelines import Pipeline
from fastgen.pipelines.base import base_dtype
from fastgen.samplers import Sampler

KOHYA_MODULES = {
    "UNet2DConditionModel": "networks.lora",
    "SD3Transformer2DModel": "networks.lora_sd3",
    "FluxTransformer2DModel": "networks.lora_flux",
    "ChromaTransformer2DModel": "networks.lora_flux",
}
"""The part of sd-scripts that trains a LoRA of such a network, by which its loaders know the file."""


def export_lora(pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, *, record: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` and `scheduler/`; see `fastgen.export.export`."""
    adapter = require_adapter(student, "diffusers-lora")
    save = getattr(pipeline.diffusers, "save_lora_weights", None)
    if save is None:
        name = type(pipeline.diffusers).__name__
        raise UserError(f"{name} loads no LoRA; export the student with the format 'diffusers', which merges it")
    spec, scheduler, call = stock_scheduler(pipeline, student, sampler)
    description = describe(pipeline, student, sampler, "diffusers-lora", spec=spec, call=call, record=record)
    labels = metadata(description)

    def write(weights: dict[str, Tensor], path: str) -> None:
        save_file(weights, path, metadata=labels)

    with new_directory(output) as folder:
        layers = lora_weights(adapter, base_dtype(student.network))
        save(folder, **{f"{pipeline.network_name}_lora_layers": layers}, save_function=write)
        scheduler.save_pretrained(folder / "scheduler")
        write_description(folder, description)
        write_card(pipeline, description, folder, output)
    return output


def export_kohya(pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, *, record: Mapping[str, Any]) -> Path:
    """Write `NAME.safetensors`, a LoRA with the keys of kohya-ss' sd-scripts, and `scheduler/`; NAME is the output's.

    Raises UserError for a family that sd-scripts does not train under names known here.
    """
    return _export_renamed(pipeline, student, sampler, output, record, "kohya")


def export_comfyui(pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, *, record: Mapping[str, Any]) -> Path:
    """Write `NAME.safetensors`, a LoRA with keys that ComfyUI loads, and `scheduler/`; NAME is the output's.

    For a UNet those are kohya-ss' keys, for a transformer the names of ComfyUI's own layers behind `diffusion_model.`.
    """
    return _export_renamed(pipeline, student, sampler, output, record, "comfyui")


def _export_renamed(
    pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, record: Mapping[str, Any], format: str
) -> Path:
    adapter = require_adapter(student, format)
    layout = layout_of(pipeline, student.network, format)
    spec, scheduler, call = stock_scheduler(pipeline, student, sampler)
    weights = renamed_lora(layout, student, adapter, dotted=format == "comfyui" and layout.network != "UNet2DConditionModel")
    file = f"{output.name}.safetensors"
    # diffusers has no converter for an SD3 LoRA under original names.
    readable = layout.network != "SD3Transformer2DModel"
    description = describe(
        *(pipeline, student, sampler, format), spec=spec, call=call, record=record, file=file, in_diffusers=readable
    )
    rank = str(adapter.options.rank)
    labels = {"ss_network_module": KOHYA_MODULES[layout.network], "ss_network_dim": rank, "ss_network_alpha": rank}
    with new_directory(output) as folder:
        save_file(weights, folder / file, metadata=metadata(description) | labels)
        scheduler.save_pretrained(folder / "scheduler")
        write_description(folder, description)
        write_card(pipeline, description, folder, output)
    return output


def renamed_lora(layout: Layout, student: Denoiser, adapter: Adapter, *, dotted: bool) -> dict[str, Tensor]:
    """Down, up and alpha of each layer: "diffusion_model.a.b.lora_up.weight" where `dotted`, else "lora_unet_a_b..."."""
    layers = lora_factors(adapter, base_dtype(student.network))
    if dotted or layout.kohya_original:
        layers = original_lora(layout, student.network, layers)
    result: dict[str, Tensor] = {}
    for name, (down, up) in layers.items():
        key = f"diffusion_model.{name}" if dotted else f"lora_unet_{name.replace('.', '_')}"
        result |= {f"{key}.lora_down.weight": down.contiguous(), f"{key}.lora_up.weight": up.contiguous()}
        result[f"{key}.alpha"] = torch.tensor(float(len(down)), dtype=torch.float32)
    return result


def require_adapter(student: Denoiser, format: str) -> Adapter:
    """The student's LoRA. Raises UserError for a student that has none, so cannot have the format."""
    if not isinstance(student.own, Adapter):
        raise UserError(
            f"a student trained with full weights has no LoRA for the format {format!r}: export it with the format "
            "'diffusers', or train it with roles.student = \"lora\""
        )
    return student.own


def lora_weights(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two factors of every adapted layer, named as diffusers names them, with alpha / rank in the second one."""
    options = adapter.options
    scale = 1.0 if options.alpha is None else options.alpha / options.rank
    weights: dict[str, Tensor] = {}
    for key, value in adapter.state_dict().items():
        scaled = value.detach() * (scale if ".lora_B." in key else 1.0)
        weights[key.replace("_vector.weight", "_vector")] = scaled.to(device="cpu", dtype=dtype).contiguous()
    return weights


def lora_factors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Factors]:
    """The same by layer: down [r, in, ...] and up [out, r, ...]. Raises UserError for DoRA, which has a third part."""
    if adapter.options.dora:
        raise UserError("a DoRA has magnitudes, which only diffusers' LoRA format holds: export it as diffusers-lora or fused")
    weights = lora_weights(adapter, dtype)
    names = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    return {name: (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for name in names}
