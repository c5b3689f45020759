"""An exponential moving average of a network's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """The average of a module's trainable weights, in float32 at least.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the updates n = 0, 1, ..., so that a short run is not an average
    of its start.
    """

    def __init__(self, module: nn.Module, decay: float):
        """`decay` in [0, 1). Only weights that require a gradient now are averaged: a shared base never is."""
        self.decay, self.updates = decay, 0
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.average = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average, weights = list(self.average.values()), [weight.detach() for weight in self.weights.values()]
        torch._foreach_lerp_(average, [w.to(a.dtype) for w, a in zip(weights, average, strict=True)], 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within this block `module` (the averaged one, or its twin) computes with the average; then its weights are back."""
        weights = dict(module.named_parameters())
        kept = {name: weights[name].detach().clone() for name in self.average}
        fill(weights, self.average)
        try:
            yield
        finally:
            fill(weights, kept)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, under the names of the module's weights; the count of updates goes beside."""
        return dict(self.average)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Inverse of `tensors`."""
        fill(self.average, tensors)
        self.updates = updates


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the tensors of the same names."""
    for name, value in values.items():
        weights[name].copy_(value)
