"""Every recipe in configs/: it is understood, builds on its family's tiny model, all players move, the student is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import config
from fastgen.config import ROLES, TOY
from fastgen.export import export, read_export
from fastgen.method import Batch
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.tiny import builders
from tests.tiny_models import toy

ROOT = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in ROOT.rglob("*.toml") if not path.name.startswith("teacher"))
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe(recipe: Path, tmp_path: Path) -> None:
    header = recipe.read_text(encoding="utf-8").partition("\npipeline")[0].replace("\n# ", " ")
    run = config.load(recipe)
    if run.pipeline != TOY:
        assert run.pipeline.startswith(FAMILIES[recipe.parent.name][1])
        assert any(words in header.lower() for words in ("not run", "not been run")), (
            "a recipe says in its header whether it was run"
        )
    torch.manual_seed(0)
    pipeline, method = tiny(recipe, run), run.method
    if getattr(method, "backbone", "toy") != "toy":  # the weights of real ones are not here
        method.backbone = "tiny"  # type: ignore[attr-defined]
    method.setup(pipeline)
    prompts = ("a red cube", "a blue ball")
    shape = (2, *pipeline.latent_shape)
    batch = Batch(pipeline.encode_prompts(prompts), shape, prompts=prompts)
    if "images" in method.needs:
        batch.latents = torch.randn(shape)
    if "pairs" in method.needs:
        batch.noise, batch.target = torch.randn(shape), torch.randn(shape)
    method.advance(0, run.train.steps)
    for player in method.players():
        weights = [weight for weight in player.weights.parameters() if weight.requires_grad]
        with torch.no_grad():  # a fake score that is the teacher still moves no student
            for weight in weights:
                weight += 0.02 * torch.randn_like(weight)
        loss = torch.stack(list(player.loss(batch).values())).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        assert loss.isfinite() and any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), player.name
    method.trained.requires_grad_(False).eval()
    lora = run.role("student") == "lora"
    format = "diffusers-lora" if lora else "diffusers"
    record = {"method": run.method_name, "base": run.pipeline, "updates": 1, "averaged": False, "prompt": prompts[0]}
    folder = export(pipeline, method.trained, method.sampler(), tmp_path / "export", format=format, record=record)
    assert read_export(folder)["sampler"]["steps"] == method.sampler().steps
