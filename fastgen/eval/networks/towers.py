"""Pairs of encoders, one for pictures and one for prompts, whose embeddings are compared by their cosine.

OpenAI's weights want their own activation, x sigmoid(1.702 x). open_clip 3 does not turn it on by itself for a name such as
"ViT-B-32/openai" (it warns) nor for weights from a file, and every embedding is off. Here it is on where open_clip's list of
weights says that they were trained with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen.data.toy.clip import WEIGHTS as TOY_WEIGHTS
from fastgen.errors import UserError
from fastgen.eval.images import Images, batches, to_pillow
from fastgen.eval.registry import Evidence
from fastgen.eval.weights import Weights, file_hash, locate
from fastgen.eval.world import TOY_FEATURES, World

BATCH = 64
SAFETENSORS = "open_clip_model.safetensors"
Tokenizer = Callable[..., Tensor]
"""Texts, and how many tokens at most, to token numbers [B, L]."""


class Reader(Protocol):
    """Something that reads prompts up to a length."""

    @property
    def name(self) -> str:
        """What it is called in sentences."""
        ...

    @property
    def context(self) -> int:
        """How many tokens of a prompt are read."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...


class Towers(Reader, Protocol):
    """A pair of encoders; both give unit vectors [B, D] in float32 on the CPU."""

    def see(self, images: Tensor) -> Tensor:
        """Embeddings of uint8 pictures [B, 3, H, W]."""
        ...

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts."""
        ...


@dataclass(frozen=True)
class Clip:
    """A model of open_clip's with its tokenizer; `preprocess` makes its pixels of uint8 pictures [B, 3, H, W]."""

    name: str
    model: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    tokenizer: Tokenizer
    context: int
    device: str

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of uint8 pictures [B, 3, H, W]."""
        seen: Tensor = self.model.encode_image(self.preprocess(images).to(self.device), normalize=True)  # type: ignore[operator]
        return seen.float().cpu()

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D] of prompts; what is longer than the context is cut off."""
        said: Tensor = self.model.encode_text(self.tokenizer(list(prompts)).to(self.device), normalize=True)  # type: ignore[operator]
        return said.float().cpu()


def by_pillow(transform: Callable[[Image.Image], Tensor]) -> Callable[[Tensor], Tensor]:
    """A transform of one Pillow picture as one of a uint8 batch."""
    return lambda images: torch.stack([transform(picture) for picture in to_pillow(images.cpu())])


def world_clip(world: World, device: str = "cpu") -> Clip:
    """The CLIP of a world: the toy world's own, or what open_clip calls MODEL/WEIGHTS.

    Raises UserError when the name is wrong or the weights are not at hand.
    """
    return toy_clip(device) if world.clip == TOY_FEATURES else known_clip(world.clip, world, device)


@lru_cache(maxsize=1)
def toy_clip(device: str = "cpu") -> Clip:
    """The CLIP that is shipped for the toy world."""
    if not toy_file().is_file():
        raise UserError(f"{toy_file()} is missing: the installation is incomplete")
    folder = f"local-dir:{TOY_WEIGHTS}"
    model, _, transform = open_clip.create_model_and_transforms(folder, device=device)
    return _clip("the toy world's CLIP", model, by_pillow(transform), open_clip.get_tokenizer(folder), device)


@lru_cache(maxsize=2)
def known_clip(name: str, world: World, device: str = "cpu") -> Clip:
    """The CLIP of open_clip's MODEL/WEIGHTS; `world` says where weights are looked for."""
    architecture, _, tag = name.partition("/")
    weights = clip_weights(name)
    path = locate(weights, world, what=f"CLIP {name}")
    config = open_clip.get_pretrained_cfg(architecture, tag)
    seen_as = {f"image_{key}": config[key] for key in ("mean", "std", "interpolation", "resize_mode") if config.get(key)}
    model, transform = build_clip(architecture, path, quick_gelu=bool(config.get("quick_gelu")), device=device, **seen_as)
    try:
        tokenizer = open_clip.get_tokenizer(architecture)
    except OSError as error:
        raise UserError(f"the tokenizer of CLIP {name} cannot be loaded: {error}") from error
    return _clip(f"CLIP {name}", model, by_pillow(transform), tokenizer, device)


def build_clip(
    architecture: str, path: Path, *, quick_gelu: bool, device: str, **options: Any
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """An architecture of open_clip's with the weights of a file, and its preprocessing. Raises UserError where they do not fit
    each other."""
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=str(path), force_quick_gelu=quick_gelu, device=device, **options
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights of open_clip's {architecture}: {first_line(error)}") from error
    return model, transform


def _clip(name: str, model: nn.Module, preprocess: Callable[[Tensor], Tensor], tokenizer: Tokenizer, device: str) -> Clip:
    context: Any = getattr(model, "context_length", None) or getattr(tokenizer, "context_length", 77)
    return Clip(name, model.eval().requires_grad_(False), preprocess, tokenizer, int(context), device)


def clip_weights(name: str) -> Weights:
    """Where the weights of open_clip's MODEL/WEIGHTS come from. Raises UserError when it knows none, or none as safetensors."""
    architecture, _, tag = name.partition("/")
    if (architecture, tag) not in open_clip.list_pretrained():
        raise UserError(f"open_clip has no model {name!r}; give model/weights, such as ViT-B-32/openai")
    repository, _, file = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rpartition("/")
    if not repository or file:
        raise UserError(f"the weights of CLIP {name} are not published as safetensors, and nothing else is read")
    return Weights(SAFETENSORS, repository)


def toy_file() -> Path:
    """The weights of the toy world's CLIP."""
    return TOY_WEIGHTS / SAFETENSORS


def hash_at_hand(weights: Weights, world: World) -> str | None:
    """SHA-256 of a file of weights that is on this machine; None where it is not."""
    try:
        return file_hash(locate(weights, replace(world, offline=True), what=weights.file))
    except UserError:
        return None


def embeddings(towers: Towers, images: Images, batch: int = BATCH) -> Tensor:
    """Unit vectors [N, D] of pictures."""
    return torch.cat([towers.see(shown) for shown in batches(images, batch)])


def cosines(towers: Towers, images: Images, prompts: Sequence[str], batch: int = BATCH) -> Tensor:
    """Cosine of each picture and its prompt: [N]."""
    found: list[Tensor] = []
    start = 0
    for shown in batches(images, batch):
        found.append((towers.see(shown) * towers.read(prompts[start : start + len(shown)])).sum(1))
        start += len(shown)
    return torch.cat(found)


def note_cut_prompts(evidence: Evidence, prompts: Sequence[str], reader: Reader) -> None:
    """Note how many prompts are longer than a network reads: it has not seen how they end."""
    if cut := cut_prompts(prompts, reader.tokenizer, reader.context):
        limit = f"longer than the {reader.context} tokens that {reader.name} reads"
        evidence.note(f"{cut} of {len(prompts)} prompts are {limit}; it saw their beginnings.")


def cut_prompts(prompts: Sequence[str], tokenizer: Tokenizer, context: int) -> int:
    """How many prompts have more than `context` tokens: cut at one more, they keep a word where the shorter cut has an end."""
    texts = list(prompts)
    if not texts:
        return 0
    short, long = tokenizer(texts, context), tokenizer(texts, context + 1)
    return int((short != long[:, :context]).any(1).sum())


def first_line(error: BaseException, length: int = 240) -> str:
    """The beginning of an error's sentence: torch names every tensor that does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:length]
