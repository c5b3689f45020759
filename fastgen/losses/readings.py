"""What losses tell about how training is going, beside their values: means by name and by noise level.

A loss hands over numbers that it has computed anyway. Nothing happens where nobody listens; where somebody does, sums are kept
on the device without a gradient, so that no reading waits for the device, draws a random number or changes a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.losses.distances import wide

__all__ = [
    "LEVELS",
    "Readings",
    "Summary",
    "heard",
    "listen",
    "record",
    "record_answers",
    "record_derivative",
    "record_pull",
    "record_scores",
]

LEVELS = 4
"""Into how many equal ranges of the time from 0 to 1 readings are sorted."""

Joint = Callable[[Tensor], Tensor]
"""Adds up a tensor over the processes."""


@dataclass(frozen=True)
class Summary:
    """What was recorded under one name: number, sum and sum of squares, one of each or one a noise level."""

    counts: tuple[float, ...]
    sums: tuple[float, ...]
    squares: tuple[float, ...]

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def sum(self) -> float:
        return sum(self.sums)

    @property
    def error(self) -> float:
        """The standard error of `sum`, for samples that do not know of one another and have a mean near zero."""
        return float(sum(self.squares) ** 0.5)

    @property
    def mean(self) -> float | None:
        """Over all levels; None where nothing was recorded."""
        return self.sum / self.count if self.count else None

    def at(self, level: int, fewest: float = 1) -> float | None:
        """The mean in one level; None where fewer than `fewest` samples fell into it."""
        return self.sums[level] / self.counts[level] if self.counts[level] >= max(fewest, 1) else None


class Readings:
    """Running sums by name, kept on the device until `take`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, values: Tensor, t: Tensor | None = None) -> None:
        """Take in a number a sample, [B]; with times `t` [B] they are sorted by noise level. What is not finite is left out."""
        values = values.detach().float().flatten()
        finite = torch.isfinite(values)
        values = torch.where(finite, values, 0.0)
        parts = torch.stack([finite.to(values), values, values.square()], 1)  # [B, 3]
        if t is None:
            total = parts.sum(0, keepdim=True)
        else:
            level = (t.detach().float().flatten() * LEVELS).clamp(0, LEVELS - 1).floor()
            total = (level[None] == torch.arange(LEVELS, device=level.device)[:, None]).to(parts) @ parts
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def take(self, joint: Joint | None = None) -> dict[str, Summary]:
        """Everything since the last call, added up over the processes by `joint`; each must have recorded the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        together = torch.cat([self.sums[name] for name in names])
        rows = (joint(together) if joint else together).tolist()
        found, start = {}, 0
        for name in names:
            part = rows[start : start + len(self.sums[name])]
            start += len(part)
            counts, sums, squares = (tuple(row[i] for row in part) for i in range(3))
            found[name] = Summary(counts, sums, squares)
        self.sums = {}
        return found

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {name: total.tolist() for name, total in self.sums.items()}

    def load_state(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        self.sums = {name: torch.tensor(total, device=device) for name, total in state.items()}


_listener: Readings | None = None


@contextmanager
def listen(readings: Readings | None) -> Iterator[None]:
    """A block in which what losses record goes to `readings`."""
    global _listener
    before, _listener = _listener, readings
    try:
        yield
    finally:
        _listener = before


def heard() -> bool:
    """Whether anybody listens."""
    return _listener is not None


def record(name: str, values: Tensor, t: Tensor | None = None) -> None:
    """Record one number a sample, [B], sorted by noise level where times `t` [B] are given."""
    if _listener is not None:
        _listener.add(name, values, t)


@torch.no_grad()
def record_scores(x: Tensor, fake: Tensor, real: Tensor, t: Tensor) -> None:
    """How well fake score and teacher denoise the student's samples `x` [B, ...], from their clean estimates at `t` [B].

    Recorded are the mean squared errors, that of the one from the other (`score_gap`), and `score_lag`, the mean product of
    x - fake and real - fake. For a fake score that is the mean of x given x_t the last is zero on average, whatever the teacher
    says, since its error is orthogonal to every function of x_t; where the student runs ahead of the fake score it is not.
    """
    if _listener is None:
        return
    x, fake, real = wide(x.detach()), wide(fake.detach()), wide(real.detach())
    _listener.add("fake_error", _mean((x - fake).square()), t)
    _listener.add("teacher_error", _mean((x - real).square()), t)
    _listener.add("score_gap", _mean((real - fake).square()), t)
    _listener.add("score_lag", _mean((x - fake) * (real - fake)), t)


@torch.no_grad()
def record_pull(x: Tensor, gradient: Tensor) -> None:
    """The root mean square of the gradient that is put on samples `x` [B, ...], and of `x` itself."""
    if _listener is None:
        return
    _listener.add("pull", _mean(wide(gradient.detach()).square().expand(x.shape)).sqrt())
    _listener.add("pulled", _mean(wide(x.detach()).square()).sqrt())


@torch.no_grad()
def record_answers(real: Tensor, fake: Tensor, t: Tensor | Sequence[Tensor] | None = None, threshold: float = 0.0) -> None:
    """How often a discriminator is right, from its logits [B, ...]; above `threshold` means real.

    `t` [B] are the times at which it was shown both, or a pair of times, of real samples and of fake ones.
    """
    if _listener is None:
        return
    times = (None, None) if t is None else (t, t) if isinstance(t, Tensor) else t
    _listener.add("discriminator_real", _mean((real.detach() > threshold).float()), times[0])
    _listener.add("discriminator_fake", _mean((fake.detach() < threshold).float()), times[1])


@torch.no_grad()
def record_derivative(answer: Tensor, change: Tensor, where: Tensor | None = None) -> None:
    """The root mean squares of `change` [B, ...], the derivative of `answer` [B, ...] along a trajectory, and of that.

    `where` [B], boolean: the samples that have one, by default all.
    """
    if _listener is None:
        return
    known = torch.ones(len(answer), dtype=torch.bool, device=answer.device) if where is None else where
    for name, values in (("derivative", change), ("derived", answer)):
        size = _mean(wide(values.detach()).square()).sqrt()
        _listener.add(name, torch.where(known, size, torch.nan))


def _mean(values: Tensor) -> Tensor:
    """Over all but the batch."""
    return values.reshape(len(values), -1).mean(1)
