"""What a sweep compares: pipelines, and the ways to call them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline

from fastgen.errors import UserError
from fastgen.eval.protocol import plain_config
from fastgen.eval.results import Row
from fastgen.eval.weights import file_hash
from fastgen.export.directory import MARK, read_export
from fastgen.samplers import SchedulerSpec

Source: TypeAlias = Path | str | DiffusionPipeline
TEACHER_STEPS = (50, 8, 4, 2, 1)


@dataclass(frozen=True)
class Setting:
    """One way to call a pipeline: steps, guidance (diffusers convention, 1 = off; None: the pipeline's own), more arguments.

    `scheduler` takes the place of the pipeline's own; its config is completed from that one's.
    """

    steps: int
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    scheduler: SchedulerSpec | None = None


@dataclass(frozen=True)
class Candidate:
    """A pipeline (diffusers folder or object) and the settings to try. Candidates of the same name are one curve."""

    name: str
    source: Source
    role: Literal["teacher", "student"]
    settings: tuple[Setting, ...]


def teacher(
    source: Source,
    *,
    steps: Iterable[int] = TEACHER_STEPS,
    guidance: float | Iterable[float] | None = None,
    name: str = "teacher",
) -> Candidate:
    """A pipeline with the scheduler it came with, at each of `steps`, with each of the guidance scales."""
    scales = [guidance] if guidance is None or isinstance(guidance, int | float) else list(guidance)
    numbers = list(steps)
    return Candidate(name, source, "teacher", tuple(Setting(number, scale) for scale in scales for number in numbers))


def student(folder: Path | str, *, steps: Iterable[int] | None = None, name: str | None = None) -> Candidate:
    """An export, called as its `fastgen.json` says, at the steps it was made for or at each of `steps`.

    Raises UserError where the folder is no export, or its timesteps are listed one by one and others are asked for.
    """
    folder = Path(folder)
    description = read_export(folder)
    own, call = int(description["sampler"]["steps"]), dict(description["call"])
    guidance = call.pop("guidance_scale", None)
    listed = sorted(call.keys() & {"timesteps", "sigmas"})
    call.pop("num_inference_steps", None)
    wanted = [own] if steps is None else list(steps)
    if listed and (others := [number for number in wanted if number != own]):
        raise UserError(f"{folder / MARK} lists {listed[0]} for {own} steps alone; export the student again for {others[0]}")
    return Candidate(name or folder.name, folder, "student", tuple(Setting(number, guidance, call) for number in wanted))


def row_of(candidate: Candidate, setting: Setting, fingerprint: str) -> Row:
    """The row of a candidate and a setting before anything is measured; its folder's name tells both apart from all others."""
    call = json.dumps(dict(setting.call), sort_keys=True, default=repr)
    chosen = None if setting.scheduler is None else asdict(setting.scheduler)
    sampler = {"call": json.loads(call), **({"scheduler": chosen} if chosen else {})}
    identity = [fingerprint, candidate.name, setting.steps, setting.guidance, sampler]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()[:16]
    slug = "-".join(re.findall(r"\w+", candidate.name)) or "candidate"
    folder = f"images/{slug}-{setting.steps:03d}-{digest}"
    return Row(candidate.name, candidate.role, setting.steps, setting.guidance, 0.0, 0.0, {}, folder, digest, sampler)


def fingerprint(source: Source) -> str:
    """A hash of the weights and settings of a pipeline, so that rows of weights that have changed since are seen.

    Raises UserError for a folder that is no pipeline.
    """
    digest = hashlib.sha256()
    if isinstance(source, DiffusionPipeline):
        digest.update(json.dumps(plain_config(source.scheduler), sort_keys=True).encode())
        modules = {name: part for name, part in source.components.items() if isinstance(part, torch.nn.Module)}
        for key, value in sorted(torch.nn.ModuleDict(modules).state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    folder = Path(source)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    for path in sorted([*folder.rglob("*.safetensors"), *folder.glob("*/*.json")]):
        digest.update(f"{path.relative_to(folder)} {file_hash(path)}".encode())
    return digest.hexdigest()
