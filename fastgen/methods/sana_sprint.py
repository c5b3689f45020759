"""SANA-Sprint: continuous-time consistency of a flow seen in TrigFlow, with an adversary on the teacher's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.denoiser import Retimed
from fastgen.families.adversarial import feature_critic, layers_for, require_others
from fastgen.families.continuous import TRIG, ContinuousConsistency, log_normal_times
from fastgen.losses import hinge_critic, hinge_student, wide
from fastgen.method import Batch, Loss, Player
from fastgen.pipelines.base import Pipeline


@dataclass
class SanaSprint(ContinuousConsistency):
    """SANA-Sprint (Chen et al. 2025): sCM on a flow that is seen in TrigFlow without training, and an adversary.

    The adversary (LADD, Sauer et al. 2024) are heads on features of the frozen teacher, which is shown noised samples of the
    student and noised data. What it is shown comes from a call of the student of its own, which half the time starts from
    pure noise (max-time weighting, section 3.3).

    Differences from the authors' code: the student follows one guidance, unless embed_guidance and guidance_scales (theirs
    are 4, 4.5 and 5) make it an input, which a UNet trained in full can be given; student and heads both move in every
    update instead of by turns; the heads are fastgen's, without spectral and batch norms, and know neither text nor time;
    there is no weight over angles unless it is asked for (see sCM); the teacher is taken as it is, without their fine-tuning
    for dense time embeddings and normalised queries and keys, which derivatives of a large network may need.
    """

    steps: int = field(default=4, metadata={"help": "network calls a sample, 1 to 8"})
    guidance: float | None = field(
        default=4.5, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    warmup: int = field(default=4000, metadata={"help": "updates over which the tangent's terms are let in", "at_least": 0})
    gan_weight: float = field(default=0.5, metadata={"help": "weight of the adversary in the student's loss", "above": 0})
    start_share: float = field(
        default=0.5, metadata={"help": "share of the adversary's samples from pure noise", "at_least": 0, "at_most": 1}
    )
    critic_mean: float = field(default=-0.6, metadata={"help": "mean of the log of sigma_data tan(angle) for the adversary"})
    critic_std: float = field(default=1.0, metadata={"help": "its standard deviation", "above": 0})
    critic_lr_scale: float = field(default=1.0, metadata={"help": "learning rate of the heads over the student's", "above": 0})
    mismatched: bool = field(default=False, metadata={"help": "data with another sample's text are fakes too"})

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        layers = layers_for(f"gan_weight = {self.gan_weight:g}", pipeline, "use scm")
        self.critic = feature_critic(pipeline, Retimed(pipeline.frozen(), TRIG), layers)

    def players(self) -> Sequence[Player]:
        return [
            Player("critic", self.critic, self.critic_loss, lr_scale=self.critic_lr_scale),
            Player("student", self.weights, self.loss),
        ]

    def loss(self, batch: Batch) -> Loss:
        logits = self.critic(*self.shown(self.generate(batch)), batch.condition)
        return {"consistency": self.consistency(batch), "gan": self.gan_weight * hinge_student(logits)}

    def critic_loss(self, batch: Batch) -> Loss:
        """The heads learn to tell noised data from noised samples of the student."""
        assert batch.latents is not None
        with torch.no_grad():
            fake = self.generate(batch)
        real, condition = wide(batch.latents), batch.condition
        faked, t_fake = self.shown(fake)
        fakes = self.critic(faked, t_fake, condition)
        if self.mismatched:
            require_others("mismatched = true", len(real))
            mismatched, t_mismatched = self.shown(real.roll(1, 0))
            fakes = torch.cat([fakes, self.critic(mismatched, t_mismatched, condition)])
            t_fake = torch.cat([t_fake, t_mismatched])
        shown, t = self.shown(real)
        return {"critic": 0.5 * hinge_critic(self.critic(shown, t, condition), fakes, (t, t_fake))}

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean estimates of noised data, a share of them of pure noise."""
        assert batch.latents is not None
        x0 = wide(batch.latents)
        t = log_normal_times(len(x0), self.noise_mean, self.noise_std, self.sigma_data, x0.device)
        t = torch.where(torch.rand_like(t) < self.start_share, 1.0, t)
        xt = TRIG.add_noise(x0, torch.randn_like(x0), t)
        return self.flow(xt, t, batch.condition, guidance=self.draw_scales(len(x0))).x0

    def shown(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples `x` as the adversary sees them, with fresh noise, and the times of that noise."""
        t = log_normal_times(len(x), self.critic_mean, self.critic_std, self.sigma_data, x.device)
        return TRIG.add_noise(x, torch.randn_like(x), t), t
