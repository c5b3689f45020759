"""Random draws: times, and choices that all processes share."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from fastgen.process import VP, Process, shift_time


def uniform_times(
    process: Process,
    count: int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`count` times, uniform between `low` and `high`, then moved towards noise by `shift`.

    On a table the draw is uniform over its entries; `low` 0.02 and `high` 0.98 of 1,000 are timesteps 20 to 979.
    """
    t = low + (high - low) * torch.rand(count, device=device)
    if shift == 1 and isinstance(process, VP):
        return (t * process.steps).floor().add(1).clamp(max=process.steps) / process.steps
    return process.snap(shift_time(t, shift))


def logit_normal_times(
    process: Process,
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """`count` times whose logit is normal (Esser et al. 2024, section 3.1), then moved towards noise by `shift`."""
    return process.snap(shift_time(torch.sigmoid(mean + std * torch.randn(count, device=device)), shift))


def drawn_scales(low: float, high: float, count: int, device: torch.device | str | None = None) -> Tensor:
    """`count` guidance scales, uniform between `low` and `high`."""
    return low + (high - low) * torch.rand(count, device=device)


def shared_choice(count: int, device: torch.device | str | None = None, weights: Tensor | None = None) -> int:
    """One of `count` positions, the same on every process; `weights` [count] say how often each is drawn, equally if None.

    A draw that decides how many network calls follow has to be shared: sharded networks wait for each other in every call.
    One process alone draws it on the CPU, where nobody waits for a GPU to come to it.
    """
    several = distributed.is_available() and distributed.is_initialized()
    place = device if several else "cpu"
    choice = torch.randint(count, (1,), device=place) if weights is None else torch.multinomial(weights.to(place), 1)
    if several:
        distributed.broadcast(choice, 0)
    return int(choice)


def shared_uniform(low: float = 0.0, high: float = 1.0, device: torch.device | str | None = None) -> float:
    """One number uniform between `low` and `high`, the same on every process; drawn as `shared_choice` is."""
    several = distributed.is_available() and distributed.is_initialized()
    value = low + (high - low) * torch.rand(1, device=device if several else "cpu")
    if several:
        distributed.broadcast(value, 0)
    return float(value)
