"""An exponential moving average of a network's own weights, by a decay, a half-life or a power function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.config import TrainConfig
from fastgen.training.sharding import local_part, part_like

__all__ = ["EMA", "course_of_decay", "exponent", "half_life", "power", "warmed"]

Decay = Callable[[int], float]  # the decay in update n = 0, 1, ...
RAMP = 0.05


class EMA:
    """The average of a module's trainable weights, in float32 at least; sharded where they are.

    A decay that is a number warms up as min(decay, (1 + n) / (10 + n)) over the updates n = 0, 1, ..., so that a short run is
    not an average of its start.
    """

    def __init__(self, module: nn.Module, decay: float | Decay):
        """`decay` in [0, 1), or what it is in update n. Only weights that require a gradient now are averaged: a shared base
        never is.
        """
        self.decay: Decay = decay if callable(decay) else warmed(decay)
        self.updates = 0
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.average = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in self.weights.items()
        }

    def follows(self, weights: Sequence[Tensor]) -> bool:
        """Whether some of `weights` are averaged here."""
        return not {id(weight) for weight in self.weights.values()}.isdisjoint(id(weight) for weight in weights)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        decay = self.decay(self.updates)
        self.updates += 1
        average = [local_part(average) for average in self.average.values()]
        weights = [local_part(weight) for weight in self.weights.values()]
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


# -- courses of the decay ---------------------------------------------------------------------------


def course_of_decay(options: TrainConfig, batch: int) -> Decay | None:
    """What a run's options say of the average; None where there is none. `batch` is that of all processes together."""
    if options.ema_halflife:
        return half_life(options.ema_halflife, batch)
    if options.ema_sigma_rel:
        return power(options.ema_sigma_rel)
    return warmed(options.ema) if options.ema else None


def warmed(decay: float) -> Decay:
    """`decay`, but (1 + n) / (10 + n) while that is less."""
    return lambda n: min(decay, (1 + n) / (10 + n))


def half_life(samples: int, batch: int) -> Decay:
    """A weight counts half after so many samples of training, at first after a twentieth of those seen so far (Karras et al.
    2022, arXiv:2206.00364, table 7: a ramp-up ratio of 0.05).
    """

    def decay(n: int) -> float:
        life = min(samples, RAMP * n * batch)
        return 0.5 ** (batch / life) if life else 0.0

    return decay


def power(sigma_rel: float) -> Decay:
    """The average's weight at time t is proportional to t^gamma, in every run of whatever length the same share of it (Karras
    et al. 2024, arXiv:2312.02696, eq. 2): beta(t) = (1 - 1/t)^(gamma + 1), t = 1, 2, ...
    """
    gamma = exponent(sigma_rel)
    return lambda n: float((1 - 1 / (n + 1)) ** (gamma + 1))


def exponent(sigma_rel: float) -> float:
    """The gamma whose profile has the standard deviation `sigma_rel`, in (0, 0.28], as a share of the run.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (arXiv:2312.02696, appendix C), solved as a cubic.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy `values`, whole or sharded as they are, into the tensors of the same names."""
    for name, value in values.items():
        weights[name].copy_(part_like(weights[name], value))
