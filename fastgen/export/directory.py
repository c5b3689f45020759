"""An export's folder: written aside and renamed, marked as ours by `fastgen.json`, and read back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import diffusers

from fastgen import __version__
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export.origin import base_hash, shift_of, timesteps_of
from fastgen.pipelines import Pipeline
from fastgen.pipelines.quantization import quantization_of
from fastgen.samplers import Sampler, SchedulerSpec

MARK = "fastgen.json"


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A fresh folder beside `output` that takes its place when the block ends well and vanishes when it does not.

    Raises UserError where `output` is neither free, empty, nor a previous export, and where it cannot be written.
    """
    output = output.absolute()
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / MARK).is_file())):
        raise UserError(f"{output} holds something that is not an export; name a new folder, or an export to be replaced")
    fresh = output.with_name(f".{output.name}.{os.getpid()}.partial")
    former = output.with_name(f".{output.name}.{os.getpid()}.former")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if output.exists():
            output.rename(former)
        fresh.rename(output)
    except OSError as problem:
        raise UserError(f"the export {output} cannot be written: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if former.exists() and not output.exists():
            former.rename(output)
        shutil.rmtree(former, ignore_errors=True)


def describe(
    pipeline: Pipeline,
    student: Denoiser,
    sampler: Sampler,
    format: str,
    *,
    spec: SchedulerSpec,
    call: Mapping[str, Any],
    record: Mapping[str, Any],
    file: str | None = None,
    in_diffusers: bool = True,
) -> dict[str, Any]:
    """What `fastgen.json` holds: everything about an export but its weights.

    `file` is the export's one file of weights, where it is one; `in_diffusers`: diffusers loads it.
    """
    settings: dict[str, Any] = asdict(sampler) if is_dataclass(sampler) else {}
    times = tuple(settings.get("times", ()))
    settings |= {"timesteps": timesteps_of(student, times), "shift": shift_of(times)}
    return {
        "fastgen": __version__,
        "diffusers": diffusers.__version__,
        "format": format,
        **({} if file is None else {"file": file}),
        "in_diffusers": in_diffusers,
        "pipeline": type(pipeline.diffusers).__name__,
        "network": type(student.network).__name__,
        "sampler": {"class": type(sampler).__name__, "steps": sampler.steps, **settings},
        "scheduler": {"class": spec.class_name, "config": spec.config},
        "call": dict(call),
        "base": {"name": record.get("base", ""), "sha256": base_hash(pipeline.network)} | quantized(pipeline, record),
        "record": dict(record),
    }


def quantized(pipeline: Pipeline, record: Mapping[str, Any]) -> dict[str, str]:
    """The format, if any, that the base's weights had while an adapter was trained; the adapter is for the base itself."""
    format = quantization_of(pipeline.network) or record.get("quantize", "none")
    return {} if format == "none" else {"trained_on": format}


def metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The description as the flat text that a safetensors header takes; what is not text is JSON."""
    record, sampler = description["record"], description["sampler"]
    facts = {
        "version": description["fastgen"],
        "method": record.get("method", ""),
        "base": description["base"]["name"],
        "base_sha256": description["base"]["sha256"],
        "steps": sampler["steps"],
        "timesteps": sampler["timesteps"],
        "shift": sampler["shift"],
        "guidance": sampler.get("guidance"),
        "sampler": sampler,
        "scheduler": description["scheduler"]["class"],
        "call": description["call"],
    }
    if "trained_on" in description["base"]:
        facts["base_trained_on"] = description["base"]["trained_on"]
    return {"format": "pt"} | {
        f"fastgen.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
    }


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write `fastgen.json`. Raises TypeError where the record holds something that is not JSON."""
    record = {key: value for key, value in description["record"].items() if key != "samples"}  # A copy lies beside it.
    (folder / MARK).write_text(
        json.dumps({**description, "record": record}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_export(folder: Path) -> dict[str, Any]:
    """What an export says of itself; `["call"]` are the arguments with which its pipeline has to be called.

    Raises UserError where `folder` is not an export.
    """
    path = Path(folder) / MARK
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        description["call"], description["sampler"]
    except OSError as problem:
        raise UserError(f"{folder} is not an export: it has no readable {MARK}") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not an export's description: it must be a JSON object with call and sampler") from problem
    result: dict[str, Any] = description
    return result
