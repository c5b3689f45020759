"""Progressive distillation: every stage teaches the student to do in one step what its teacher does in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgen.denoiser import Denoiser, Guided, Predicts
from fastgen.errors import UserError
from fastgen.losses import landing, noised, pseudo_huber, snr, squared
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.rollouts import walk
from fastgen.samplers import FewStep, even_times


@dataclass
class Progressive(Method):
    """Progressive distillation (Salimans and Ho 2022), guidance taken in at the first stage (Meng et al. 2023).

    The first teacher is the pipeline at `start_steps` DDIM steps, each later one the student of the stage before, frozen.
    The student of a stage learns, from diffused data, the clean sample with which one of its steps lands where `factor`
    steps of the teacher land (appendix G), weighted with max(SNR, 1) (section 4). `train.schedule = "linear"` lets the
    learning rate fall to zero in every stage, as there.

    Differences from the paper: stages may skip (`factor` above 2); at t = 1 the input is noise alone, as in sampling,
    whatever signal the process leaves there.
    """

    start_steps: int = field(default=32, metadata={"help": "steps of the first teacher"})
    stop_steps: int = field(default=4, metadata={"help": "steps of the last student: start_steps over a power of factor"})
    factor: int = field(default=2, metadata={"help": "teacher steps that one step of the student replaces"})
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the first teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    stage_shares: tuple[float, ...] = field(
        default=(), metadata={"help": "relative share of the updates for every stage; empty: equal", "above": 0}
    )
    weight: Literal["truncated_snr", "snr_plus_one"] = field(
        default="truncated_snr", metadata={"help": "weight of the error in x0: max(SNR, 1), or SNR + 1 (plain error in v)"}
    )
    huber_c: float = field(
        default=0.0, metadata={"help": "where a pseudo-Huber loss turns from square to absolute; 0: square", "at_least": 0}
    )
    shift: float = field(default=1.0, metadata={"help": "moves the steps towards noise, for flow models", "above": 0})

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})

    def __post_init__(self) -> None:
        start, stop, factor = self.start_steps, self.stop_steps, self.factor
        if factor < 2:
            raise UserError(f"factor must be at least 2, not {factor}")
        if not 1 <= stop < start:
            raise UserError(f"stop_steps must be at least 1 and below start_steps = {start}, not {stop}")
        self.stages: list[int] = []
        while start > stop and start % factor == 0:
            start //= factor
            self.stages.append(start)
        if start != stop:
            raise UserError(
                f"stop_steps = {stop} is not start_steps = {self.start_steps} divided once or more by factor = {factor}"
            )
        if self.stage_shares and len(self.stage_shares) != len(self.stages):
            raise UserError(
                f"stage_shares has {len(self.stage_shares)} values, but there are {len(self.stages)} stages, "
                f"to {', '.join(map(str, self.stages))} steps"
            )
        self.stage = 0

    def setup(self, pipeline: Pipeline) -> None:
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        self.student = pipeline.trainable("student")
        self.told = guidance if self.student.embeds_guidance else 1.0
        self.first_teacher = Guided(pipeline.frozen(), guidance)
        self.previous: Denoiser | None = None
        if len(self.stages) > 1:
            self.previous = pipeline.trainable("previous").requires_grad_(False)
            self._hand_over()
        own = len({t for t in even_times(self.start_steps, pipeline.process, self.shift) if t > 0})
        if own < self.start_steps:
            raise UserError(f"start_steps = {self.start_steps} is finer than the pipeline's own times, of which it meets {own}")

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    @property
    def trained(self) -> Denoiser:
        return self.student

    def sampler(self, steps: int | None = None) -> FewStep:
        reached = self.stages[: self.stage + 1]
        steps = reached[-1] if steps is None else steps
        if steps not in reached:
            raise UserError(f"this student was trained for {' and '.join(map(str, reached))} steps, not for {steps}")
        return FewStep(even_times(steps, self.student.process, self.shift), gamma=0.0, guidance=self.told)

    def ends(self, total: int) -> list[int]:
        """The update at which each stage ends."""
        shares = self.stage_shares or (1.0,) * len(self.stages)
        ends = [round(total * part / sum(shares)) for part in accumulate(shares)]
        if any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
            raise UserError(f"{total} updates are too few: each of the {len(ends)} stages needs at least one")
        return ends

    def stage_end(self, step: int, total: int) -> int:
        return next(end for end in self.ends(total) if end > step)

    def advance(self, step: int, total: int) -> bool:
        stage = sum(end <= step for end in self.ends(total)[:-1])
        if stage == self.stage:
            return False
        self.stage = stage
        self._hand_over()
        return True

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage} | ({"previous": self.previous.state_dict()} if self.previous else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.stage = int(state["stage"])
        if self.previous is not None:
            self.previous.load_state_dict(state["previous"])

    def _hand_over(self) -> None:
        assert self.previous is not None
        weights = self.student.state_dict()
        if weights.keys() != self.previous.state_dict().keys():
            raise UserError('the roles "student" and "previous" must both be "full" or both be "lora"')
        self.previous.load_state_dict(weights)

    @property
    def teacher(self) -> Predicts:
        """The teacher of the current stage."""
        return self.first_teacher if self.stage == 0 or self.previous is None else Guided(self.previous, self.told)

    def loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        process, x0 = self.student.process, batch.latents
        steps, factor = self.stages[self.stage], self.factor
        grid = torch.tensor([*even_times(steps * factor, process, self.shift), 0.0], device=x0.device)
        start = factor * torch.randint(steps, (len(x0),), device=x0.device)
        t = grid[start]
        xt = noised(process, x0, torch.randn_like(x0), t)
        with torch.no_grad():
            target = self.target(xt, grid, start, batch)
        weight = snr(process, t, x0)
        weight = weight.clamp_min(1) if self.weight == "truncated_snr" else weight + 1
        prediction = Guided(self.student, self.told)(xt, t, batch.condition)
        if self.huber_c:
            return {"x0": pseudo_huber(prediction.x0, target, self.huber_c, weight)}
        return {"x0": squared(prediction.x0, target, weight)}

    def target(self, xt: Tensor, grid: Tensor, start: Tensor, batch: Batch) -> Tensor:
        """The x0 with which one step of the student from position `start` [B] on `grid` lands where the teacher's steps do."""
        x = walk(self.teacher, xt, grid, start, self.factor, batch.condition)
        x0, _ = landing(self.student.process, xt, grid[start], x, grid[start + self.factor])
        return x0.to(xt.dtype)
