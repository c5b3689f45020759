"""CLIP score, 100 x cosine of image and prompt, by open_clip's own model, tokenizer and preprocessing.

Hessel et al. 2021 (arXiv:2104.08718), without their factor 2.5 and without clipping at 0. The value means nothing without the
name of the model, which is in every result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn

from fastgen.data.toy.clip import WEIGHTS
from fastgen.errors import UserError
from fastgen.eval.images import Images, batches, to_pillow
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.world import World

READINGS = {
    "clip_score": Reading("CLIP score", best="high"),
    "clip_score_real": Reading("CLIP score of real images", best="none"),
}
ClipParts = tuple[nn.Module, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]


@lru_cache(maxsize=2)
def load_clip(world: World, device: str = "cpu") -> ClipParts:
    """Model, preprocessing and tokenizer. Raises UserError when the name is wrong or the weights are not at hand."""
    if world.clip == "fastgen-toy":
        name, weights = f"local-dir:{WEIGHTS}", None
        if not (WEIGHTS / "open_clip_model.safetensors").is_file():
            raise UserError(f"{WEIGHTS / 'open_clip_model.safetensors'} is missing: the installation is incomplete")
    else:
        name, _, weights = world.clip.partition("/")
        if (name, weights) not in open_clip.list_pretrained():
            raise UserError(f"open_clip has no model {world.clip!r}; give model/weights, such as ViT-B-32/openai")
        if world.offline:
            _must_be_cached(name, weights)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the CLIP model {world.clip!r} cannot be loaded: {error}") from error
    return model.eval().requires_grad_(False), preprocess, tokenizer


def _must_be_cached(name: str, weights: str) -> None:
    """open_clip itself retries for most of a minute before it gives up on a missing file."""
    repository = open_clip.get_pretrained_cfg(name, weights).get("hf_hub", "").rstrip("/")
    file = "open_clip_model.safetensors"
    if not repository or not isinstance(try_to_load_from_cache(repository, file), str):
        place = f"https://huggingface.co/{repository}/resolve/main/{file}" if repository else f"{name}/{weights}"
        raise UserError(f"CLIP weights are missing from the Hugging Face cache: {place}; evaluate once without offline")


@torch.no_grad()
def clip_scores(images: Images, prompts: list[str], world: World, *, device: str = "cpu", batch: int = 128) -> Tensor:
    """100 x cosine for each image (uint8 [N, 3, H, W]) and its prompt: [N]."""
    model, preprocess, tokenizer = load_clip(world, device)
    scores: list[Tensor] = []
    for shown in batches(images, batch):
        start = sum(map(len, scores))
        pictures = torch.stack([preprocess(picture) for picture in to_pillow(shown.cpu())])
        seen = model.encode_image(pictures.to(device), normalize=True)  # type: ignore[operator]
        said = model.encode_text(tokenizer(prompts[start : start + batch]).to(device), normalize=True)  # type: ignore[operator]
        scores.append(100 * (seen * said).sum(1).float().cpu())
    return torch.cat(scores)


@metric("clip_score", needs=("images", "prompts"), readings=READINGS)
def clip_score(evidence: Evidence) -> dict[str, Score]:
    """Mean CLIP score of the images, and of real images of the same prompts where there are some."""
    assert evidence.prompts is not None
    prompts = list(evidence.prompts)
    scores = {"clip_score": Score.mean(clip_scores(evidence.images, prompts, evidence.world, device=evidence.device))}
    if evidence.paired and evidence.reference is not None:
        real = clip_scores(evidence.reference, prompts, evidence.world, device=evidence.device)
        scores["clip_score_real"] = Score(real.mean().item())
    return scores


def clip_weights(world: World) -> Path | None:
    """The file the toy CLIP is read from; None for other models, which open_clip keeps in its cache."""
    return WEIGHTS / "open_clip_model.safetensors" if world.clip == "fastgen-toy" else None
