"""Latent adversarial diffusion distillation: the teacher's own features, at random noise levels, tell real from fake."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.critics import FeatureCritic
from fastgen.denoiser import Condition, Guided
from fastgen.errors import UserError
from fastgen.families.adversarial import Adversarial, feature_critic, layers_for, require_others
from fastgen.losses import (
    approximate_r1,
    hinge_critic,
    hinge_student,
    logit_normal_times,
    nonsaturating_critic,
    nonsaturating_student,
    wide,
)
from fastgen.method import Batch, Loss, Need
from fastgen.pipelines.base import Pipeline

EARLY, LATE = (0.0, 0.0, 0.5, 0.5), (0.7, 0.1, 0.1, 0.1)


@dataclass
class LADD(Adversarial):
    """Latent adversarial diffusion distillation (Sauer et al. 2024).

    Samples of the guided teacher (teacher pairs) stand for real data, so that the student inherits the teacher's guidance
    without another loss. The student goes from such a sample, diffused to one of its times, to a clean estimate; both are
    noised anew, to logit-normal times, and shown to the frozen teacher, on whose features the discriminator's heads sit.
    Heads know the noise level and the text. With 4 steps the student first learns from the two lower noise levels, later
    mostly from noise alone.

    Differences from the paper: heads sit on the pipeline's feature layers (`layers` names others; the paper's, after every
    attention block, would be all of them); the heads are this package's; images may stand for real data; an approximate R1
    penalty, mismatched texts as further fakes and a smooth distance to the target are there as options (the first is
    APT's, the others are of AMD's Nitro), and off.
    """

    gamma: float = field(
        default=0.0, metadata={"help": "share of noise renewed between calls in sampling, 0 to 1", "at_least": 0, "at_most": 1}
    )
    real: Literal["synthetic", "images"] = field(
        default="synthetic", metadata={"help": "what the discriminator takes for real: the teacher's samples, or pictures"}
    )
    objective: Literal["hinge", "logistic"] = field(default="hinge", metadata={"help": "the adversarial loss"})
    shares: tuple[float, ...] = field(
        default=(), metadata={"help": "how often the student starts at each time, from 1 down; empty: the paper's, or equally"}
    )
    early_shares: tuple[float, ...] = field(
        default=(), metadata={"help": "the same in the first early_updates; empty: the paper's, or as later"}
    )
    early_updates: int = field(default=500, metadata={"help": "updates for which early_shares hold", "at_least": 0})
    noise_mean: float = field(default=1.0, metadata={"help": "mean of the logit of the discriminator's times"})
    noise_std: float = field(default=1.0, metadata={"help": "standard deviation of that logit", "above": 0})
    shared_noise: bool = field(default=False, metadata={"help": "show a real and a fake sample with the same time and noise"})
    layers: tuple[str, ...] = field(
        default=(), metadata={"help": "layers of the teacher with a head; empty: the pipeline's feature layers"}
    )
    conditioned: bool = field(default=True, metadata={"help": "tell the heads the noise level and the pooled text"})
    r1_weight: float = field(default=0.0, metadata={"help": "weight of the approximate R1 penalty; 0: none", "at_least": 0})
    r1_noise: float = field(default=0.1, metadata={"help": "standard deviation of that penalty's noise", "above": 0})
    mismatch_weight: float = field(
        default=0.0, metadata={"help": "weight of real samples with another's text as fakes; 0: none", "at_least": 0}
    )
    regression_weight: float = field(
        default=0.0, metadata={"help": "weight of the smooth distance to the target; 0: none", "at_least": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shares", "early_shares"):
            values = getattr(self, name)
            if values and len(values) != self.steps:
                raise UserError(f"{name} has {len(values)} values, but steps = {self.steps}")
            if values and (min(values) < 0 or sum(values) <= 0):
                raise UserError(f"{name} must not be negative, and not all 0, but is {list(values)}")
        if self.regression_weight and self.real == "images":
            raise UserError(
                f'regression_weight = {self.regression_weight:g} needs noise that belongs to its target, which real = "images" '
                f'does not have; take real = "synthetic"'
            )
        self.early = self.early_updates > 0

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"prompts", "pairs" if self.real == "synthetic" else "images"})

    @property
    def why_images(self) -> str:
        return 'real = "images" asks for them; "synthetic" takes the teacher\'s own samples'

    def make_critic(self, pipeline: Pipeline) -> FeatureCritic:
        if not self.student.embeds_guidance:
            self.refuse_idle("where none is embedded, as here: the samples taken for real have data.pair_guidance", "guidance")
        layers = self.layers or layers_for("ladd", pipeline, "name some of its network's in layers")
        return feature_critic(pipeline, Guided(pipeline.frozen(), self.told), layers, conditioned=self.conditioned)

    def advance(self, step: int, total: int) -> bool:
        self.early = step < self.early_updates
        return False

    def start_shares(self) -> tuple[float, ...]:
        """How often the student starts at each of its times now; empty: equally."""
        late = self.shares or (LATE if self.steps == 4 else ())
        return (self.early_shares or (EARLY if self.steps == 4 and not self.shares else late)) if self.early else late

    def generate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's clean estimates and what stands for real data, both [B, ...]."""
        real = batch.target if self.real == "synthetic" else batch.latents
        assert real is not None
        eps = batch.noise if self.regression_weight else None
        return self.estimate(real, batch.condition, self.start_shares(), eps).x0.to(real.dtype), real

    def draw(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A time [B] and noise for samples of the shape of `like` that the discriminator is shown."""
        t = logit_normal_times(self.process, len(like), mean=self.noise_mean, std=self.noise_std, device=like.device)
        return t, torch.randn_like(like)

    def view(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """`x` as the discriminator is shown it."""
        return self.process.add_noise(x, eps, t).to(x.dtype)

    def critic_loss(self, batch: Batch) -> Loss:
        condition = batch.condition
        with torch.no_grad():
            fake, real = self.generate(batch)
        t, eps = self.draw(real)
        t_fake, eps_fake = (t, eps) if self.shared_noise else self.draw(fake)
        shown, faked = self.view(real, t, eps), self.view(fake, t_fake, eps_fake)
        samples, times, texts = [shown, faked], [t, t_fake], [condition, condition]
        mismatched = self.mismatch_weight > 0
        if mismatched:
            require_others(f"mismatch_weight = {self.mismatch_weight:g}", len(real))
            samples, times, texts = [*samples, shown], [*times, t], [*texts, condition[torch.arange(len(real)).roll(1)]]
        logits = self.critic(torch.cat(samples), torch.cat(times), Condition.cat(texts)).chunk(len(samples))
        loss = hinge_critic if self.objective == "hinge" else nonsaturating_critic
        terms = {"gan": loss(logits[0], logits[1], (t, t_fake))}
        if mismatched:
            wrong = wide(logits[2])
            error = F.relu(1 + wrong) if self.objective == "hinge" else F.softplus(wrong)
            terms["mismatch"] = self.mismatch_weight * error.mean()
        if self.r1_weight:
            penalty = approximate_r1(lambda x: self.critic(x, t, condition), shown, logits[0], self.r1_noise)
            terms["r1"] = self.r1_weight * penalty
        return terms

    def student_loss(self, batch: Batch) -> Loss:
        fake, real = self.generate(batch)
        t, eps = self.draw(fake)
        logits = self.critic(self.view(fake, t, eps), t, batch.condition)
        terms = {"gan": hinge_student(logits) if self.objective == "hinge" else nonsaturating_student(logits)}
        if self.regression_weight:
            terms["regression"] = self.regression_weight * F.smooth_l1_loss(wide(fake), wide(real))
        return terms
