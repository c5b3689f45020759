"""Cosmos Predict 2: latents of a variance-exploding process (EDM) around a network of rectified flow."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline
from fastgen.process import EDM, Kind, Process


class Cosmos2(Pipeline):
    """Cosmos Predict 2's network sees x / (1 + sigma) at time sigma / (1 + sigma) and predicts a flow; the scheduler, eps."""

    handles: ClassVar[tuple[str, ...]] = ("Cosmos2TextToImagePipeline",)
    knows_time: ClassVar[bool] = True

    def read_scheduler(self) -> tuple[Process, Kind]:
        config = self.diffusers.scheduler.config
        return EDM(config.sigma_min, config.sigma_max), "eps"

    def network_time(self, t: Tensor) -> Tensor:
        sigma = self.process.sigma(t)
        return sigma / (1 + sigma)

    def network_input(self, xt: Tensor, t: Tensor) -> Tensor:
        return xt / (1 + self.process.coefficients(t, xt)[1])

    def network_output(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """From the flow eps - x0: with x = x0 + sigma eps, eps is (x + flow) / (1 + sigma)."""
        return (xt + output) / (1 + self.process.coefficients(t, xt)[1])
