"""Exports that are loaded and sampled as we do, without fastgen: a pipeline folder, a LoRA for its base, or one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export.directory import read_export
from fastgen.export.folder import export_folder, export_fused
from fastgen.export.lora import export_comfyui, export_kohya, export_lora
from fastgen.export.phases import export_phases
from fastgen.export.single_file import export_single_file
from fastgen.export.trained import in_words, require_own_call, require_trained
from fastgen.pipelines import Pipeline
from fastgen.pipelines.experts import Experts
from fastgen.samplers import Sampler

__all__ = ["FORMATS", "export", "read_export", "require_own_call", "require_trained"]

FORMATS: dict[str, Callable[..., Path]] = {
    "diffusers": export_folder,
    "diffusers-lora": export_lora,
    "kohya": export_kohya,
    "comfyui": export_comfyui,
    "fused": export_fused,
    "single-file": export_single_file,
}
"""What writes each format; docs/export.md says what is in it."""


def export(
    pipeline: Pipeline,
    student: Denoiser,
    sampler: Sampler,
    output: Path,
    *,
    format: str = "diffusers",
    record: Mapping[str, Any] | None = None,
    trained: Sampler | None = None,
    force: bool = False,
) -> Path:
    """Write `student`, sampled by `sampler`, to the folder `output` in one of `FORMATS`, and return that folder.

    `record` is kept in the export as JSON; of its keys the model card knows `method`, `base` (the teacher's folder or hub
    name), `teacher_loras` (a list of files), `updates`, `averaged`, `prompt`, `samples` (a PNG, which is copied) and
    `evaluation` (a record of `fastgen eval`). A previous export at `output` is replaced. `trained` is the sampler that the
    student was trained with, where that is known: without `force` no other is taken, with it the card warns.

    Raises UserError for a format that the student or its family cannot have, for a sampler that was not trained or that no
    stock scheduler reproduces, and for an output that holds anything else or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"export format {format!r} is not known; it must be one of {', '.join(FORMATS)}")
    kept = dict(record or {})
    if trained is not None and sampler != trained:
        if not force:
            require_trained(sampler, trained)
        kept["forced"] = f"trained for {in_words(trained)}, exported with {in_words(sampler)}"
    if isinstance(student, Experts):
        return export_phases(FORMATS[format], pipeline, student, sampler, Path(output), format=format, record=kept)
    return FORMATS[format](pipeline, student, sampler, Path(output), record=kept)
