"""Phased consistency distillation: consistency within each of a few phases, sampled without renewing noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fastgen.errors import UserError
from fastgen.families.consistency import AdversarialConsistency
from fastgen.samplers import FewStep


@dataclass
class PCM(AdversarialConsistency):
    """Phased consistency models (Wang et al. 2024).

    The trajectory is cut into `steps` phases. The student's jumps from two neighbouring points meet at the clean end of their
    phase, so that sampling goes from edge to edge and renews no noise. Without the teacher's guidance
    (`guidance_low = guidance_high = 1`) and with some `prompt_dropout` the student can be guided in sampling as its teacher.

    Differences from the authors' code: the adversary is off unless it is given a weight; an update moves the adversary and
    then the student, two of their iterations; its heads see the pipeline's feature layers, not every block; samples are
    diffused to it with the exact kernel for flow models too, where the code for SD3 adds too little noise; at t = 1 the input
    is noise alone; the last phase ends at clean data. Their guidance (plus 1 here) is 5 to 6 on SD 1.5, 7 to 8 on SDXL, 4 on
    SD3, with 50, 40 and 100 points of the grid.
    """

    guidance_low: float = field(default=5.0, metadata={"help": "least guidance scale of the teacher, 1 = off"})
    guidance_high: float = field(default=6.0, metadata={"help": "greatest guidance scale of the teacher"})
    steps: int = field(default=4, metadata={"help": "phases, and network calls a sample, 1 to 16"})
    grid: int = field(default=40, metadata={"help": "points of the solver grid; best a multiple of steps"})

    most_steps: ClassVar[int] = 16

    @property
    def reach(self) -> float:
        return 1 / self.steps

    def end(self, start: Tensor) -> Tensor:
        return self.edge_below(start, self.steps)

    def sampler(self, steps: int | None = None) -> FewStep:
        if steps not in (None, self.steps):
            raise UserError(f"this student was trained for {self.steps} steps, one for each phase, not for {steps}")
        return super().sampler(steps)
