"""PRX on pixels: a rectified flow whose network predicts the image itself."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline

EARLIEST = 0.05


class PRXPixel(Pipeline):
    """PRX on pixels tells its scheduler the flow (x - x0) / t, with t at least 0.05."""

    handles: ClassVar[tuple[str, ...]] = ("PRXPixelPipeline",)

    def network_output(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return (xt - output) / self.process.coefficients(t, xt)[1].clamp_min(EARLIEST)
