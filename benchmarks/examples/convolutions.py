"""A U of convolutions for latents of 4 x 16 x 16, as a plain module that any framework can train.

What `--module FILE:FACTORY` of the benchmarks takes: FACTORY() returns an `nn.Module` called as `module(x, t, condition)`,

    x          [B, C, H, W]
    t          [B], 0 (data) to 1 (noise); the answer is taken for the flow's velocity, noise minus data
    condition  [B, D], or None for a module without `condition_width`

with three attributes: `sample_shape` (C, H, W), `condition_width` (D; 0: none) and `feature_layers`, the names of submodules
whose outputs a discriminator may look at (needed by methods that have one; otherwise empty).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, width] of times [B] from 0 to 1."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    phase = 1000 * t.float()[:, None] * rates
    return torch.cat([phase.sin(), phase.cos()], 1)


class Block(nn.Module):
    """Two convolutions around a shift and scale by what is known of the sample (as in Dhariwal and Nichol 2021)."""

    def __init__(self, channels: int, into: int, known: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, into)
        self.conv1, self.conv2 = nn.Conv2d(channels, into, 3, padding=1), nn.Conv2d(into, into, 3, padding=1)
        self.known = nn.Linear(known, 2 * into)
        self.skip = nn.Conv2d(channels, into, 1) if channels != into else nn.Identity()

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.known(known)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Convolutions(nn.Module):
    """Two resolutions of `width` and twice as many channels."""

    feature_layers = ("middle",)

    def __init__(self, sample_shape: tuple[int, int, int] = (4, 16, 16), condition_width: int = 32, width: int = 64):
        super().__init__()
        self.sample_shape, self.condition_width, self.width = sample_shape, condition_width, width
        channels, known = sample_shape[0], 2 * width
        self.time = nn.Sequential(nn.Linear(width, known), nn.SiLU(), nn.Linear(known, known))
        self.text = nn.Linear(condition_width, known) if condition_width else None
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.fine = nn.ModuleList([Block(width, width, known) for _ in range(2)])
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList([Block(2 * width, 2 * width, known) for _ in range(3)])
        self.middle = nn.Identity()
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.late = nn.ModuleList([Block(2 * width if i == 0 else width, width, known) for i in range(2)])
        self.norm, self.leave = nn.GroupNorm(8, width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        known = self.time(waves(t, self.width).to(x.dtype))
        if self.text is not None and condition is not None:
            known = known + self.text(condition)
        known = F.silu(known)
        h = self.enter(x)
        for block in self.fine:
            h = block(h, known)
        low = self.down(h)
        for block in self.coarse:
            low = block(low, known)
        low = F.interpolate(self.middle(low), scale_factor=2.0, mode="nearest")
        h = torch.cat([h, self.up(low)], 1)
        for block in self.late:
            h = block(h, known)
        return self.leave(F.silu(self.norm(h)))


def make() -> nn.Module:
    """The network that `--network conv` is."""
    return Convolutions()


def unconditional() -> nn.Module:
    """The same without a condition, and small."""
    return Convolutions(condition_width=0, width=16)
