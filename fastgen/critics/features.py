"""Discriminators that see noised samples through a denoiser: heads on the features of some of its layers.

They are ordinary modules; a method makes them players.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.critics.facts import sample_facts
from fastgen.critics.heads import Heads
from fastgen.denoiser import Condition, Denoiser, Predicts, features_of
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


class FeatureCritic(nn.Module):
    """Heads on features of a frozen denoiser that is shown noised samples (LADD, Sauer et al. 2024; PCM's discriminator).

    `parameters()` are the heads' alone; gradients pass through the denoiser to the samples.
    """

    def __init__(
        self,
        backbone: Predicts,
        layers: Sequence[str],
        latent_shape: Sequence[int],
        condition: Condition,
        *,
        device: torch.device | str | None = None,
        width: int = 1280,
        conditioned: bool = False,
    ):
        """`condition` holds one sample. `conditioned`: the heads are told each sample's noise level and text.

        Raises UserError for layers that give nothing that a head can take.
        """
        super().__init__()
        object.__setattr__(self, "backbone", backbone)
        shapes = feature_shapes(backbone, layers, latent_shape, condition, device)
        self.known = sample_facts(torch.ones(1, device=device), condition).shape[1] if conditioned else 0
        self.layers, self.heads = tuple(layers), Heads(shapes, width, self.known).to(device)

    backbone: Predicts

    def forward(self, xt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits [B, L], above zero for real, of noised samples `xt` at times `t` [B]."""
        features = features_of(self.backbone, xt, t, condition, self.layers)
        known = sample_facts(t, condition) if self.known else None
        logits: Tensor = self.heads([features[layer] for layer in self.layers], known)
        return logits
