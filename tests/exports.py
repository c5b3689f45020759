"""Exports made here, then sampled from the same noise by plain diffusers, in one process that cannot import fastgen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.export import export
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.process import VP
from fastgen.samplers import FewStep, even_times, timesteps_to_times
from tests import tiny_models as tiny

WHOLE = ("diffusers", "fused")
PROMPT = "a red cube"
SEED = 11


@dataclass(frozen=True)
class Case:
    """One export: a base, how its student is trained, how it is sampled, and in which format it is written.

    `card`: the lines of its model card are run too. `error` is what is let pass, relative to our latents.
    """

    base: Callable[[], Any]
    format: str = "diffusers"
    mode: str = "full"
    gamma: float = 0.0
    steps: int = 4
    guidance: float = 1.0
    timesteps: tuple[int, ...] = ()
    shift: float = 1.0
    size: int | None = None
    embeds: bool = False
    rank: int = 4
    scheduler: str = ""
    card: bool = False
    prompts: tuple[str, ...] = (PROMPT,)
    error: float = 1e-4


@dataclass
class Drawn:
    """The folder of a set of exports, and the latents of each case: fastgen's own and those of plain diffusers."""

    root: Path
    ours: dict[str, Tensor] = field(default_factory=dict)
    theirs: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    made: tuple[Any, ...] = ()

    def student(self, case: Case) -> tuple[Pipeline, Denoiser]:
        """The case's pipeline and student; the last case's once more where only format and sampler differ."""
        key = (case.base, case.mode, case.size, case.embeds, case.rank)
        if not self.made or self.made[0] != key:
            pipeline = wrapped(case)
            self.made = (key, pipeline, trained(pipeline, embeds=case.embeds))
        return self.made[1], self.made[2]

    def error(self, name: str) -> float:
        """Of the latents that plain diffusers drew, relative to our own."""
        assert name not in self.problems, self.problems[name]
        return float((self.theirs[name] - self.ours[name]).norm() / self.ours[name].norm())

    def file(self, name: str) -> dict[str, Tensor]:
        """The weights of an export that is one file."""
        return load_file(self.root / name / f"{name}.safetensors")


def wrapped(case: Case) -> Pipeline:
    """The case's base. Another role on it, trained too, must leave no trace in the export."""
    torch.manual_seed(0)
    lora = LoraOptions(rank=case.rank, alpha=10.0)
    roles: dict[str, Any] = {"student": case.mode, "fake_score": case.mode}
    pipeline = Pipeline.wrap(case.base(), roles=roles, lora=lora, height=case.size, width=case.size)
    if case.mode == "lora":
        other = pipeline.trainable("fake_score")
        torch.nn.init.normal_(next(p for n, p in other.named_parameters() if "lora_B" in n))
    return pipeline


def trained(pipeline: Pipeline, *, embeds: bool = False) -> Denoiser:
    """A student that has moved away from its teacher."""
    torch.manual_seed(1)
    student = pipeline.trainable("student", guidance_embedding=embeds)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * torch.randn_like(weight) * max(float(weight.std()) if weight.numel() > 1 else 0.0, 0.1)
    return student.eval()


def sdxl() -> Any:
    """With a second text encoder of another width than the first, by which diffusers tells them apart in a single file."""
    pipeline = tiny.sdxl()
    config = pipeline.text_encoder_2.config
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 40, 41, 5
    pipeline.text_encoder_2 = type(pipeline.text_encoder_2)(config).eval()
    width = tiny.WIDTH + 40
    pipeline.unet = tiny.unet(**{**pipeline.unet.config, "cross_attention_dim": width})
    return pipeline


def sampler_of(case: Case, pipeline: Pipeline) -> FewStep:
    times = timesteps_to_times(pipeline.process, case.timesteps) or even_times(case.steps, pipeline.process, case.shift)
    return FewStep(times, case.gamma, case.guidance)


def drawn_elsewhere(cases: Mapping[str, Case], root: Path) -> Drawn:
    """Export and sample every case here; then have all of them loaded and sampled by one process without fastgen."""
    found, told = Drawn(root), []
    for name, case in cases.items():
        told.append(make(name, case, found) | {"name": name, "card": case.card})
    (root / "cases.json").write_text(json.dumps(told))
    environment = {**os.environ, "HF_HOME": str(root / "hub"), "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, str(Path(__file__).with_name("stock_diffusers.py")), str(root)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found.theirs = load_file(root / "latents.safetensors")
    found.problems = json.loads((root / "problems.json").read_text())
    return found


def make(name: str, case: Case, found: Drawn) -> dict[str, Any]:
    """One export, with its base beside it where that is needed, and our own latents from the noise that is kept for others."""
    root = found.root
    pipeline, student = found.student(case)
    sampler, base = sampler_of(case, pipeline), root / f"base-{name}"
    if case.format not in WHOLE:
        torch.manual_seed(0)
        case.base().save_pretrained(base)
        with_stock_tokenizers(base)
    record = {"method": "lcm", "base": str(base), "updates": 3, "averaged": True, "prompt": PROMPT}
    folder = export(pipeline, student, sampler, root / name, format=case.format, record=record)
    if case.format in WHOLE:
        with_stock_tokenizers(folder)
    torch.manual_seed(SEED)
    noise = torch.randn(len(case.prompts), *pipeline.latent_shape)
    flux2 = type(pipeline.diffusers).__name__.startswith("Flux2")  # It takes a user's noise before it is packed.
    asked = noise.transpose(1, 2).unflatten(2, (4, 4)) if flux2 else noise
    save_file({"noise": asked.contiguous()}, root / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(SEED) if isinstance(pipeline.process, VP) else None
    condition = pipeline.encode_prompts(case.prompts)
    torch.manual_seed(SEED)
    with torch.no_grad():
        found.ours[name] = sampler.sample(student, noise, condition, generator=generator)
    if type(pipeline.diffusers).__name__ == "Flux2KleinPipeline":  # It alone hands out the autoencoder's latents.
        found.ours[name] = pipeline.unpack(found.ours[name])
    where = {"folder": str(folder), "base": str(base), "noise": str(root / f"{name}.safetensors")}
    return where | {"prompts": list(case.prompts), "seed": SEED}


def with_stock_tokenizers(folder: Path) -> None:
    """Let a saved pipeline's index name transformers' class in place of the tiny models' own, which adds nothing to text."""
    index = json.loads((folder / "model_index.json").read_text())
    for name, entry in index.items():
        if isinstance(entry, list) and str(entry[0]).startswith("fastgen"):
            index[name] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
