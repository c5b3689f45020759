"""Students that are told where steps end: stock diffusers samples their exports as we do, with the file that they bring."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fastgen.errors import UserError
from fastgen.eval.generate import load_pipeline as load_export
from fastgen.export import export, read_export
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.mean_velocity_file import WEIGHTS, source, written
from fastgen.samplers import FewStep, MeanVelocity, even_times
from tests import tiny_models as tiny


@pytest.mark.parametrize(
    ("base", "format", "mode", "steps", "shift"),
    [(tiny.toy, "diffusers", "full", 4, 1.0), (tiny.sd3, "fused", "lora", 3, 3.0)],
    ids=["toy-full", "sd3-lora"],
)
def test_diffusers_samples_it_as_we_do(base: Any, format: str, mode: Any, steps: int, shift: float, tmp_path: Path) -> None:
    pipeline = Pipeline.wrap(base(), roles={"student": mode}, lora=LoraOptions(rank=2))
    student = pipeline.trainable("student", end_time=True)
    torch.manual_seed(1)
    assert student.end_input is not None
    nn.init.normal_(student.end_input.leave.weight, std=0.3)
    student.requires_grad_(False).eval()
    sampler = MeanVelocity(even_times(steps, pipeline.process, shift))
    condition, noise = pipeline.encode_prompts(["a red cube"]), torch.randn(1, *pipeline.latent_shape)
    ours = sampler.sample(student, noise, condition)
    untold = FewStep(sampler.times).sample(student, noise, condition)
    folder = export(pipeline, student, sampler, tmp_path / "export", format=format, trained=sampler)
    described = read_export(folder)
    assert described["sampler"]["class"] == "MeanVelocity" and (folder / WEIGHTS).is_file()
    assert "No stock pipeline of diffusers tells its network where a step ends" in (folder / "README.md").read_text()
    assert "fastgen" not in (folder / "pipeline.py").read_text()
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    trusted = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    for loaded in (trusted, load_export(folder)):
        assert type(loaded).__name__ == described["custom_pipeline"]["class"]
        assert "prompt" in inspect.signature(type(loaded).__call__).parameters
        loaded.set_progress_bar_config(disable=True)
        for _ in range(2):  # The second call begins anew.
            theirs = loaded(prompt=["a red cube"], latents=noise, output_type="latent", **described["call"]).images
            assert (theirs - ours).norm() / ours.norm() < 1e-4
    assert (untold - ours).norm() / ours.norm() > 1e-3
    with pytest.raises(ValueError, match=f"takes {steps} steps, not 2"):
        trusted(prompt=["a red cube"], latents=noise, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(UserError, match="is distilled already: its network is told where a step ends"):
        load_pipeline(str(folder))
    file = folder / "pipeline.py"
    file.write_text(file.read_text() + "import os\n")
    with pytest.raises(UserError, match="is code that comes with the pipeline"):
        load_export(folder)
    if mode == "lora":
        with pytest.raises(UserError, match="no stock scheduler of diffusers tells a network where its step ends"):
            export(pipeline, student, sampler, tmp_path / "other", format="diffusers-lora")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"][0] == "pipeline"


def test_the_file_is_known_by_its_text() -> None:
    text = source("StableDiffusionPipeline", "unet", "time_embedding", (0.5, 0.25, 1e-5))
    assert written(text) == ("StableDiffusionPipeline", "MeanVelocityStableDiffusionPipeline")
    compile(text, "pipeline.py", "exec")
    assert written(text + "\n") is None and written(text.replace("0.25", "0.25 ")) is None and written("") is None
    assert written(source("A", "unet", "x", (1.0,))) == ("A", "MeanVelocityA")
