"""A CLIP for the toy world: a stock open_clip model with a tiny config, trained on renders, captions and near misses.

The folder it is shipped in is what open_clip calls a local directory: `open_clip.create_model("local-dir:...")` and
`open_clip.get_tokenizer("local-dir:...")` load it without fastgen. Training is contrastive (Radford et al. 2021,
arXiv:2103.00020); every caption meets captions that differ in one thing (after Yuksekgonul et al. 2023, arXiv:2210.01936), and
every picture meets damaged copies of itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fastgen.data.toy.captions import caption
from fastgen.data.toy.corruptions import corrupt
from fastgen.data.toy.reader import OBJECT_HEADS, SCENE_HEADS
from fastgen.data.toy.scenes import BACKGROUNDS, IMAGE_SIZE, Scenes, render, sample_scenes
from fastgen.data.toy.tokenizer import toy_tokenizer

WEIGHTS = Path(__file__).parent / "weights" / "clip"
CONTEXT = 24
EDITS = ("shape", "colour", "size", "texture", "background", "order", "axis", "exchange")
"""How a near miss differs: one attribute of one object, the background, which object is first, how they are separated, or one
attribute exchanged between the two objects."""


def clip_config() -> dict[str, Any]:
    """The open_clip config (`model_cfg` and `preprocess_cfg`) of the toy CLIP."""
    return {
        "model_cfg": {
            "embed_dim": 96,
            "vision_cfg": {"image_size": IMAGE_SIZE, "timm_model_name": "test_resnet", "timm_pool": "avg"},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(toy_tokenizer(CONTEXT)),
                "hf_tokenizer_name": "fastgen-toy",
                "width": 64,
                "heads": 4,
                "layers": 2,
                "mlp_ratio": 3.0,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def near_misses(scenes: Scenes, generator: torch.Generator, *, edit: str | None = None) -> Scenes:
    """Descriptions that differ from `scenes` in one thing, drawn from `EDITS` (or `edit` for all).

    Where an edit changes nothing (order of a single object, exchange of equal attributes), the first object's colour changes.
    """
    number, rows = len(scenes), torch.arange(len(scenes))
    kind = torch.randint(len(EDITS), (number,), generator=generator)
    if edit is not None:
        kind = torch.full((number,), EDITS.index(edit))
    wrong = Scenes(**{name: value.clone() for name, value in vars(scenes).items()})
    which = torch.randint(2, (number,), generator=generator) * (scenes.count == 2)
    for name, size in OBJECT_HEADS.items():
        rows_here = rows[kind == EDITS.index(name)]
        values, objects = getattr(wrong, name), which[rows_here]
        step = torch.randint(1, size, (len(rows_here),), generator=generator)
        values[rows_here, objects] = (values[rows_here, objects] + step) % size
    step = torch.randint(1, len(BACKGROUNDS), (number,), generator=generator)
    other = (scenes.background + step) % len(BACKGROUNDS)
    wrong.background = torch.where(kind == EDITS.index("background"), other, wrong.background)
    wrong.axis = torch.where((kind == EDITS.index("axis")) & (scenes.count == 2), 1 - scenes.axis, wrong.axis)
    attribute = torch.randint(len(OBJECT_HEADS), (number,), generator=generator)
    for i, name in enumerate(OBJECT_HEADS):
        flip = (scenes.count == 2) & ((kind == EDITS.index("order")) | ((kind == EDITS.index("exchange")) & (attribute == i)))
        values = getattr(wrong, name)
        setattr(wrong, name, torch.where(flip[:, None], values.flip(1), values))
    same = torch.stack([(getattr(wrong, n) == getattr(scenes, n)).reshape(number, -1).all(1) for n in vars(scenes)]).all(0)
    wrong.colour[same, 0] = (wrong.colour[same, 0] + 1) % OBJECT_HEADS["colour"]
    return wrong


@lru_cache(1)
def _tokenizer() -> CLIPTokenizer:
    return toy_tokenizer(CONTEXT)


def tokenize(texts: list[str]) -> Tensor:
    """Token ids [B, 24], as `open_clip.get_tokenizer` of the shipped folder makes them."""
    options = {"return_tensors": "pt", "padding": "max_length", "max_length": CONTEXT, "truncation": True}
    ids: Tensor = _tokenizer()(texts, **options).input_ids
    return ids


class _Attributes(nn.Module):
    """Training aid: reads the scene's attributes from an embedding of either tower, so that both learn the same axes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = {**{name: 2 * size for name, size in OBJECT_HEADS.items()}, **SCENE_HEADS}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in heads.items()})

    def forward(self, embedding: Tensor, scenes: Scenes) -> Tensor:
        total = embedding.new_zeros(())
        for name, head in self.heads.items():
            logits, target = head(embedding), getattr(scenes, name)
            if name in OBJECT_HEADS:
                logits = logits.unflatten(1, (2, -1))
                present = torch.stack([torch.ones_like(scenes.count), scenes.count - 1], 1)
                losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * present.flatten()
                total = total + losses.sum() / present.sum()
            else:
                total = total + F.cross_entropy(logits, target)
        return total


