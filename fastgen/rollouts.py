"""Walks along a grid of times: what teachers do between two points of a student, and students between two of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Predicts
from fastgen.errors import UserError
from fastgen.process import Process
from fastgen.samplers import even_times


def time_grid(
    option: str, steps: int, process: Process, shift: float = 1.0, device: torch.device | str | None = None
) -> Tensor:
    """The times [steps + 1] from 1 down to 0, even but for `shift`.

    Raises UserError, naming the `option` that asks for so many steps, where the process has fewer times.
    """
    times = even_times(steps, process, shift)
    own = len({t for t in times if t > 0})
    if own < steps:
        raise UserError(f"{option} is finer than the pipeline's own times, of which it meets {own}")
    return torch.tensor([*times, 0.0], device=device)


def walk(
    denoiser: Predicts,
    x: Tensor,
    times: Tensor,
    start: Tensor,
    steps: int,
    condition: Condition,
    guidance: Tensor | None = None,
) -> Tensor:
    """`steps` DDIM steps (Euler steps, for a flow) down the grid `times` [G], each sample from its own position.

    `x` [B, ...] is at `times[start]`, `start` [B] integer; the answer, in x's precision, at `times[start + steps]`. `guidance`
    [B] is handed to every call. Calls are made with gradient if gradients are enabled.
    """
    for i in range(steps):
        x = denoiser(x, times[start + i], condition, guidance=guidance).at(times[start + i + 1]).to(x.dtype)
    return x
