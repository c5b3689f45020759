"""SwiftBrush: variational score distillation into a one-step student, from prompts alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.denoiser import Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import denoising, pull, uniform_times
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline


@dataclass
class SwiftBrush(ScoreDistillation):
    """SwiftBrush, image-free one-step distillation by variational score distillation (Nguyen and Tran 2024).

    The student follows sigma_t^2 (E_T - E_F), the difference of the noise that teacher and fake score see in its noised
    samples, both guided alike. The fake score, which has to know the unconditional case for that, learns with a tenth of
    its prompts dropped. A student that has come to the unguided teacher's distribution is then pulled no more, whatever the
    scale: guidance of the fake score takes the teacher's away again. With `fake_guidance = 1`, as in variational score
    distillation at first (Wang et al. 2023), the student comes to the guided teacher's.

    Their guidance is 4.5 on SD 2.1. They train the whole student at a rate of 1e-6 and a LoRA of rank 64 as fake score at
    1e-3: `fake_lr_scale = 1000` goes with `roles.fake_score = "lora"` and `roles.student = "full"` alone. Differences from
    their code: each player makes samples of its own, the fake score first; prompts are dropped one by one; the loss of the
    fake score, weighted with alpha_t^2 as theirs, is in the network's own kind of prediction.
    """

    steps: int = field(default=1, metadata={"help": "network calls a sample, evenly spaced in time"})
    guidance: float | None = field(
        default=None,
        metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1},
    )
    fake_guidance: float | None = field(
        default=None, metadata={"help": "guidance of the fake score, 1 = off; none: the teacher's", "at_least": 1}
    )
    high: float = field(default=0.981, metadata={"help": "greatest time at which the scores are compared"})
    drop: float = field(
        default=0.1, metadata={"help": "share of prompts that the fake score learns without", "at_least": 0, "at_most": 1}
    )

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        if self.fake_guidance is not None and self.critic.fake.embeds_guidance:
            raise UserError(
                f"fake_guidance = {self.fake_guidance:g} is of no use where networks are told their guidance, as here: the "
                "fake score learns at the teacher's; drop it"
            )
        self.guided_fake: Predicts = Guided(self.critic.fake, self.fake_guidance or guidance)

    def scales(self, count: int) -> Tensor | None:
        """The guidance of each of `count` samples; None is the one of the options."""
        return None

    def fake_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            x = self.generate(batch)
        t = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device)
        condition = batch.condition
        if self.drop and self.fake_guidance != 1:  # else nobody asks for the unconditional case
            condition = condition.dropout(torch.rand(len(x), device=x.device) < self.drop)
        alpha, _ = self.process.coefficients(t, x)
        scales = self.scales(len(x)) if self.critic.fake.embeds_guidance else None
        fake = self.fake if scales is None else Guided(self.critic.fake, scales)
        return {"score": denoising(fake, x, torch.randn_like(x), t, condition, alpha.square())}

    def student_loss(self, batch: Batch) -> Loss:
        x = self.generate(batch)
        with torch.no_grad():
            t = self.score_times(len(x))
            xt, scales = self.process.add_noise(x, torch.randn_like(x), t), self.scales(len(x))
            real = self.teacher(xt, t, batch.condition, guidance=scales).eps
            fake = self.guided_fake(xt, t, batch.condition, guidance=scales if self.fake_guidance is None else None).eps
            _, sigma = self.process.coefficients(t, x)
        return {"vsd": pull(x, sigma.square() * (real - fake))}
