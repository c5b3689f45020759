"""A discriminator of the steps that a student takes, seen through a trainable copy of its teacher (SDXL-Lightning)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.critics.features import feature_shapes
from fastgen.critics.heads import Heads
from fastgen.denoiser import Condition, Denoiser, features_of


class TransitionCritic(nn.Module):
    """Tells where a teacher's steps end from where a student's do, given where they began or not (Lin et al. 2024, 3.2, 3.3).

    The backbone is a denoiser that learns with the heads. It is shown the end of a step at its noise level and, in a paired
    critic, the beginning too; the features of both are joined by channels. `parameters()` are the heads' and those of the
    backbone on which the features depend: what follows them takes no part.
    """

    def __init__(
        self,
        backbone: Denoiser,
        layers: Sequence[str],
        latent_shape: Sequence[int],
        condition: Condition,
        *,
        paired: bool,
        device: torch.device | str | None = None,
        width: int = 1280,
    ):
        """`condition` holds one sample. Raises UserError for layers that give nothing that a head can take."""
        super().__init__()
        object.__setattr__(self, "backbone", backbone)
        self.layers, self.width, self.device = tuple(layers), width, device
        self.shapes = feature_shapes(backbone, layers, latent_shape, condition, device)
        self.learned = nn.Module()
        for name, weight in self._reached(latent_shape, condition).items():
            self.learned.register_parameter(name.replace(".", "/"), weight)
        own = {id(weight) for weight in self.learned.parameters()}
        for weight in backbone.parameters():
            weight.requires_grad_(id(weight) in own)
        # Weights that are not loaded, as when memory is planned, cannot be copied to the CPU.
        self.start = {
            name: weight.detach().clone() if weight.is_meta else weight.detach().to("cpu", copy=True)
            for name, weight in self.learned.named_parameters()
        }
        self.renew(paired)

    backbone: Denoiser

    def renew(self, paired: bool) -> None:
        """A fresh critic: new heads, and the backbone as it was at first."""
        self.paired = paired
        with torch.no_grad():
            for name, weight in self.learned.named_parameters():
                weight.copy_(self.start[name])
        self.heads = Heads([doubled(shape) for shape in self.shapes] if paired else self.shapes, self.width).to(self.device)

    def forward(
        self, ends: Sequence[Tensor], level: Tensor, condition: Condition, xt: Tensor | None = None, t: Tensor | None = None
    ) -> list[Tensor]:
        """Logits [B, L], above zero for real, of each of `ends` [B, ...], all at times `level` [B].

        A paired critic needs the beginning, `xt` at times `t`, as well.
        """
        samples, times = list(ends), [level] * len(ends)
        if self.paired:
            assert xt is not None and t is not None
            samples, times = [*samples, xt.to(ends[0])], [*times, t]
        both = Condition.cat([condition] * len(samples))
        features = features_of(self.backbone, torch.cat(samples), torch.cat(times), both, self.layers)
        split = [features[layer].chunk(len(samples)) for layer in self.layers]
        logits = []
        for i in range(len(ends)):
            seen = [joined(parts[i], parts[-1]) if self.paired else parts[i] for parts in split]
            logits.append(self.heads(seen))
        return logits

    def _reached(self, latent_shape: Sequence[int], condition: Condition) -> dict[str, nn.Parameter]:
        """The backbone's weights on which its features depend."""
        named = {name: weight for name, weight in self.backbone.named_parameters() if weight.requires_grad}
        xt, half = torch.zeros(1, *latent_shape, device=self.device), torch.full((1,), 0.5, device=self.device)
        with torch.enable_grad():
            features = features_of(self.backbone, xt, half, condition, self.layers)
            total = torch.stack([feature.float().sum() for feature in features.values()]).sum()
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {name: weight for (name, weight), grad in zip(named.items(), grads, strict=True) if grad is not None}


def doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of two features of `shape` (without the batch) joined by channels."""
    return (2 * shape[0], *shape[1:]) if len(shape) >= 3 else (*shape[:-1], 2 * shape[-1])


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Two features [B, C, H, W], [B, C, frames, H, W], [B, N, C] or [B, C] joined by channels."""
    return torch.cat([a, b], 1 if a.ndim >= 4 else -1)
