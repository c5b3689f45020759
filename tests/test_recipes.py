"""Every recipe in configs/: it is understood, builds on its family's tiny model, all players move, the student is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import config
from fastgen.config import ROLES, TOY
from fastgen.data.source import Source
from fastgen.denoiser import Condition
from fastgen.export import export, read_export
from fastgen.families.stages import Staged
from fastgen.method import Batch, Player
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.tiny import builders
from fastgen.training.loop import Trainer
from tests.tiny_models import toy

ROOT = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in ROOT.rglob("*.toml") if not path.name.startswith("teacher"))
REAL = [path for path in RECIPES if path.parent.name != "toy"]
FAMILIES = {  # folder -> class of the tiny model, and the hub names that its recipes may start from
    "sd15": ("StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": ("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    "sd35": ("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-"),
    "flux": ("FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    "sana": ("SanaPipeline", "Efficient-Large-Model/"),
    "qwen-image": ("QwenImagePipeline", "Qwen/Qwen-Image"),
}


PIXELS = 64
"""Height and width of all but the toy's pictures. Some families' are 1,024 by default, which a tiny autoencoder of few levels
makes 262,144 places of a latent: more than a large model has, and gigabytes.
"""


def tiny(recipe: Path, run: config.RunConfig) -> Pipeline:
    """The recipe's roles on a tiny model of its family; adapters and pictures are small, whatever it says of them."""
    build: Any = toy if run.pipeline == TOY else builders()[FAMILIES[recipe.parent.name][0]]
    roles: dict[str, Any] = {role: run.role(role) for role in ROLES}
    size = {} if run.pipeline == TOY else {"height": PIXELS, "width": PIXELS}
    return Pipeline.wrap(build(), roles=roles, lora=LoraOptions(rank=2, init=run.lora.init, dora=run.lora.dora), **size)


def tiny_data(pipeline: Pipeline, needs: frozenset[str]) -> Source:
    """Two samples of whatever a method needs."""
    prompts, shape = ["a red cube", "a blue ball"], (2, *pipeline.latent_shape)
    pairs = Condition({"noise": torch.randn(shape), "target": torch.randn(shape)}) if "pairs" in needs else None
    latents = torch.randn(shape) if "images" in needs else None
    return Source(pipeline.encode_prompts(prompts), shape[1:], latents, pairs=pairs, prompts=prompts)


def learns(player: Player, batch: Batch) -> bool:
    """Whether a player's loss is a number that its weights can lower."""
    weights = [weight for weight in player.weights.parameters() if weight.requires_grad]
    with torch.no_grad():  # a fake score that is the teacher still moves no student
        for weight in weights:
            weight += 0.02 * torch.randn_like(weight)
    loss = torch.stack(list(player.loss(batch).values())).sum()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return bool(loss.isfinite()) and any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(recipe: Path, tmp_path: Path) -> None:
    """In its first update all players learn; then it is trained as it says, at least once in every stage, and exported."""
    run = config.load(recipe)
    torch.manual_seed(0)
    pipeline, method = tiny(recipe, run), run.method
    for name, value in {"backbone": "tiny", "stage_shares": (), "early_updates": 1, "student_every": 1}.items():
        if getattr(method, name, "toy") != "toy":  # the weights of real backbones are not here, nor time for many updates
            setattr(method, name, value)
    method.setup(pipeline)
    data = tiny_data(pipeline, method.needs)
    method.advance(0, run.train.steps)
    assert [player.name for player in method.players() if not learns(player, data.batch(2))] == []
    updates = max(2, len(method.stages) if isinstance(method, Staged) else 0)
    short: dict[str, Any] = {"steps": updates, "batch": 2, "micro_batches": 1, "checkpoint_every": 0, "threads": 0}
    trainer = Trainer(method, data, replace(run.train, **short), device="cpu")
    trainer.fit()
    assert trainer.step == updates and not any(int(turn.skipped) for turn in trainer.turns)
    method.trained.requires_grad_(False).eval()
    format = "diffusers-lora" if run.role("student") == "lora" else "diffusers"
    record = {"method": run.method_name, "base": run.pipeline, "updates": updates, "averaged": False, "prompt": data.prompts[0]}
    folder = export(pipeline, method.trained, method.sampler(), tmp_path / "export", format=format, record=record)
    assert read_export(folder)["sampler"]["steps"] == method.sampler().steps


@pytest.mark.parametrize("recipe", REAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_header(recipe: Path) -> None:
    """A recipe for a real model says where its numbers are from, what to expect, and that it was not run here."""
    header = recipe.read_text(encoding="utf-8").partition("\npipeline")[0].replace("\n# ", " ")
    assert config.load(recipe).pipeline.startswith(FAMILIES[recipe.parent.name][1])
    assert [word for word in ("Source:", "Expected", "not run here") if word not in header] == []
