"""Target-driven distillation: consistency only towards the times that a few sampling schedules visit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.families.consistency import AdversarialConsistency
from fastgen.samplers import FewStep

WINDOW = 1.04
"""How far below the nearest target another may be chosen, in strides of the shortest schedule: the authors' 260 of 1,000."""


@dataclass
class TDD(AdversarialConsistency):
    """Target-driven distillation (Wang et al. 2025).

    The targets are the times of the sampling schedules of `steps_low` to `steps_high` steps. From the point after the
    teacher's step a jump ends at the next target below it or at one up to a stride further, moved towards clean data by a
    random share of `jitter` (target timestep selection), as sampling with `gamma` below it does. Guidance is distilled at one
    scale, and unguided for the `prompt_dropout` share of empty prompts (decoupled guidance), so that `guidance`, about 1.7 to
    3, can be used in sampling, at two network evaluations a call.

    Differences from the authors' code: the adversary is off unless it is given a weight; an update moves the adversary and
    then the student, two of their iterations; its heads see the pipeline's feature layers, not every block; times are not
    rounded to the table after jitter; at t = 1 the input is noise alone; the last jump ends at clean data. Their scale 3.5 is
    4.5 in the convention where 1 is off.
    """

    guidance_low: float = field(default=4.5, metadata={"help": "least guidance scale of the teacher, 1 = off"})
    guidance_high: float = field(default=4.5, metadata={"help": "greatest guidance scale of the teacher"})
    prompt_dropout: float = field(
        default=0.2, metadata={"help": "share of prompts replaced by the empty one, unguided", "at_least": 0, "at_most": 1}
    )
    grid: int = field(default=250, metadata={"help": "points of the solver grid"})
    gamma: float | None = field(
        default=None,
        metadata={"help": "share of noise renewed between calls; none: 0.2 on a table, else 0", "at_least": 0, "at_most": 1},
    )
    steps_low: int = field(default=4, metadata={"help": "steps of the shortest schedule whose times are targets"})
    steps_high: int = field(default=8, metadata={"help": "steps of the longest schedule whose times are targets"})
    jitter: float = field(
        default=0.3, metadata={"help": "greatest share by which a target is moved to clean data", "at_least": 0, "at_most": 1}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps_low <= self.steps_high <= self.most_steps:
            low, high = f"steps_low = {self.steps_low}", f"steps_high = {self.steps_high}"
            raise UserError(f"{low} must be at least 1 and at most {high}, and that at most {self.most_steps}")
        self._refuse_untrained(self.steps)
        schedules = range(self.steps_low, self.steps_high + 1)
        self.targets = sorted({i * self.grid // n for n in schedules for i in range(1, n + 1)})

    @property
    def renewal(self) -> float:
        return self.renewal_on_tables(self.gamma, 0.2)

    @property
    def reach(self) -> float:
        return 1 / self.steps_low

    def end(self, start: Tensor) -> Tensor:
        targets = self.solver_steps * torch.tensor(self.targets, device=start.device)
        nearest = targets[torch.searchsorted(targets, start + self.solver_steps)][:, None]
        furthest = nearest + WINDOW / self.steps_low * self.grid * self.solver_steps
        within = ((targets >= nearest) & (targets <= furthest)).float()
        s = self.times[targets[torch.multinomial(within, 1).squeeze(1)]]
        return s * (1 - self.jitter * torch.rand_like(s))

    def sampler(self, steps: int | None = None) -> FewStep:
        self._refuse_untrained(self.steps if steps is None else steps)
        return super().sampler(steps)

    def _refuse_untrained(self, steps: int) -> None:
        if not self.steps_low <= steps <= self.steps_high:
            trained = f"steps_low = {self.steps_low} to steps_high = {self.steps_high}"
            raise UserError(f"the student is trained for {trained} steps, not {steps}")
