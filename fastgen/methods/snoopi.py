"""SNOOPI's training: SwiftBrush under guidance of random strength."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastgen.errors import UserError
from fastgen.losses import drawn_scales
from fastgen.methods.swiftbrush import SwiftBrush


@dataclass
class Snoopi(SwiftBrush):
    """SNOOPI: SwiftBrush with proper guidance, PG-SB (Nguyen et al. 2024).

    Teacher and, unless `fake_guidance` is set, fake score are guided by one scale drawn for every sample, which keeps
    teachers other than SD 2.1 from collapsing: 0.5 to 4 for the Stable Diffusions, 0.5 to 3 for PixArt-alpha. Its negative
    prompts (NASA) take no training: `fastgen sample --negative-prompt`, `fastgen.pipelines.negative`.

    A network that embeds its guidance is told the drawn scale, teacher and fake score alike, and the student its usual one.
    Differences from the paper: those of SwiftBrush; the additions of SwiftBrush v2 that it starts from (a CLIP reward,
    merging of two students) are not part of it.
    """

    guidance: float | None = field(
        default=None,
        metadata={"help": "not to be set: the guidance is drawn between the two scales that follow", "at_least": 1},
    )
    guidance_low: float = field(default=0.5, metadata={"help": "least guidance", "at_least": 0})
    guidance_high: float = field(default=4.0, metadata={"help": "greatest guidance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance is not None:
            raise UserError(
                f"guidance = {self.guidance:g} has no place beside guidance_low = {self.guidance_low:g} and "
                f"guidance_high = {self.guidance_high:g}, between which it is drawn; drop it, or use swiftbrush"
            )
        if self.guidance_low >= self.guidance_high:
            raise UserError(f"guidance_low = {self.guidance_low:g} must be below guidance_high = {self.guidance_high:g}")

    def scales(self, count: int) -> Tensor | None:
        return drawn_scales(self.guidance_low, self.guidance_high, count, self.device)
