"""Progressive distillation: stages, in each of which one step of the student replaces several of its teacher.

The family of progressive distillation, SnapFusion and SDXL-Lightning. Methods say how steps are counted and what the student
minimises; stages, the grid, the frozen teacher of a stage and its steps are here, and the stages of a discriminator.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgen.critics import TransitionCritic
from fastgen.denoiser import Condition, Denoiser, Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.adversarial import layers_for
from fastgen.families.stages import Staged
from fastgen.losses import approximate_r1, distance, landing, noised, nonsaturating_critic, nonsaturating_student, snr
from fastgen.method import Batch, Loss, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import Prediction, Process
from fastgen.rollouts import time_grid
from fastgen.samplers import FewStep, even_times


def divided(start: int, stop: int, factor: int) -> list[int]:
    """The students' steps from `start` down to `stop`, each its teacher's over `factor`; UserError where that does not fit."""
    if factor < 2:
        raise UserError(f"factor must be at least 2, not {factor}")
    if not 1 <= stop < start:
        raise UserError(f"stop_steps must be at least 1 and below start_steps = {start}, not {stop}")
    stages, steps = [], start
    while steps > stop and steps % factor == 0:
        steps //= factor
        stages.append(steps)
    if steps != stop:
        raise UserError(f"stop_steps = {stop} is not start_steps = {start} divided once or more by factor = {factor}")
    return stages


def truncated_snr(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """max(SNR, 1), the weight of errors in x0 (Salimans and Ho 2022, section 4), shaped to broadcast against `like`."""
    return snr(process, t, like).clamp_min(1)


@dataclass
class ProgressiveDistillation(Staged):
    """A student that goes through `stages` (its steps in each), taught in each by `teachers` steps of a frozen network.

    The first teacher is the pipeline's network, guided; a later one is the student as it was at the end of the last stage
    that ended with the teacher's number of steps.

    After `setup` there are `base` (the pipeline's network), `student`, `previous` (the frozen student, where one teaches),
    `scale` (the first teacher's guidance) and `told` (what a network that embeds its guidance is told; else 1).
    """

    start_steps: int = field(default=32, metadata={"help": "steps of the first teacher"})
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the first teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    shift: float = field(default=1.0, metadata={"help": "moves the steps towards noise, for flow models", "above": 0})
    huber_c: float = field(
        default=0.0, metadata={"help": "where the distance turns from square to absolute; 0: square", "at_least": 0}
    )

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})
    family: ClassVar[str] = "progressive"

    @property
    @abstractmethod
    def stages(self) -> list[int]:
        """The student's steps in each stage."""

    @property
    def teachers(self) -> list[int]:
        """The teacher's steps in each stage: by default every student is the teacher of the next."""
        return [self.start_steps, *self.stages[:-1]]

    def setup(self, pipeline: Pipeline) -> None:
        finest = time_grid(f"start_steps = {self.start_steps}", self.start_steps, pipeline.process, self.shift, pipeline.device)
        self.grids = {self.start_steps: finest}
        self.scale = pipeline.default_guidance if self.guidance is None else self.guidance
        self.base: Predicts = pipeline.frozen()
        self.student = self.network(pipeline, "student")
        self.told = self.scale if self.student.embeds_guidance else 1.0
        self.previous: Denoiser | None = None
        if any(steps != self.start_steps for steps in self.teachers):
            self.previous = self.network(pipeline, "previous").requires_grad_(False)
            self.hand_over()

    def network(self, pipeline: Pipeline, role: str) -> Denoiser:
        """The network of "student" or "previous"."""
        return pipeline.trainable(role)

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """What the student minimises in the present stage."""

    @property
    def steps(self) -> int:
        """The student's steps in the present stage."""
        return self.stages[self.stage]

    def sampler(self, steps: int | None = None) -> FewStep:
        reached = list(dict.fromkeys(self.stages[: self.stage + 1]))
        steps = reached[-1] if steps is None else steps
        if steps not in reached:
            raise UserError(f"this student was trained for {' and '.join(map(str, reached))} steps, not for {steps}")
        return FewStep(even_times(steps, self.student.process, self.shift), gamma=0.0, guidance=self.told)

    # -- stages -----------------------------------------------------------------------------------

    def advance(self, step: int, total: int) -> bool:
        before = self.teachers[self.stage]
        moved = super().advance(step, total)
        if self.teachers[self.stage] != before:
            self.hand_over()
        return moved

    def state(self) -> dict[str, Any]:
        return super().state() | ({"previous": self.previous.state_dict()} if self.previous else {})

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.previous is not None:
            self.previous.load_state_dict(state["previous"])

    def hand_over(self) -> None:
        """The student as it is becomes the teacher."""
        assert self.previous is not None
        weights = self.student.state_dict()
        if weights.keys() != self.previous.state_dict().keys():
            raise UserError('the roles "student" and "previous" must both be "full" or both be "lora"')
        self.previous.load_state_dict(weights)

    # -- the teacher ------------------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        """Whether the pipeline's own network teaches the present stage."""
        return self.previous is None or self.teachers[self.stage] == self.start_steps

    @property
    def source(self) -> Predicts:
        """The network that teaches the present stage, without guidance."""
        return self.base if self.is_first or self.previous is None else self.previous

    @property
    def teacher(self) -> Predicts:
        """The teacher of the present stage."""
        return Guided(self.source, self.scale if self.is_first else self.told)

    def begin(self, batch: Batch, points: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Diffused data [B, ...] where a step of the student begins, and the times [B] of the teacher from there on.

        The first time is x_t's, the last is where the student's step ends: 0, where less than a whole step is left. Steps
        begin at `points` even times, by default the student's own.
        """
        assert batch.latents is not None
        process, x0, teacher = self.student.process, batch.latents, self.teachers[self.stage]
        points = points or self.steps
        count = math.lcm(points, teacher)
        grid = self.grid(count)
        place = count // points * torch.randint(points, (len(x0),), device=x0.device)
        times = [grid[(place + i * (count // teacher)).clamp(max=count)] for i in range(teacher // self.steps + 1)]
        return noised(process, x0, torch.randn_like(x0), times[0]), times

    def grid(self, count: int) -> Tensor:
        """`count` even times from 1 down, and 0; made once."""
        if count not in self.grids:
            times = even_times(count, self.student.process, self.shift)
            self.grids[count] = torch.tensor([*times, 0.0], device=self.grids[self.start_steps].device)
        return self.grids[count]

    @torch.no_grad()
    def taught(
        self,
        xt: Tensor,
        times: Sequence[Tensor],
        condition: Condition,
        guidance: Tensor | None = None,
        teacher: Predicts | None = None,
    ) -> Tensor:
        """Where the teacher's DDIM steps through `times` take `xt`; a sample that is at 0 stays there.

        `guidance` [B] and `teacher`, where given, take the place of the stage's own.
        """
        x, teacher = xt, teacher or self.teacher
        for here, onward in pairwise(times):
            moved = teacher(x, here, condition, guidance=guidance).at(onward).to(x.dtype)
            x = torch.where((here > 0).view(-1, *[1] * (x.ndim - 1)), moved, x)
        return x

    def target(self, xt: Tensor, times: Sequence[Tensor], landed: Tensor) -> Tensor:
        """The x0 with which one step of the student from `xt` at the first of `times` is at `landed` at the last."""
        return landing(self.student.process, xt, times[0], landed, times[-1])[0].to(xt.dtype)

    def regression(
        self,
        prediction: Prediction,
        times: Sequence[Tensor],
        condition: Condition,
        guidance: Tensor | None = None,
        teacher: Predicts | None = None,
    ) -> Tensor:
        """The distance of the student's x0 from that with which its step lands where the teacher's do (see `taught`)."""
        xt = prediction.xt
        target = self.target(xt, times, self.taught(xt, times, condition, guidance, teacher))
        return distance(prediction.x0, target, self.huber_c, self.weight_at(times[0], xt))

    def weight_at(self, t: Tensor, like: Tensor) -> Tensor:
        """The weight of errors in x0 at `t` [B], shaped to broadcast against `like`."""
        return truncated_snr(self.student.process, t, like)


Objective = Literal["mse", "conditional", "unconditional"]


@dataclass
class AdversarialProgression(ProgressiveDistillation):
    """Progressive distillation whose distance in some stages is a discriminator (SDXL-Lightning, Lin et al. 2024).

    It is a copy of the teacher that learns, and tells where the teacher's steps end from where one step of the student does:
    knowing where they began ("conditional") or not. Every such stage has a discriminator of its own.
    """

    objectives: tuple[Objective, ...] = field(
        default=("mse",), metadata={"help": 'what every stage minimises: "mse", "conditional" or "unconditional"'}
    )
    adversarial_lr_scale: float = field(
        default=0.1, metadata={"help": "learning rate of adversarial stages over that of mse stages", "above": 0}
    )
    critic_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rate of the discriminator over the student's", "above": 0}
    )
    mse_weight: float = field(
        default=0.0, metadata={"help": "weight of the mse objective kept in adversarial stages", "at_least": 0}
    )
    r1_weight: float = field(default=0.0, metadata={"help": "weight of the approximate R1 penalty; 0: none", "at_least": 0})

    family: ClassVar[str] = "adversarial"

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.critic: TransitionCritic | None = None
        if any(objective != "mse" for objective in self.objectives):
            layers = layers_for(f"objectives = {list(self.objectives)}", pipeline, 'make all of them "mse"')
            condition, backbone = pipeline.encode_prompts([""]), pipeline.trainable("critic")
            where: dict[str, Any] = {"paired": self.objective == "conditional", "device": pipeline.device}
            self.critic = TransitionCritic(backbone, layers, pipeline.latent_shape, condition, **where)

    @property
    def objective(self) -> Objective:
        """What the present stage minimises."""
        return self.objectives[self.stage]

    def players(self) -> Sequence[Player]:
        if self.objective == "mse":
            return [Player("student", self.student, self.loss)]
        assert self.critic is not None
        scale = self.adversarial_lr_scale
        return [
            Player("critic", self.critic, self.critic_loss, lr_scale=scale * self.critic_lr_scale),
            Player("student", self.student, self.loss, lr_scale=scale),
        ]

    def advance(self, step: int, total: int) -> bool:
        moved = super().advance(step, total)
        if moved:
            self.renew()
        return moved

    def load_state(self, state: dict[str, Any]) -> None:
        before = self.stage
        super().load_state(state)
        if self.stage != before:
            self.renew()

    def renew(self) -> None:
        if self.critic is not None and self.objective != "mse":
            self.critic.renew(self.objective == "conditional")

    def start(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Diffused data where a step of the student begins, and the times from there to where it ends."""
        return self.begin(batch)

    def views(self, ends: Sequence[Tensor], level: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the discriminator is shown of `ends`, which are at times `level` [B], and the times at which that is."""
        return list(ends), level

    def loss(self, batch: Batch) -> Loss:
        xt, times = self.start(batch)
        prediction = Guided(self.student, self.told)(xt, times[0], batch.condition)
        if self.objective == "mse":
            return {"x0": self.regression(prediction, times, batch.condition)}
        assert self.critic is not None
        views, level = self.views([prediction.at(times[-1]).to(xt.dtype)], times[-1])
        (fake,) = self.critic(views, level, batch.condition, xt, times[0])
        terms = {"gan": nonsaturating_student(fake)}
        if self.mse_weight:
            terms["x0"] = self.mse_weight * self.regression(prediction, times, batch.condition)
        return terms

    def critic_loss(self, batch: Batch) -> Loss:
        assert self.critic is not None
        critic, condition = self.critic, batch.condition
        xt, times = self.start(batch)
        with torch.no_grad():
            fake = Guided(self.student, self.told)(xt, times[0], condition).at(times[-1]).to(xt.dtype)
        (shown, faked), level = self.views([self.taught(xt, times, condition), fake], times[-1])
        real_logits, fake_logits = critic([shown, faked], level, condition, xt, times[0])
        terms = {"gan": nonsaturating_critic(real_logits, fake_logits, level)}
        if self.r1_weight:
            penalty = approximate_r1(lambda x: critic([x], level, condition, xt, times[0])[0], shown, real_logits)
            terms["r1"] = self.r1_weight * penalty
        return terms
