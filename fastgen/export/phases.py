"""A student of several networks, one for each phase of its steps: the weights of each, and a card that says who is next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.export.directory import MARK, new_directory, read_export, write_description
from fastgen.export.folder import merged
from fastgen.export.model_card import CARD, write_card
from fastgen.pipelines import Pipeline
from fastgen.pipelines.experts import Experts
from fastgen.samplers import Sampler

FORMATS = ("diffusers", "fused", "diffusers-lora")
SWITCH = "callback_on_step_end"
"""The argument of a diffusers pipeline's call with which its network is changed between two steps."""


def export_phases(
    write: Callable[..., Path],
    pipeline: Pipeline,
    student: Experts,
    sampler: Sampler,
    output: Path,
    *,
    format: str,
    record: Mapping[str, Any],
) -> Path:
    """Write the folders `phase-1`, `phase-2`, ... by `write`, which writes the `format`; see `fastgen.export.export`.

    Of a whole pipeline only the first is one; the others hold their network. Raises UserError for other formats than these and
    diffusers' LoRA, and for a pipeline whose network cannot be changed between steps.
    """
    name = type(pipeline.diffusers).__name__
    if format not in FORMATS:
        raise UserError(f"a student of several networks cannot have the format {format!r}, but {', '.join(FORMATS)}")
    if SWITCH not in inspect.signature(type(pipeline.diffusers).__call__).parameters:
        raise UserError(f"{name} takes no {SWITCH}, by which its experts would follow each other; train with experts = false")
    folders = [f"phase-{i + 1}" for i in range(len(student.experts))]
    with new_directory(output) as folder:
        for i, expert in enumerate(student.experts):
            if i and format != "diffusers-lora":
                network: Any = merged(expert)
                network.save_pretrained(folder / folders[i] / pipeline.network_name, safe_serialization=True)
            else:
                write(pipeline, expert, sampler, folder / folders[i], record={})
        description = read_export(folder / folders[0]) | {"record": dict(record)}
        description["base"]["name"] = record.get("base", "")
        description["phases"] = [folders[student.expert_at(time)] for time in getattr(sampler, "times", ())]
        for each in folders:  # none is an export by itself
            for file in (CARD, MARK):
                (folder / each / file).unlink(missing_ok=True)
        write_description(folder, description)
        write_card(pipeline, description, folder, output)
    return output
