"""Exports of students that no stock scheduler samples: they bring a pipeline file (`fastgen.pipelines.gamma_flow`, or
`fastgen.pipelines.mean_velocity_file` with the weights of a second time input).

`model_index.json` names the file, so that diffusers asks for `trust_remote_code=True` instead of taking a stock scheduler in
silence.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fastgen.denoiser import Denoiser
from fastgen.pipelines import Pipeline, mean_velocity_file
from fastgen.pipelines.gamma_flow import FILE, class_name, source
from fastgen.process import Flow
from fastgen.samplers import FewStep, MeanVelocity, Sampler


def stock_or_custom(student: Denoiser, sampler: Sampler) -> tuple[Sampler, float | None]:
    """The sampler whose stock scheduler lies in the export, and the gamma that a pipeline file must bring in, if one must.

    A pipeline file for mean velocities keeps the scheduler as it is.
    """
    if isinstance(sampler, MeanVelocity):
        return sampler.stock, None
    flow = isinstance(student.process, Flow) and student.kind == "flow"
    if not (flow and isinstance(sampler, FewStep) and 0 < sampler.gamma < 1):
        return sampler, None
    return replace(sampler, gamma=1.0), float(sampler.gamma) if sampler.steps > 1 else None


def custom_name(pipeline: Pipeline, gamma: float | None) -> str:
    """What the pipeline file calls its class; without `gamma`, the one for mean velocities."""
    stock = type(pipeline.diffusers).__name__
    return mean_velocity_file.class_name(stock) if gamma is None else class_name(stock)


def write_pipeline_file(pipeline: Pipeline, student: Denoiser, sampler: Sampler, gamma: float | None, folder: Path) -> None:
    """Write the pipeline file into a saved pipeline's `folder`, and name it in the index."""
    stock = type(pipeline.diffusers).__name__
    if gamma is not None:
        text = source(stock, gamma)
    else:
        assert student.end_input is not None and isinstance(sampler, MeanVelocity)
        spans = [t - s for t, s in pairwise((*sampler.times, 0.0))]
        text = mean_velocity_file.source(stock, pipeline.network_name, student.end_input.place, spans)
        weights = {"rates": student.end_input.rates, **student.end_input.state_dict()}
        save_file({key: value.float().contiguous() for key, value in weights.items()}, folder / mean_velocity_file.WEIGHTS)
    (folder / FILE).write_bytes(text.encode())
    path = folder / "model_index.json"
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    index["_class_name"] = [Path(FILE).stem, custom_name(pipeline, gamma)]
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
