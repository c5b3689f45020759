"""A student's LoRA in diffusers' own format, beside the scheduler that samples it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastgen.adapters import Adapter
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export.directory import describe, metadata, new_directory, write_description
from fastgen.export.model_card import model_card
from fastgen.export.scheduler import stock_scheduler
from fastgen.pipelines import Pipeline
from fastgen.pipelines.base import base_dtype
from fastgen.samplers import Sampler


def export_lora(pipeline: Pipeline, student: Denoiser, sampler: Sampler, output: Path, *, record: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` and `scheduler/`; see `fastgen.export.export`.

    The scale alpha / rank is in the weights, so the LoRA is right at the scale 1.0 that diffusers takes by default.
    """
    name = type(pipeline.diffusers).__name__
    if not isinstance(student.own, Adapter):
        raise UserError(
            "a student trained with full weights has no LoRA: export it with the format 'diffusers', "
            'or train it with roles.student = "lora"'
        )
    save = getattr(pipeline.diffusers, "save_lora_weights", None)
    if save is None:
        raise UserError(f"{name} loads no LoRA; export the student with the format 'diffusers', which merges it")
    spec, scheduler, call = stock_scheduler(pipeline, student, sampler)
    description = describe(name, "diffusers-lora", sampler, spec, call, record)
    labels = metadata(description)

    def write(weights: dict[str, Tensor], path: str) -> None:
        save_file(weights, path, metadata=labels)

    with new_directory(output) as folder:
        layers = lora_weights(student.own, base_dtype(student.network))
        save(folder, **{f"{pipeline.network_name}_lora_layers": layers}, save_function=write)
        scheduler.save_pretrained(folder / "scheduler")
        write_description(folder, description)
        card = model_card(pipeline, description, output)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return output


def lora_weights(adapter: Adapter, dtype: Any) -> dict[str, Tensor]:
    """The two factors of every adapted layer, named as diffusers names them, with alpha / rank in the second one."""
    options = adapter.options
    scale = 1.0 if options.alpha is None else options.alpha / options.rank
    return {
        key: (value.detach() * (scale if ".lora_B." in key else 1.0)).to(device="cpu", dtype=dtype).contiguous()
        for key, value in adapter.state_dict().items()
    }
