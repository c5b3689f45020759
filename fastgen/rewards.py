"""Differentiable rewards of images: how well an image fits its prompt, and how it is liked.

A reward is named in a configuration: "toy-clip" is the toy world's own CLIP, "clip:MODEL/WEIGHTS" a CLIP that open_clip knows,
such as "clip:ViT-L-14/openai" (Radford et al. 2021; Hessel et al. 2021), and "aesthetic:FILE" a head on ViT-L/14's image
embeddings in safetensors, such as LAION's aesthetic predictor (Schuhmann et al. 2022). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.errors import UserError

TOY = "toy-clip"
TOY_WEIGHTS = Path(__file__).parent / "data" / "toy" / "weights" / "clip"
AESTHETIC_CLIP = "ViT-L-14/openai"

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""Images [B, 3, H, W] in [-1, 1] and their prompts to rewards [B], about [-1, 1], that can be differentiated by the images."""


class ClipReward:
    """The cosine of an image's and its prompt's embeddings, by open_clip's own model, tokenizer and normalisation."""

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        visual: Any = model.visual
        size = visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = (torch.tensor(each).view(1, 3, 1, 1) for each in (visual.image_mean, visual.image_std))

    def embed(self, images: Tensor) -> Tensor:
        """Normalised embeddings [B, D] of `images` [B, 3, H, W] in [-1, 1], cut to a square in the middle and resized."""
        side, top, left = min(images.shape[2:]), *((n - min(images.shape[2:])) // 2 for n in images.shape[2:])
        square = images[:, :, top : top + side, left : left + side].float()
        if square.shape[2:] != self.size:
            square = F.interpolate(square, self.size, mode="bicubic", antialias=True)
        pixels = ((square.clamp(-1, 1) + 1) / 2 - self.mean.to(images.device)) / self.std.to(images.device)
        weight = next(self.model.parameters())
        seen: Tensor = self.model.encode_image(pixels.to(weight.dtype), normalize=True)  # type: ignore[operator]
        return seen.float()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            tokens = self.tokenizer(list(prompts)).to(images.device)
            said = self.model.encode_text(tokens, normalize=True).float()  # type: ignore[operator]
        return (self.embed(images) * said).sum(1)


class AestheticReward:
    """A tenth of the mark from 1 to 10 that a head on CLIP's normalised image embeddings gives; prompts are not looked at.

    The head is the linear layers of a file, one after the other: LAION's predictors have nothing between them in evaluation.
    """

    def __init__(self, clip: ClipReward, layers: Sequence[tuple[Tensor, Tensor]]):
        self.clip, self.layers = clip, list(layers)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        x = self.clip.embed(images)
        for weight, bias in self.layers:
            x = F.linear(x, weight.to(x), bias.to(x))
        return x.squeeze(1) / 10


def load_reward(name: str, device: torch.device | str = "cpu") -> Reward:
    """The reward of this name. Raises UserError where there is none, or where its weights are not on this machine."""
    kind, _, rest = name.partition(":")
    if name == TOY:
        if not (TOY_WEIGHTS / "open_clip_model.safetensors").is_file():
            raise UserError(f"{TOY_WEIGHTS / 'open_clip_model.safetensors'} is missing: the installation is incomplete")
        return load_clip(f"local-dir:{TOY_WEIGHTS}", None, device)
    if kind == "clip" and rest:
        return known_clip(rest, name, device)
    if kind == "aesthetic" and rest:
        layers = head_layers(Path(rest).expanduser())
        return AestheticReward(known_clip(AESTHETIC_CLIP, name, device), layers)
    raise UserError(f'there is no reward {name!r}; give "{TOY}", "clip:MODEL/WEIGHTS" or "aesthetic:FILE"')


def known_clip(clip: str, reward: str, device: torch.device | str) -> ClipReward:
    """A model and weights that open_clip knows, from the cache alone: open_clip itself would retry for most of a minute."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    model, _, weights = clip.partition("/")
    if (model, weights) not in open_clip.list_pretrained():
        raise UserError(f"reward {reward!r}: open_clip has no model {clip!r}; give model/weights, such as {AESTHETIC_CLIP}")
    repository = open_clip.get_pretrained_cfg(model, weights).get("hf_hub", "").rstrip("/")
    file = "open_clip_model.safetensors"
    if not repository or not isinstance(try_to_load_from_cache(repository, file), str):
        how = f"`hf download {repository} {file}`" if repository else "weights that are on the Hugging Face hub"
        raise UserError(f"reward {reward!r}: the weights of CLIP {clip!r} are not in the Hugging Face cache; get {how} first")
    return load_clip(model, weights, device)


def load_clip(model: str, weights: str | None, device: torch.device | str) -> ClipReward:
    """A reward from open_clip's name of a model and of its weights."""
    import open_clip

    # OpenAI's weights want their own activation, which open_clip 3 does not turn on by itself.
    quick = weights is not None and bool(open_clip.get_pretrained_cfg(model, weights).get("quick_gelu"))
    made = open_clip.create_model(model, pretrained=weights, device=device, force_quick_gelu=quick)
    return ClipReward(made, open_clip.get_tokenizer(model))


def head_layers(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the linear layers in a safetensors file, in the order of their names' numbers."""
    if not path.is_file() or path.suffix != ".safetensors":
        found = "is not in safetensors" if path.is_file() else "is missing"
        raise UserError(f"aesthetic head {path} {found}: put the predictor's state dict there with safetensors' save_file")
    tensors = load_file(path)
    names = [name.removesuffix(".weight").removesuffix("weight") for name in tensors if name.endswith("weight")]
    names.sort(key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    layers: list[tuple[Tensor, Tensor]] = []
    for name in names:
        weight, bias = (tensors.get(f"{name}.{part}" if name else part) for part in ("weight", "bias"))
        wide = layers[-1][0].shape[0] if layers else None
        if weight is None or bias is None or weight.ndim != 2 or wide not in (None, weight.shape[1]):
            raise UserError(f"aesthetic head {path}: {name or 'weight'} is not a linear layer that follows the one before it")
        layers.append((weight.float(), bias.float()))
    if not layers or layers[-1][0].shape[0] != 1:
        raise UserError(f"aesthetic head {path}: linear layers that end in one number are expected, not {sorted(tensors)[:4]}")
    return layers
