"""Damage for toy renders, with known strength: what the metric networks are trained to notice.

A network trained on clean renders alone is blind to mush, because it never needed a feature that tells a crisp circle from a
smear. Here every image may be blurred, made noisy, recoloured, coarsened, cut up, blended with another scene or warped; the
strengths come back, in [0, 1], so that a head can be trained to predict them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CORRUPTIONS = ("blur", "noise", "contrast", "coarse", "shuffle", "blend", "warp")
DESTRUCTIVE = ("shuffle", "blend")
"""Corruptions after which the scene's description no longer holds."""

BLUR_SIGMAS = (0.0, 0.5, 0.9, 1.5, 2.4, 3.5)
COARSE_SIZES = (32, 24, 18, 13, 9, 6)
PATCH = 8


def corrupt(images: Tensor, generator: torch.Generator, *, probability: float = 0.12) -> tuple[Tensor, Tensor]:
    """Damage each image by each corruption with `probability`: images [B, 3, H, W] in [-1, 1], strengths [B, 7] in [0, 1]."""
    images, strengths = images.clone(), torch.zeros(len(images), len(CORRUPTIONS))
    donors = images.clone()
    for k, name in enumerate(CORRUPTIONS):
        chosen = (torch.rand(len(images), generator=generator) < probability).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        strength = torch.rand(len(chosen), generator=generator)
        images[chosen], strengths[chosen, k] = _damage(name, images[chosen], strength, donors, generator)
    return images.clamp(-1, 1), strengths


def damage(images: Tensor, name: str, strength: float, generator: torch.Generator) -> Tensor:
    """Apply one corruption of `CORRUPTIONS` at one strength in [0, 1] to every image [B, 3, H, W]."""
    damaged, _ = _damage(name, images, torch.full((len(images),), strength), images, generator)
    return damaged.clamp(-1, 1)


def _damage(name: str, images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    table: dict[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]] = {
        "blur": _blur,
        "noise": _noise,
        "contrast": _contrast,
        "coarse": _coarse,
        "shuffle": _shuffle,
        "blend": _blend,
        "warp": _warp,
    }
    return table[name](images, strength, donors, generator)


def _between_levels(levels: list[Tensor], strength: Tensor) -> Tensor:
    """Interpolate each image between equally spaced levels of damage."""
    place = strength * (len(levels) - 1)
    below = place.floor().long().clamp_max(len(levels) - 2)
    stack, index = torch.stack(levels), torch.arange(len(strength))
    return torch.lerp(stack[below, index], stack[below + 1, index], (place - below)[:, None, None, None])


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images [B, C, H, W] by a Gaussian of `sigma` pixels, repeating the border."""
    if sigma == 0:
        return images
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, None, None, :], groups=images.shape[1])
    return F.conv2d(rows, kernel[:, None, :, None], groups=images.shape[1])


def _blur(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _between_levels([gaussian_blur(images, sigma) for sigma in BLUR_SIGMAS], strength), strength


def _noise(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """White noise in half of the images, noise of 4-pixel grain in the other half; standard deviation up to 0.6."""
    size = images.shape[2]
    white = torch.randn(images.shape, generator=generator)
    grain = F.interpolate(torch.randn(len(images), 3, size // 4, size // 4, generator=generator), size, mode="bicubic")
    kind = (torch.rand(len(images), generator=generator) < 0.5)[:, None, None, None]
    return images + 0.6 * strength[:, None, None, None] * torch.where(kind, white, grain), strength


def _contrast(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contrast down to 0.2 or up to 2, and a colour cast up to 0.4."""
    number = len(images)
    down = torch.rand(number, generator=generator) < 0.6
    factor = torch.where(down, 1 - 0.8 * strength, 1 + strength)[:, None, None, None]
    cast = 0.4 * strength[:, None] * (torch.rand(number, 3, generator=generator) * 2 - 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * factor + mean + cast[:, :, None, None], strength


def _coarse(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    size = images.shape[2]
    levels = [images]
    for small in COARSE_SIZES[1:]:
        reduced = F.interpolate(images, small * size // 32, mode="area")
        levels.append(F.interpolate(reduced, size, mode="bicubic"))
    return _between_levels(levels, strength), strength


def _shuffle(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace a share of the 8 x 8 patches by patches from elsewhere in the same image; returns the share replaced."""
    number, size = len(images), images.shape[2]
    patches = F.unfold(images, PATCH, stride=PATCH)
    count = patches.shape[2]
    order = torch.rand(number, count, generator=generator).argsort(1)
    moved = torch.rand(number, count, generator=generator) < 0.6 * strength[:, None]
    source = torch.where(moved, order, torch.arange(count))
    mixed = patches.gather(2, source[:, None, :].expand_as(patches))
    return F.fold(mixed, size, PATCH, stride=PATCH), moved.float().mean(1)


def _blend(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix in another scene: everywhere alike in half of the images, by a smooth random mask in the other half."""
    number, size = len(images), images.shape[2]
    other = donors[torch.randint(len(donors), (number,), generator=generator)]
    field = F.interpolate(torch.rand(number, 1, 5, 5, generator=generator), size, mode="bicubic", align_corners=True)
    kind = (torch.rand(number, generator=generator) < 0.5)[:, None, None, None]
    weight = torch.where(kind, torch.full_like(field, 0.5), ((field - 0.5) * 4 + 0.5).clamp(0, 1))
    return torch.lerp(images, other, weight * strength[:, None, None, None]), strength


def _warp(images: Tensor, strength: Tensor, donors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move pixels by a smooth random field of up to about 5 pixels (wobbly outlines)."""
    number, size = len(images), images.shape[2]
    field = torch.randn(number, 2, 8, 8, generator=generator)
    field = F.interpolate(field, size, mode="bicubic", align_corners=True) * (2.5 * 2 / size) * strength[:, None, None, None]
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False), strength
