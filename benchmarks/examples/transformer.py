"""A transformer on patches for latents of 4 x 16 x 16 (DiT; Peebles and Xie 2023), as a plain module for any framework.

What such a file needs is said in convolutions.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and two layers, each shifted, scaled and gated by what is known of the sample."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.known = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.known(known)[:, None].chunk(6, 2)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale) + shift).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class Transformer(nn.Module):
    """`depth` blocks on patches of 2 x 2. `lora_targets` are what an adapter would adapt."""

    lora_targets = ("qkv", "out", "mlp.0", "mlp.2")

    def __init__(
        self,
        sample_shape: tuple[int, int, int] = (4, 16, 16),
        condition_width: int = 32,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        patch: int = 2,
    ):
        super().__init__()
        self.sample_shape, self.condition_width, self.width, self.patch = sample_shape, condition_width, width, patch
        self.feature_layers = (f"blocks.{depth // 2}.norm1",)
        channels, height, breadth = sample_shape
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text = nn.Linear(condition_width, width) if condition_width else None
        self.enter = nn.Conv2d(channels, width, patch, stride=patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, height * breadth // patch**2, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, channels * patch**2)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(self.width // 2, device=t.device) / (self.width // 2))
        phase = 1000 * t.float()[:, None] * rates
        known = self.time(torch.cat([phase.sin(), phase.cos()], 1).to(x.dtype))
        if self.text is not None and condition is not None:
            known = known + self.text(condition)
        known = F.silu(known)
        tokens = self.enter(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens, known)
        flat = self.leave(self.norm(tokens)).transpose(1, 2)
        return F.fold(flat, x.shape[2:], self.patch, stride=self.patch)


def make() -> nn.Module:
    """The network that `--network transformer` is."""
    return Transformer()
