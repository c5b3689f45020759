"""Mean velocities: a student that is told both ends of a step, and answers with the velocity that leads from one to the other.

The family of MeanFlow and shortcut models (Geng et al. 2025; Frans et al. 2025). For a rectified flow a step is x_s = x_t -
(t - s) u(x_t, t, s); for any other process it is the DDIM step, which is the same one in other coordinates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Guided, Predicts
from fastgen.errors import UserError
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import MeanVelocity


@dataclass
class MeanVelocities(Method):
    """A student with a second time input, and the guided teacher whose velocity it has where a step is infinitely short.

    After `setup` there are `process`, `teacher` (guided), `student` and `told` (the guidance that a student which embeds it is
    told; else 1).
    """

    steps: int = field(default=4, metadata={"help": "network calls a sample"})
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    training: bool = field(default=False, metadata={"help": "learn from data alone, without the teacher's velocities"})
    shift: float = field(default=1.0, metadata={"help": "moves the student's steps towards noise, for flow models", "above": 0})

    family: ClassVar[str] = "consistency"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if self.training and self.guidance not in (None, 1):
            raise UserError(f"training = true asks no teacher, so guidance = {self.guidance:g} has nothing to guide; drop one")

    def setup(self, pipeline: Pipeline) -> None:
        self.process, self.device = pipeline.process, pipeline.device
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        guidance = 1.0 if self.training else guidance
        self.teacher: Predicts = Guided(pipeline.frozen(), guidance)
        self.student = pipeline.trainable("student", end_time=True)
        self.told = guidance if self.student.embeds_guidance else 1.0

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    @abstractmethod
    def sampler(self, steps: int | None = None) -> MeanVelocity: ...

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """The student's loss."""

    def scales(self, count: int) -> Tensor | None:
        """The guidance [B] that the student is told, where it embeds it; else None."""
        return torch.full((count,), self.told, device=self.device) if self.student.embeds_guidance else None

    def velocity(self, x0: Tensor, eps: Tensor, xt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The flow velocity eps - x0 at `xt`, without gradient: the guided teacher's, or that of the very data and noise."""
        if self.training:
            return eps - x0
        with torch.no_grad():
            return self.teacher(xt, t, condition).flow
