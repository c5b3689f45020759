"""A discriminator of pictures: light heads on the features of a frozen image network (ADD; StyleGAN-T, Sauer et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgen.backbones import Backbone
from fastgen.critics.heads import PROJECTION, groups_for


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + x) / math.sqrt(2)


def token_block(channels: int, kernel: int) -> nn.Sequential:
    """A spectrally normalised convolution over a circle of tokens [B, C, N], group norm, leaky ReLU."""
    convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution), nn.GroupNorm(groups_for(channels), channels), nn.LeakyReLU(0.2))


def sequence_head(channels: int, tokens: int, outputs: int = 1) -> nn.Sequential:
    """StyleGAN-T's head: a convolution over 1 token, a residual one over 9 (fewer where there are fewer), [B, outputs, N].

    Group instead of batch normalisation, so that samples do not see each other.
    """
    kernel = min(9, tokens - 1 + tokens % 2)
    # A bias here would add the same to real and fake, which are told the same: the hinge loss has no gradient for it.
    last = spectral_norm(nn.Conv1d(channels, outputs, 1, bias=False))
    return nn.Sequential(token_block(channels, 1), Residual(token_block(channels, kernel)), last)


class PixelCritic(nn.Module):
    """Heads on several depths of a frozen backbone; `parameters()` are the heads' alone.

    Heads may be told a vector of each sample (`known` numbers), which a projection turns into their last layer's weights.
    They compute in float32 whatever precision the rest runs in.
    """

    def __init__(self, backbone: Backbone, size: Sequence[int], known: int = 0):
        """`size`: height and width of the images."""
        super().__init__()
        object.__setattr__(self, "backbone", backbone)
        with torch.no_grad():
            shapes = [tuple(each.shape[1:]) for each in backbone(torch.zeros(1, 3, *size, device=backbone.mean.device))]
        self.channels = shapes[-1][0]
        self.heads = nn.ModuleList(sequence_head(c, n, PROJECTION if known else 1) for c, n in shapes)
        self.projections = nn.ModuleList(nn.Linear(known, PROJECTION) for _ in shapes) if known else None

    backbone: Backbone

    def forward(self, images: Tensor, known: Tensor | None = None) -> Tensor:
        """Logits [B, L], above zero for real, of `images` [B, 3, H, W] in [-1, 1]; `known` [B, K]."""
        return self.judge(self.backbone(images), known)

    def judge(self, features: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
        """Logits [B, L] from the backbone's features [B, C, N]."""
        logits = []
        with torch.autocast(features[0].device.type, enabled=False):
            for i, (head, feature) in enumerate(zip(self.heads, features, strict=True)):
                answer = head(feature.float())
                if self.projections is not None:
                    assert known is not None
                    weights = self.projections[i](known.float()).unsqueeze(2)
                    answer = (answer * weights).sum(1) / math.sqrt(PROJECTION)
                logits.append(answer.flatten(1))
        return torch.cat(logits, 1)

    def penalty(self, features: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
        """R1 (Mescheder et al. 2018) on what the heads look at (ADD, section 3.2): the mean over samples of the squared
        gradient of the heads' summed logits by their features."""
        inputs = [feature.detach().float().requires_grad_() for feature in features]
        slopes = torch.autograd.grad(self.judge(inputs, known).sum(), inputs, create_graph=True)
        return torch.stack([slope.square().flatten(1).sum(1) for slope in slopes]).sum(0).mean()

    @torch.no_grad()
    def image_facts(self, images: Tensor) -> Tensor:
        """A vector [B, C] of the whole of each image: the mean of the deepest features, normalised, float32."""
        pooled = self.backbone(images)[-1].float().mean(2)
        return F.layer_norm(pooled, pooled.shape[1:])
