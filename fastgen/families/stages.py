"""Stages: methods whose updates are divided into parts, each with a task of its own.

What progressive distillation, segmented consistency and Flash Diffusion share: which stage an update belongs to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from fastgen.errors import UserError
from fastgen.method import Method


@dataclass
class Staged(Method):
    """A method that goes through `stages`; `stage`, from 0, is the present one.

    Subclasses say what their `stages` are, whether optimisers start afresh with each, and call `check_stages` in
    `__post_init__`.
    """

    stage_shares: tuple[float, ...] = field(
        default=(), metadata={"help": "relative share of the updates for every stage; empty: equal", "above": 0}
    )

    @property
    @abstractmethod
    def stages(self) -> Sequence[Any]:
        """What is particular to each stage, such as the student's number of steps."""

    renews: ClassVar[bool] = True
    """Whether optimisers start afresh with every stage."""

    def check_stages(self, *options: str) -> None:
        """Begin with the first stage. Raises UserError for stage shares, or other `options`, that are not one for each."""
        self.stage, stages = 0, len(self.stages)
        for name in (*options, *(["stage_shares"] if self.stage_shares else [])):
            if len(given := getattr(self, name)) != stages:
                raise UserError(f"{name} has {len(given)} values, but there are {stages} stages")

    def ends(self, total: int) -> list[int]:
        """The update at which each stage ends. Raises UserError where there are fewer updates than stages."""
        shares = self.stage_shares or (1.0,) * len(self.stages)
        ends = [round(total * part / sum(shares)) for part in accumulate(shares)]
        if any(a >= b for a, b in pairwise([0, *ends])):
            raise UserError(f"{total} updates are too few: each of the {len(ends)} stages needs at least one")
        return ends

    def stage_end(self, step: int, total: int) -> int:
        return next(end for end in self.ends(total) if end > step) if self.renews else total

    def stage_share(self, step: int, total: int) -> float:
        """How much of the present stage is behind update `step`, 0 to 1."""
        begin, end = [0, *self.ends(total)][self.stage : self.stage + 2]
        return (step - begin) / (end - begin)

    def advance(self, step: int, total: int) -> bool:
        super().advance(step, total)
        before, self.stage = self.stage, sum(end <= step for end in self.ends(total)[:-1])
        return self.renews and self.stage != before

    def state(self) -> dict[str, Any]:
        return super().state() | {"stage": self.stage}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.stage = int(state["stage"])
