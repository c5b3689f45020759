"""Discriminators on the features of a denoiser. They are ordinary modules; a method makes them players.

The head is that of DMD2 (Yin et al. 2024b, section 4.3 and appendix): convolutions of stride 2 down to one logit. Token
features, as of transformers, get a logit per token instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser, Predicts
from fastgen.errors import UserError


def feature_shapes(
    denoiser: Predicts,
    layers: Sequence[str],
    latent_shape: Sequence[int],
    condition: Condition,
    device: torch.device | str | None = None,
) -> list[tuple[int, ...]]:
    """Shapes, without the batch, of what `layers` give for one latent: one call without gradient.

    `condition` holds one sample. Raises UserError for a layer that gives no tensor of a shape that a head can take.
    """
    with torch.no_grad():
        xt, half = torch.zeros(1, *latent_shape, device=device), torch.full((1,), 0.5, device=device)
        features = denoiser(xt, half, condition, features=layers).features or {}
    for layer in layers:
        shape = tuple(features[layer].shape) if layer in features else None
        if shape is None or not 2 <= len(shape) <= 5:
            raise UserError(
                f"layer {layer!r} gives features of shape {shape}; a critic needs [B, C], [B, N, C] or [B, C, H, W]"
            )
    return [tuple(features[layer].shape[1:]) for layer in layers]


def groups_for(channels: int) -> int:
    """As many groups as divide the channels, 32 at most, with at least 4 channels each.

    A group of one element is normalised to zero, which would cut the head off from its input at 1 x 1.
    """
    return max((n for n in range(1, 33) if channels % n == 0 and channels // n >= 4), default=1)


def map_head(channels: int, height: int, width: int, hidden: int) -> nn.Sequential:
    """A head on maps [B, channels, height, width] that gives [B, 1, 1, 1].

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
    stage(channels, (height, width), 1, (0, 0))
    return nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))


def token_head(channels: int, hidden: int) -> nn.Sequential:
    """A head on tokens [B, N, channels] that gives a logit each, [B, N, 1]."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, 1))


class Heads(nn.Module):
    """One head per feature, made for features of these shapes (without the batch): as wide, within 32 to `width`."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], width: int = 1280):
        super().__init__()
        heads: list[nn.Module] = []
        for shape in shapes:
            if len(shape) >= 3:
                heads.append(map_head(shape[0], shape[-2], shape[-1], min(width, max(shape[0], 32))))
            else:
                heads.append(token_head(shape[-1], min(width, max(shape[-1], 32))))
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, L], above zero for real: one per map, video frame or token, heads side by side."""
        logits = []
        for head, feature in zip(self.heads, features, strict=True):
            feature = feature.to(next(head.parameters()).dtype)
            if feature.ndim == 5:  # [B, C, frames, H, W]: frames one by one
                frames = feature.transpose(1, 2)
                logits.append(head(frames.flatten(0, 1)).view(len(feature), -1))
            else:
                logits.append(head(feature).view(len(feature), -1))
        return torch.cat(logits, 1)


class ScoreCritic(nn.Module):
    """A fake-score network whose features also feed a discriminator (DMD2). `layers` may be empty: a fake score alone."""

    def __init__(self, fake: Denoiser, layers: Sequence[str] = (), shapes: Sequence[tuple[int, ...]] = ()):
        super().__init__()
        self.fake, self.layers = fake, tuple(layers)
        self.heads = Heads(shapes) if layers else None

    def logits(self, features: dict[str, Tensor] | None) -> Tensor:
        """Logits [B, L] from the features that a call of the fake score with `features=critic.layers` returned."""
        assert self.heads is not None and features is not None
        return self.heads([features[layer] for layer in self.layers])


__all__ = ["Heads", "ScoreCritic", "feature_shapes", "groups_for", "map_head", "token_head"]
