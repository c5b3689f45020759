"""CogView4: its network is told the time before the scheduler's shift, not the noise level."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline


class CogView4(Pipeline):
    """CogView4 hands its scheduler times of its own next to the levels; only the levels are shifted."""

    handles: ClassVar[tuple[str, ...]] = ("CogView4Pipeline",)

    def network_time(self, t: Tensor) -> Tensor:
        """The inverse of the shift, s -> s / (s + shift (1 - s)), in the scheduler's timesteps."""
        shift = self._shift()
        t = t.double()
        return super().network_time(t / (t + shift * (1 - t)))

    def _shift(self) -> float:
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        diffusers: Any = self.diffusers
        config = diffusers.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        tokens = math.prod(self.latent_shape[-2:]) // diffusers.transformer.config.patch_size**2
        base = config.get("base_image_seq_len", 256)
        shift = calculate_shift(tokens, base, config.get("base_shift", 0.25), config.get("max_shift", 0.75))
        return float(shift) if config.get("time_shift_type") == "linear" else math.exp(shift)