def contrastive_loss(image: Tensor, text: Tensor, damaged: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE both ways for unit embeddings: `image` [B, D], `text` [B, 1 + K, D] (right caption first), `damaged` [M, D].

    An image has to find its caption among all captions and near misses of the batch; a caption its image among all images and
    the damaged ones.
    """
    number, captions = text.shape[:2]
    by_image = scale * image @ text.flatten(0, 1).T
    by_text = scale * text[:, 0] @ torch.cat([image, damaged]).T
    index = torch.arange(number)
    return (F.cross_entropy(by_image, index * captions) + F.cross_entropy(by_text, index)) / 2


def _pool(size: int, misses: int, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """Scenes (both splits) and token ids [size, 1 + misses, 24] of a right caption and near misses of each."""
    parts = [sample_scenes(size - size // 3, generator), sample_scenes(size // 3, generator, split="held-out")]
    scenes = Scenes(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
    texts = [caption(scenes, generator)] + [caption(near_misses(scenes, generator), generator) for _ in range(misses)]
    return scenes, torch.stack([tokenize(some) for some in texts], 1)


def train_clip(
    updates: int = 1100,
    batch: int = 112,
    *,
    seed: int = 0,
    rate: float = 2.5e-3,
    misses: int = 3,
    pool: int = 20000,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> nn.Module:
    """Train the toy CLIP from nothing: an `open_clip.CLIP`; deterministic for a seed and number of threads.

    The defaults made the shipped one. `report(update, losses)` is called every 50 updates.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = open_clip.CLIP(**clip_config()["model_cfg"]).train()
    attributes = _Attributes(clip_config()["model_cfg"]["embed_dim"])
    weights = [*model.parameters(), *attributes.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    scenes, tokens = _pool(pool, misses, generator)
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (update + 1) / 100) * (1 - update / updates)
        chosen = torch.randint(pool, (batch,), generator=generator)
        images = render(scenes[chosen], generator)
        lightly, strengths = corrupt(images, generator, probability=0.02)
        lightly = torch.where((strengths.amax(1) < 0.3)[:, None, None, None], lightly, images)
        damaged, strengths = corrupt(images[: batch // 4], generator, probability=0.25)
        damaged = damaged[strengths.amax(1) > 0.4]
        which = torch.randint(1, 1 + misses, (batch,), generator=generator)
        pairs = torch.stack([tokens[chosen, 0], tokens[chosen, which]], 1)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.encode_image(torch.cat([lightly, damaged]), normalize=True).float()
        said = model.encode_text(pairs.flatten(0, 1), normalize=True).unflatten(0, (batch, 2))
        scale = model.logit_scale.exp().clamp_max(60)
        contrast = contrastive_loss(seen[:batch], said, seen[batch:], scale)
        by_image, by_text = (attributes(10 * part, scenes[chosen]) for part in (seen[:batch], said[:, 0]))
        optimiser.zero_grad()
        (contrast + 0.5 * (by_image + by_text)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        average.update_parameters(model)
        if report is not None and update % 50 == 0:
            losses = {"contrast": contrast, "image": by_image, "text": by_text, "scale": scale}
            report(update, {name: value.item() for name, value in losses.items()})
    trained: nn.Module = average.module
    # Averaging buffers too would make NaN of the text tower's mask (minus infinity); the last batch statistics serve as well.
    for averaged, last in zip(trained.buffers(), model.buffers(), strict=True):
        averaged.copy_(last)
    return trained.eval().requires_grad_(False)


def save_clip(model: nn.Module, folder: Path) -> None:
    """Write an open_clip local directory: config, bf16 safetensors weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, folder / "open_clip_model.safetensors.tmp")
    (folder / "open_clip_config.json.tmp").write_text(json.dumps(clip_config(), indent=2) + "\n")
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        (folder / f"{name}.tmp").replace(folder / name)
    toy_tokenizer(CONTEXT).save_pretrained(folder)
