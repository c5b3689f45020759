"""SDXL-Lightning: progressive distillation whose distance, after the first stage, is a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgen.critics import TransitionCritic
from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.families.adversarial import layers_for
from fastgen.families.progressive import ProgressiveDistillation
from fastgen.losses import approximate_r1, nonsaturating_critic, nonsaturating_student
from fastgen.method import Batch, Loss, Player
from fastgen.pipelines.base import Pipeline

Objective = Literal["mse", "conditional", "unconditional"]
PAIR: tuple[Objective, ...] = ("conditional", "unconditional")


@dataclass
class Lightning(ProgressiveDistillation):
    """SDXL-Lightning, progressive adversarial distillation (Lin et al. 2024).

    Every stage has its number of steps and its objective. "mse" is progressive distillation, the only stage that takes
    guidance in. In the others a discriminator, a copy of the teacher that learns, tells where the teacher's steps end from
    where one step of the student does: "conditional" on where they began, which keeps the teacher's flow (section 3.2), then
    "unconditional", which gives up the flow where the student cannot follow it (3.3). Every such stage has a discriminator
    of its own. For one and two steps the student also starts between its own times, and the discriminator sees both ends
    with noise of several levels, finer ones more often in the second half (3.5).

    Differences from the paper: the discriminator is LoRA where the student is (there it never is); the student stays LoRA
    or full throughout, and moments of Adam are the run's in all stages; the student of one step goes on predicting what the
    network predicts, where the paper turns noise into x0; noise is added to an end from its own level on, so that the first
    of two steps is shown at half the noise or more.
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

    family: ClassVar[str] = "adversarial"

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
        self.late = self.stage_share(step, total) >= 0.5
        return moved

    def load_state(self, state: dict[str, Any]) -> None:
        before = self.stage
        super().load_state(state)
        if self.stage != before:
            self.renew()

    def renew(self) -> None:
        if self.critic is not None and self.objective != "mse":
            self.critic.renew(self.objective == "conditional")

    # -- losses -----------------------------------------------------------------------------------

    @property
    def is_fine(self) -> bool:
        return self.steps <= self.fine_steps

    def start(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Diffused data where a step of the student begins, and the times from there to where it ends."""
        return self.begin(batch, max(self.steps, self.starts) if self.is_fine else self.steps)

    def views(self, ends: Sequence[Tensor], level: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the discriminator is shown of `ends` at times `level` [B]: in fine stages with more noise, all at one time."""
        if not self.is_fine:
            return list(ends), level
        shares = torch.tensor(self.view_shares if self.late else [1.0] * len(self.view_times), device=level.device)
        drawn = torch.multinomial(shares, len(level), replacement=True)
        process = self.student.process
        at = process.snap(torch.tensor(self.view_times, device=level.device)[drawn]).maximum(level)
        return [process.diffuse(x, torch.randn_like(x), level, at).to(x.dtype) for x in ends], at

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
        terms = {"gan": nonsaturating_critic(real_logits, fake_logits)}
        if self.r1_weight:
            penalty = approximate_r1(lambda x: critic([x], level, condition, xt, times[0])[0], shown, real_logits)
            terms["r1"] = self.r1_weight * penalty
        return terms
