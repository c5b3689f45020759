"""A pipeline file for what no stock scheduler of diffusers does: gamma sampling (TCD; Zheng et al. 2024, algorithm 4) of flows.

The file needs diffusers alone. `model_index.json` names it, so that diffusers asks for `trust_remote_code=True` instead of
taking a stock scheduler in silence.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.denoiser import Denoiser
from fastgen.pipelines import Pipeline
from fastgen.process import Flow
from fastgen.samplers import FewStep, Sampler

FILE = "pipeline.py"

TEMPLATE = '''"""{stock} with gamma sampling: a step follows the flow below the next noise level, then diffuses back up to it.

After Zheng et al. 2024 (TCD), algorithm 4, for a rectified flow x = (1 - sigma) x0 + sigma noise.
"""

from diffusers import FlowMatchEulerDiscreteScheduler, {stock}
from diffusers.utils.torch_utils import randn_tensor

GAMMA = {gamma!r}


class GammaFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Goes to (1 - GAMMA) of the next noise level, then adds the noise that is missing."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **unused):
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, upper = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self._step_index += 1
        lower = upper * (1 - GAMMA)
        moved = sample.float() + (lower - sigma) * model_output.float()
        if upper > 0:
            noise = randn_tensor(moved.shape, generator=generator, device=moved.device, dtype=moved.dtype)
            kept = (1 - upper) / (1 - lower)
            moved = kept * moved + (upper**2 - (kept * lower) ** 2).clamp(min=0).sqrt() * noise
        moved = moved.to(model_output.dtype)
        return (moved,) if not return_dict else {{"prev_sample": moved}}


class {name}({stock}):
    def register_modules(self, **modules):
        if "scheduler" in modules:
            modules["scheduler"] = GammaFlowScheduler.from_config(modules["scheduler"].config)
        super().register_modules(**modules)
'''


def stock_or_custom(student: Denoiser, sampler: Sampler) -> tuple[Sampler, float | None]:
    """The sampler whose stock scheduler lies in the export, and the gamma that a pipeline file must bring in, if one must."""
    flow = isinstance(student.process, Flow) and student.kind == "flow"
    if not (flow and isinstance(sampler, FewStep) and 0 < sampler.gamma < 1):
        return sampler, None
    return replace(sampler, gamma=1.0), sampler.gamma if sampler.steps > 1 else None


def custom_name(pipeline: Pipeline) -> str:
    """What the pipeline file calls its class."""
    return f"Gamma{type(pipeline.diffusers).__name__}"


def write_pipeline_file(pipeline: Pipeline, gamma: float, folder: Path) -> None:
    """Write the pipeline file into a saved pipeline's `folder`, and name it in the index."""
    stock, name = type(pipeline.diffusers).__name__, custom_name(pipeline)
    (folder / FILE).write_text(TEMPLATE.format(stock=stock, name=name, gamma=gamma), encoding="utf-8")
    path = folder / "model_index.json"
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    index["_class_name"] = [Path(FILE).stem, name]
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
