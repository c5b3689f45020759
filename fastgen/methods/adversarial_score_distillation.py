"""Adversarial score distillation: the fake score is a discriminator, and learns what the teacher makes of its inputs too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Guided, Predicts
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import pull, squared, uniform_times
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline


@dataclass
class AdversarialScoreDistillation(ScoreDistillation):
    """Adversarial score distillation (Wei et al. 2024).

    Read as a Wasserstein GAN, score distillation has a discriminator log p_teacher / p_fake, of which the fake score is the
    part that can be optimised. Its whole objective has two sides: denoise the student's samples (all that variational score
    distillation does), and be a poor denoiser of real ones, for which the teacher's own estimates stand in: `push` times the
    squared distance to the unguided teacher's prediction is taken off the loss. Below 1 the sum has a minimum, where the fake
    score is fake + push / (1 - push) (fake - teacher), so that with an unguided teacher the student's gradient becomes 1 / (1
    - push) times that of distribution matching. A teacher guided at w makes students of guidance 1 + (1 - push) (w - 1).

    Differences from the authors' code, which fits one image, one 3D scene: the student is a generator, with fresh noise and
    prompts in every update and backward simulation for several steps; the fake score is a network or LoRA without their
    camera input and its guidance; losses are means, theirs the student's sum over elements; a gradient that is not finite is
    zero. Their guidance is 7.5; the push of 0.75 is their recipes', where their code's default of 1 has no minimum,
    and four of its six weigh with sigma over alpha.
    """

    push: float = field(
        default=0.75,
        metadata={"help": "how much the fake score is pushed off the teacher's prediction; 0: not", "at_least": 0, "below": 1},
    )
    weight: Literal["sigma_squared", "sigma_over_alpha"] = field(
        default="sigma_squared", metadata={"help": "weight of the difference of predicted noises in the student's gradient"}
    )

    family: ClassVar[str] = "adversarial"

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.unguided: Predicts = Guided(pipeline.frozen(), 1.0)

    def fake_loss(self, batch: Batch) -> Loss:
        """The discriminator's objective, of samples and of the teacher's estimates, in the fake score's kind of prediction."""
        with torch.no_grad():
            x = self.generate(batch)
            t, eps = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device), torch.randn_like(x)
            xt = self.process.add_noise(x, eps, t)
            real = self.unguided(xt, t, batch.condition) if self.push else None
        prediction = self.fake(xt, t, batch.condition)
        terms = {"score": squared(prediction.output, self.process.target(prediction.kind, x, eps, t))}
        if real is not None:
            terms["real"] = -self.push * squared(prediction.output, real.read_as(prediction.kind))
        return terms

    def student_loss(self, batch: Batch) -> Loss:
        return {"asd": self.adversary(self.generate(batch), batch.condition)}

    def adversary(self, x: Tensor, condition: Condition) -> Tensor:
        """The generator's loss of the student's samples `x`: the discriminator's gradient, put on them."""
        with torch.no_grad():
            t = self.score_times(len(x))
            xt = self.process.add_noise(x, torch.randn_like(x), t)
            fake, real = self.fake(xt, t, condition).x0, self.teacher(xt, t, condition).x0
            # sigma^2 (eps_teacher - eps_fake) is alpha sigma (x_fake - x_teacher), finite at both ends; over alpha, 1 of it.
            alpha, sigma = self.process.coefficients(t, x)
            weight = alpha * sigma if self.weight == "sigma_squared" else torch.ones_like(alpha)
        return pull(x, weight * (fake - real))
