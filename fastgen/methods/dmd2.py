"""Improved distribution matching distillation: the student's distribution is moved along the difference of two scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastgen.critics import ScoreCritic, feature_shapes
from fastgen.denoiser import features_of
from fastgen.errors import UserError
from fastgen.families.adversarial import layers_for
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import nonsaturating_critic, nonsaturating_student, squared, uniform_times
from fastgen.method import Batch, Loss, Need
from fastgen.pipelines.base import Pipeline


@dataclass
class DMD2(ScoreDistillation):
    """Improved distribution matching distillation (Yin et al. 2024b).

    The student runs as in sampling up to a random call (backward simulation, section 4.5). A fake score learns to denoise
    what it makes, several times for each step of the student (two time scales, section 4.2); the student follows the
    difference of the fake score and the guided teacher (equation 2). With a GAN term the fake score's features also tell
    real latents from the student's (section 4.3); without, prompts are all it needs.

    Differences from the authors' code: a gradient that is not finite is zero, not the largest float; the fake score's loss
    is in the network's own kind of prediction; denoising and discrimination of a fake share one noised input and one call;
    each player generates samples of its own; the first noise level follows the sampling grid. Their guidance is 8 on SDXL
    and 1.75 on SD 1.5, their GAN weight 5e-3 on SDXL and 1e-3 on SD 1.5, their student's turn every 5th update on SDXL and
    every 10th on SD 1.5.
    """

    student_every: int = field(default=5, metadata={"help": "updates of the fake score for one of the student"})
    gan_weight: float = field(
        default=5e-3, metadata={"help": "weight of the GAN loss in the student's turn; 0: none, no images"}
    )
    critic_weight: float = field(default=1e-2, metadata={"help": "weight of the discriminator's loss in the fake score's turn"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gan_weight, self.critic_weight) < 0:
            raise UserError(f"gan_weight = {self.gan_weight:g} and critic_weight = {self.critic_weight:g} must not be negative")
        if self.gan_weight and not self.critic_weight:
            raise UserError(
                f"gan_weight = {self.gan_weight:g} needs a discriminator that learns, so critic_weight must be above 0"
            )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"prompts", "images"} if self.gan_weight else {"prompts"})

    @property
    def why_images(self) -> str:
        return f"gan_weight = {self.gan_weight:g} shows a critic real pictures; 0 does without"

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        if self.gan_weight:
            layers = layers_for(f"gan_weight = {self.gan_weight:g}", pipeline)
            condition = pipeline.encode_prompts([""])
            shapes = feature_shapes(self.fake, layers, pipeline.latent_shape, condition, self.device)
            self.critic = ScoreCritic(self.critic.fake, layers, shapes).to(self.device)

    def fake_loss(self, batch: Batch) -> Loss:
        if not self.gan_weight:
            return super().fake_loss(batch)
        with torch.no_grad():
            x = self.generate(batch)
        t, eps = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device), torch.randn_like(x)
        assert batch.latents is not None
        real = batch.latents.to(x)
        xt, shown = (self.process.add_noise(each, noise, t) for each, noise in ((x, eps), (real, torch.randn_like(x))))
        prediction = self.fake(xt, t, batch.condition, features=self.critic.layers)
        logits_fake = self.critic.logits(prediction.features)
        logits_real = self.critic.logits(features_of(self.fake, shown, t, batch.condition, self.critic.layers))
        return {
            "score": squared(prediction.output, self.process.target(prediction.kind, x, eps, t)),
            "gan": self.critic_weight * nonsaturating_critic(logits_real, logits_fake, t),
        }

    def student_loss(self, batch: Batch) -> Loss:
        x = self.generate(batch)
        terms = {"dmd": self.matching(x, batch.condition)}
        if self.gan_weight:
            t = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device)
            xt = self.process.add_noise(x, torch.randn_like(x), t)
            features = features_of(self.fake, xt, t, batch.condition, self.critic.layers)
            terms["gan"] = self.gan_weight * nonsaturating_student(self.critic.logits(features))
        return terms
