"""Discriminator heads on the features of a network.

The head on maps is that of DMD2 (Yin et al. 2024b, section 4.3 and appendix): convolutions of stride 2 down to one logit. Token
features, as of transformers, get a logit per token instead. Heads that are told something of a sample, its noise level or its
text, answer with a vector; its product with a projection of that is the logit (Miyato and Koyama 2018; StyleGAN-T, Sauer et al.
2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

PROJECTION = 64
"""Length of the vector that a head answers with where it is told something of the sample."""


def groups_for(channels: int) -> int:
    """As many groups as divide the channels, 32 at most, with at least 4 channels each.

    A group of one element is normalised to zero, which would cut the head off from its input at 1 x 1.
    """
    return max((n for n in range(1, 33) if channels % n == 0 and channels // n >= 4), default=1)


def map_head(channels: int, height: int, width: int, hidden: int, outputs: int = 1) -> nn.Sequential:
    """A head on maps [B, channels, height, width] that gives [B, outputs, 1, 1].

    4 x 4 convolutions of stride 2 while the longer side is above 4, then one over what is left.
    """
    layers: list[nn.Module] = []

    def stage(into: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        layers.extend([nn.Conv2d(into, hidden, kernel, stride, padding), nn.GroupNorm(groups_for(hidden), hidden), nn.SiLU()])

    while max(height, width) > 4:
        # A side of 1 stays 1, between two rows of zeros on either hand.
        stage(channels, (4, 4), 2, (1 if height > 1 else 2, 1 if width > 1 else 2))
        height, width = (n // 2 if n > 1 else 1 for n in (height, width))
        channels = hidden
    layers.append(nn.AdaptiveAvgPool2d((height, width)))  # as it is, but for maps of another resolution than the head's
    stage(channels, (height, width), 1, (0, 0))
    return nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 1))


def token_head(channels: int, hidden: int, outputs: int = 1) -> nn.Sequential:
    """A head on tokens [B, N, channels] that gives a logit each, [B, N, outputs]."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class Heads(nn.Module):
    """One head per feature, made for features of these shapes (without the batch): as wide, within 32 to `width`.

    `known` is the length of the vector that they are told of each sample; 0: none.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], width: int = 1280, known: int = 0):
        super().__init__()
        heads: list[nn.Module] = []
        outputs = PROJECTION if known else 1
        for shape in shapes:
            if len(shape) >= 3:
                heads.append(map_head(shape[0], shape[-2], shape[-1], min(width, max(shape[0], 32)), outputs))
            else:
                heads.append(token_head(shape[-1], min(width, max(shape[-1], 32)), outputs))
        self.heads = nn.ModuleList(heads)
        self.projections = nn.ModuleList(nn.Linear(known, PROJECTION) for _ in heads) if known else None

    def forward(self, features: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
        """Logits [B, L], above zero for real: one per map, video frame or token, heads side by side; `known` [B, K]."""
        logits = []
        for i, (head, feature) in enumerate(zip(self.heads, features, strict=True)):
            dtype = next(head.parameters()).dtype
            feature = feature.to(dtype)
            if feature.ndim == 5:  # [B, C, frames, H, W]: frames one by one
                answer = head(feature.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(feature), -1))
            else:
                answer = head(feature)
            if self.projections is not None:
                assert known is not None
                answer = answer.view(len(feature), -1, PROJECTION) @ self.projections[i](known.to(dtype)).unsqueeze(2)
                answer = answer / math.sqrt(PROJECTION)
            logits.append(answer.view(len(feature), -1))
        return torch.cat(logits, 1)
