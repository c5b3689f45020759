"""The student's calls in training and in sampling, held against one another.

A student of several steps has to learn from inputs like those that its own earlier calls make (backward simulation: DMD2, Yin
et al. 2024, section 4.5). Where it learns from others its clean estimates at the same times differ between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastgen.process import Prediction

__all__ = ["Calls"]

NEAR = 1e-3
DECAY = 0.9
"""What a call in training leaves of those before it: the student moves on."""
FEWEST = 32
"""Samples, of training and of sampling, below which nothing is said."""


class Calls:
    """Statistics of a student's clean estimates at the times at which it is sampled."""

    def __init__(self) -> None:
        self.times: tuple[float, ...] = ()
        self.learning: Tensor | None = None
        self.sampled: Tensor | None = None
        self.sampling = False
        self.handle: RemovableHandle | None = None

    def follow(self, student: nn.Module, times: Sequence[float]) -> None:
        """Watch this student from now on; `times` are those of its sampler."""
        if self.handle is not None:
            self.handle.remove()
        self.times, self.learning, self.sampled = tuple(times), None, None
        self.handle = student.register_forward_hook(self.see) if len(self.times) > 1 else None

    def see(self, module: nn.Module, arguments: tuple[Any, ...], prediction: Any) -> None:
        """The hook: only calls that learn count in training, those before them are made in sampling's own way."""
        if not isinstance(prediction, Prediction) or torch._C._functorch.is_functorch_wrapped_tensor(prediction.output):
            return
        if not self.sampling and not (torch.is_grad_enabled() and prediction.output.requires_grad):
            return
        with torch.no_grad():
            total = self.sums(prediction)
        if self.sampling:
            self.sampled = total if self.sampled is None else self.sampled + total
        else:
            self.learning = total if self.learning is None else DECAY * self.learning + total

    def sums(self, prediction: Prediction) -> Tensor:
        """Number, sums and sums of squares, [times, 1 + 2 K], of K statistics of each clean estimate."""
        x0 = prediction.x0.detach().float()
        t = prediction.t.detach().float().reshape(-1).expand(len(x0)) if prediction.t.numel() == 1 else prediction.t.float()
        flat = x0.flatten(2) if x0.ndim > 2 else x0.unsqueeze(1)  # [B, C, ...]
        values = torch.cat([flat.mean(2), flat.square().mean(2).sqrt().log1p()], 1)  # [B, K]
        parts = torch.cat([torch.ones_like(values[:, :1]), values, values.square()], 1)
        parts = torch.where(torch.isfinite(parts).all(1, keepdim=True), parts, 0.0)
        times = torch.tensor(self.times, device=x0.device)
        at = ((t.reshape(-1)[None] - times[:, None]).abs() < NEAR).to(parts)  # [times, B]
        return at @ parts

    @contextmanager
    def in_sampling(self) -> Iterator[None]:
        """A block in which the student is sampled; what earlier blocks saw is forgotten."""
        self.sampling, self.sampled = True, None
        try:
            yield
        finally:
            self.sampling = False

    def gap(self) -> float | None:
        """How far apart the statistics in training and in sampling are, at the worst of the times but the first.

        The distance of the means in standard deviations, and of the logarithms of these; root mean square over the statistics,
        less what the number of samples explains. None where too little was seen. What
        training has shown is then forgotten.
        """
        learning, sampled, self.learning = self.learning, self.sampled, None
        if learning is None or sampled is None:
            return None
        worst = None
        for one, two in zip(learning.double().cpu()[1:], sampled.double().cpu()[1:], strict=True):
            if min(one[0], two[0]) < FEWEST:
                continue
            (mean, spread), (other, width) = moments(one), moments(two)
            variance = ((spread + width) / 2).clamp_min(1e-12)
            log_widths = 0.5 * (spread.clamp_min(1e-12).log() - width.clamp_min(1e-12).log())
            squared = ((mean - other).square() / variance + log_widths.square()).mean() - 1.5 / one[0] - 1.5 / two[0]
            worst = max(worst or 0.0, float(squared.clamp_min(0).sqrt()))
        return worst


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, [K] each, from a row of `Calls.sums`."""
    number, total, squares = sums[0], *sums[1:].chunk(2)
    mean = total / number
    return mean, (squares / number - mean.square()).clamp_min(0)
