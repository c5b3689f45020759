"""Exports of students that no stock scheduler samples: they bring a pipeline file (`fastgen.pipelines.gamma_flow`).

`model_index.json` names the file, so that diffusers asks for `trust_remote_code=True` instead of taking a stock scheduler in
silence.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.denoiser import Denoiser
from fastgen.pipelines import Pipeline
from fastgen.pipelines.gamma_flow import FILE, class_name, source
from fastgen.process import Flow
from fastgen.samplers import FewStep, Sampler


def stock_or_custom(student: Denoiser, sampler: Sampler) -> tuple[Sampler, float | None]:
    """The sampler whose stock scheduler lies in the export, and the gamma that a pipeline file must bring in, if one must."""
    flow = isinstance(student.process, Flow) and student.kind == "flow"
    if not (flow and isinstance(sampler, FewStep) and 0 < sampler.gamma < 1):
        return sampler, None
    return replace(sampler, gamma=1.0), float(sampler.gamma) if sampler.steps > 1 else None


def custom_name(pipeline: Pipeline) -> str:
    """What the pipeline file calls its class."""
    return class_name(type(pipeline.diffusers).__name__)


def write_pipeline_file(pipeline: Pipeline, gamma: float, folder: Path) -> None:
    """Write the pipeline file into a saved pipeline's `folder`, and name it in the index."""
    (folder / FILE).write_bytes(source(type(pipeline.diffusers).__name__, gamma).encode())
    path = folder / "model_index.json"
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    index["_class_name"] = [Path(FILE).stem, custom_name(pipeline)]
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
