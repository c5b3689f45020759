"""Trajectory segmented consistency distillation: jumps within ever fewer, ever longer segments of the trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.families.consistency import AdversarialConsistency
from fastgen.families.stages import Staged
from fastgen.samplers import FewStep

ADVERSARIAL_PARTS = 2
"""The adversary joins where there are at most so many segments."""


@dataclass
class TSCD(Staged, AdversarialConsistency):
    """Trajectory segmented consistency distillation, the base of Hyper-SD (Ren et al. 2024).

    In every stage the trajectory is cut into `segments` parts, and the student's jumps end at a random time between the clean
    end of their segment and the later of the two points. One segment is trajectory consistency (TCD, CTM), so
    that the last student can be sampled in any number of steps; one of an earlier stage, in multiples of its segments, without
    renewing noise. The adversary, where there is one, joins in the stages of two segments and of one, as theirs gains weight.

    Differences from the paper, whose code is not public: the distance is pseudo-Huber's as in LCM, not squared; the adversary
    is off unless it is given a weight, and looks at the frozen teacher's features as in PCM, and is not a network of its own;
    its noise perturbation is left out.
    """

    segments: tuple[int, ...] = field(default=(8, 4, 2, 1), metadata={"help": "segments of the trajectory, stage by stage"})
    gamma: float | None = field(
        default=None,
        metadata={"help": "share of noise renewed between calls; none: 0.3 on a table, else 0", "at_least": 0, "at_most": 1},
    )
    ema_decay: float = field(default=0.95, metadata={"help": "decay of the target network; 0: the student itself"})

    least_stages: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.segments
        falling = min(parts, default=1) >= 1 and all(a > b and a % b == 0 for a, b in pairwise(parts))
        if not falling or len(parts) < self.least_stages:
            raise UserError(f"segments must fall from stage to stage, each a divisor of the one before, not {list(parts)}")
        if max(parts, default=1) > self.grid:
            raise UserError(f"segments = {list(parts)} are more than the points of grid = {self.grid}")
        if max(parts, default=1) > self.most_steps:
            raise UserError(f"segments = {list(parts)} may be {self.most_steps} at most, as many as a student has calls")
        if self.steps % min(parts, default=1):
            raise UserError(f"steps = {self.steps} must be a multiple of the last of segments = {list(parts)}")
        if min(self.stages) > ADVERSARIAL_PARTS:
            idle = f"with segments = {list(parts)}: the adversary joins where there are {ADVERSARIAL_PARTS} or fewer"
            self.refuse_idle(idle, "adversary")
        if self.stages[-1] > 1 and self.gamma:
            self.refuse_idle(f"with segments = {list(parts)}: noise is renewed where there is 1", "gamma")
        self.check_stages()

    @property
    def stages(self) -> tuple[int, ...]:
        """How many segments the trajectory has in each stage."""
        return self.segments

    @property
    def parts(self) -> int:
        """The segments of the present stage."""
        return self.stages[self.stage]

    @property
    def renewal(self) -> float:
        # Noise is renewed from below the next call's level, which is another segment's where there are several.
        return self.renewal_on_tables(self.gamma, 0.3) if self.parts == 1 else 0.0

    @property
    def reach(self) -> float:
        return 1 / self.parts

    def end(self, start: Tensor) -> Tensor:
        low, r = self.edge_below(start, self.parts), self.times[start + self.solver_steps]
        return low + (r - low) * torch.rand_like(r)

    @property
    def is_adversarial(self) -> bool:
        return self.critic is not None and self.parts <= ADVERSARIAL_PARTS

    def sampler(self, steps: int | None = None) -> FewStep:
        if steps is None:  # the next multiple of the present segments
            steps = -(-self.steps // self.parts) * self.parts
        elif steps % self.parts:
            raise UserError(f"so far the student's jumps keep to {self.parts} segments; steps must be a multiple, not {steps}")
        return super().sampler(steps)
