"""SDXL-Lightning: progressive distillation whose distance, after the first stage, is a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.families.progressive import AdversarialProgression, Objective
from fastgen.method import Batch

PAIR: tuple[Objective, ...] = ("conditional", "unconditional")


@dataclass
class Lightning(AdversarialProgression):
    """SDXL-Lightning, progressive adversarial distillation (Lin et al. 2024).

    Every stage has its number of steps and its objective. "mse" is progressive distillation, the only stage that takes
    guidance in. In the others a discriminator, a copy of the teacher that learns, tells where the teacher's steps end from
    where one step of the student does: "conditional" on where they began, which keeps the teacher's flow (section 3.2), then
    "unconditional", which gives up the flow where the student cannot follow it (3.3). Every such stage has a discriminator
    of its own. For one and two steps the student also starts between its own times, and the discriminator sees both ends
    with noise of several levels, finer ones more often in the second half (3.5).

    Differences from the paper: the discriminator is LoRA where the student is (there it never is); the student stays LoRA or
    full throughout, and moments of Adam are the run's in all stages; the student of one step goes on predicting what the
    network predicts, where the paper turns noise into x0, since one network serves all stages; noise is added to an end from
    its own level on, so that the first of two steps is shown at half the noise or more.
    """

    start_steps: int = field(default=128, metadata={"help": "steps of the first teacher"})
    student_steps: tuple[int, ...] = field(
        default=(32, 8, 8, 4, 4, 2, 2, 1, 1), metadata={"help": "the student's steps in every stage", "at_least": 1}
    )
    objectives: tuple[Objective, ...] = field(
        default=("mse", *PAIR, *PAIR, *PAIR, *PAIR),
        metadata={"help": 'what every stage minimises: "mse", "conditional" or "unconditional"'},
    )
    keep_teacher: int = field(
        default=0, metadata={"help": "the student of so many steps (or start_steps) teaches all later stages; 0: none does"}
    )
    fine_steps: int = field(
        default=2, metadata={"help": "stages of so many steps or fewer have more starts and noised views; 0: none"}
    )
    starts: int = field(default=4, metadata={"help": "evenly spaced times at which those stages start", "at_least": 1})
    view_times: tuple[float, ...] = field(
        default=(0.01, 0.25, 0.5, 0.75), metadata={"help": "noise levels of those views", "above": 0, "below": 1}
    )
    view_shares: tuple[float, ...] = field(
        default=(5.0, 1.0, 1.0, 1.0), metadata={"help": "how often each, in the second half of a stage", "above": 0}
    )

    def __post_init__(self) -> None:
        steps, objectives = list(self.student_steps), self.objectives
        if not steps or len(steps) != len(objectives):
            raise UserError(
                f"student_steps has {len(steps)} values, but objectives has {len(objectives)}; each stage needs both"
            )
        if len(self.view_times) != len(self.view_shares) or not self.view_times:
            raise UserError(f"view_times has {len(self.view_times)} values, but view_shares has {len(self.view_shares)}")
        if self.keep_teacher and self.keep_teacher not in (self.start_steps, *steps):
            known = f"start_steps = {self.start_steps} or of student_steps = {steps}"
            raise UserError(f"keep_teacher = {self.keep_teacher} is none of {known}")
        for teacher, own in zip(self.teachers, steps, strict=True):
            if own >= teacher or teacher % own:
                raise UserError(f"a student of {own} steps cannot follow a teacher of {teacher}: {teacher} must be a multiple")
        self.check_stages()
        self.late = False

    @property
    def stages(self) -> list[int]:
        return list(self.student_steps)

    @property
    def teachers(self) -> list[int]:
        """In both stages of a pair the same; from `keep_teacher` on that."""
        teachers = [self.start_steps]
        for before, now in pairwise(self.student_steps):
            teachers.append(teachers[-1] if now == before or teachers[-1] == self.keep_teacher else before)
        return teachers

    def advance(self, step: int, total: int) -> bool:
        moved = super().advance(step, total)
        self.late = self.stage_share(step, total) >= 0.5
        return moved

    @property
    def is_fine(self) -> bool:
        return self.steps <= self.fine_steps

    def start(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Diffused data where a step of the student begins, and the times from there to where it ends."""
        return self.begin(batch, max(self.steps, self.starts) if self.is_fine else self.steps)

    def views(self, ends: Sequence[Tensor], level: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the discriminator is shown of `ends` at times `level` [B]: in fine stages with more noise, all at one time."""
        if not self.is_fine:
            return super().views(ends, level)
        shares = torch.tensor(self.view_shares if self.late else [1.0] * len(self.view_times), device=level.device)
        drawn = torch.multinomial(shares, len(level), replacement=True)
        process = self.student.process
        at = process.snap(torch.tensor(self.view_times, device=level.device)[drawn]).maximum(level)
        return [process.diffuse(x, torch.randn_like(x), level, at).to(x.dtype) for x in ends], at
