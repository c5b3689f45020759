"""The simplest distillation there is, as an example of a method outside fastgen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.losses import pseudo_huber
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines import Pipeline
from fastgen.samplers import FewStep


@dataclass
class PairRegression(Method):
    """Regression on pairs of noise and the teacher's sample from it (Luhman and Luhman 2021): one step, no tricks.

    Its optimum is the teacher's own map from noise to sample; what it reaches is blurred, since small errors of the map cost
    little. Every method should beat it.
    """

    huber_c: float = field(default=0.03, metadata={"help": "where the loss turns from square to absolute", "above": 0})

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "pairs"})
    family: ClassVar[str] = "regression"

    def setup(self, pipeline: Pipeline) -> None:
        self.student = pipeline.trainable("student")
        self.told = pipeline.default_guidance if self.student.embeds_guidance else 1.0

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    def sampler(self, steps: int | None = None) -> FewStep:
        if steps not in (None, 1):
            raise UserError(f"this student was trained for 1 step, not for {steps}")
        return FewStep((1.0,), guidance=self.told)

    def loss(self, batch: Batch) -> Loss:
        assert batch.noise is not None and batch.target is not None
        t = batch.noise.new_ones(len(batch.noise))
        scale = self.student.process.initial_scale(t).view(-1, *[1] * (batch.noise.ndim - 1))
        prediction = Guided(self.student, self.told)(scale * batch.noise, t, batch.condition)
        return {"pairs": pseudo_huber(prediction.x0, batch.target, self.huber_c)}
