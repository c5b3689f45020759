"""SANA-Sprint: TrigFlow around a network of rectified flow (Chen et al. 2025, 3.1)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.pipelines.base import Pipeline


class SanaSprint(Pipeline):
    """SANA-Sprint's network is asked as a rectified flow; its answer is turned into TrigFlow's v, at unit data scale."""

    handles: ClassVar[tuple[str, ...]] = ("SanaSprintPipeline",)
    knows_time: ClassVar[bool] = True

    def __init__(self, diffusers: Any, **options: Any):
        self.scheduler_scale = diffusers.scheduler.config.sigma_data
        super().__init__(diffusers, **options)

    def network_time(self, t: Tensor) -> Tensor:
        """The rectified flow's time of equal noise-to-signal ratio: sin / (sin + cos) of the angle."""
        angle = t * (math.pi / 2)
        return (angle.sin() / (angle.sin() + angle.cos())).float()

    def network_input(self, xt: Tensor, t: Tensor) -> Tensor:
        return xt * self._length(xt, t)

    def network_output(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Equation 6 of the paper, for data of unit scale."""
        time, length = self._time(xt, t), self._length(xt, t)
        return ((1 - 2 * time) * xt * length + (1 - 2 * time + 2 * time**2) * output) / length

    def _time(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.network_time(t).reshape(-1, *[1] * (xt.ndim - 1))

    def _length(self, xt: Tensor, t: Tensor) -> Tensor:
        """Of the vector (alpha, sigma) of a rectified flow, which TrigFlow keeps at 1."""
        time = self._time(xt, t)
        return torch.sqrt(time**2 + (1 - time) ** 2)
