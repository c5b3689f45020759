"""Distribution matching distillation into one step, held to the teacher's own samples by a regression term."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from fastgen.errors import UserError
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import squared
from fastgen.method import Batch, Loss, Need
from fastgen.pipelines.base import Pipeline


@dataclass
class DMD(ScoreDistillation):
    """Distribution matching distillation with teacher pairs (Yin et al. 2024a).

    The student follows the difference of fake score and guided teacher (equation 7) and learns, from pairs of noise and
    the sample that the teacher's own sampler makes of it, to make the same of the same noise (equation 9), which keeps it
    from forgetting modes. Pairs are made by the run (`data.pairs`, `data.pair_steps`, `data.pair_guidance`). Fake score and
    student move in turn.

    Differences from the authors' code: the regression's distance is a plain square, in latents or in decoded images; theirs is
    LPIPS, whose network is not among our dependencies. Each player makes samples of its own, of the prompts that the pairs
    have, and a gradient that is not finite is zero. Their guidance is 3 or 8 on SD 1.5, their learning rate 1e-5 there.
    """

    steps: int = field(default=1, metadata={"help": "network calls a sample: 1", "at_least": 1})
    regression_weight: float = field(
        default=0.25, metadata={"help": "weight of the regression on teacher pairs; 0: none, no pairs", "at_least": 0}
    )
    regression_in: Literal["latents", "images"] = field(
        default="latents", metadata={"help": "where the student's sample and the teacher's are compared"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        calls = len(self.timesteps) or self.steps
        if calls != 1:
            raise UserError(f"dmd makes students of 1 step, as its pairs are of noise and sample, not of {calls}; use dmd2")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"prompts", "pairs"} if self.regression_weight else {"prompts"})

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.pipeline = pipeline

    def student_loss(self, batch: Batch) -> Loss:
        terms = {"dmd": self.matching(self.generate(batch), batch.condition)}
        if self.regression_weight:
            terms["regression"] = self.regression_weight * self.regression(batch)
        return terms

    def regression(self, batch: Batch) -> torch.Tensor:
        """Mean squared error of the student's samples from the teacher's noise."""
        assert batch.noise is not None and batch.target is not None
        x = self.sampler().sample(self.student, batch.noise, batch.condition)
        target = batch.target.to(x)
        if self.regression_in == "images":
            with torch.no_grad():
                target = self.pipeline.decode(target)
            x = self.pipeline.decode(x)
        return squared(x, target)
