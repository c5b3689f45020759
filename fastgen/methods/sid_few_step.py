"""Score identity distillation in several steps: one fake score for the even mixture of what all of the student's steps make."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.critics import feature_shapes
from fastgen.denoiser import features_of
from fastgen.errors import UserError
from fastgen.families.adversarial import layers_for
from fastgen.families.score_identity import ScoreIdentity, guarded
from fastgen.losses import nonsaturating_critic, squared, wide
from fastgen.method import Batch, Loss, Need
from fastgen.pipelines.base import Pipeline
from fastgen.process import Kind, Process
from fastgen.samplers import FewStep, SchedulerSpec


@dataclass
class SiDFewStep(ScoreIdentity):
    """Few-step score identity distillation (Zhou et al. 2025b), of flow models too (SiD-DiT, Zhou et al. 2025c).

    The student runs as in sampling up to a random call, and SiD's loss is taken of that call's clean estimate: the mixture of
    all steps is matched to the teacher, with one fake score. (It sees no more than the mixture: in small experiments single
    steps stay some way off in opposite directions.) Between calls noise is fresh, the first noise again, or the
    student's own estimate of it (DDIM). Guidance is long and short (one scale for teacher and fake score); or, for a student
    that also learns from images, off: Zero-CFG has an unconditional fake score, Anti-CFG one that is guided away from the
    prompt when it judges. The GAN term reads its logits from the fake score's own features, with no weights of its own: a
    UNet's middle, averaged over channels; a transformer's tokens, averaged over them.

    Differences from the authors' code (SiD-DiT's; that of the UNets is not public): losses are means, theirs sums over
    elements, the student's times 100, which `gan_weight` allows for; transformers' features are those of the pipeline's
    feature layers, theirs of the last normalisation; logits are not clamped; the GAN acts from the start, theirs after
    40,000 images; the scale of Anti-CFG is not published. Their timesteps for UNets are 625, 468, 312, 156; for flows
    `weight` is "alpha", `noise_law` "logit_normal", and the guidance 4.5.
    """

    noise: Literal["fresh", "fixed", "ddim"] = field(
        default="fresh",
        metadata={"help": "noise between calls; diffusers has no scheduler for fixed, so it cannot be exported"},
    )
    strategy: Literal["long_short", "zero", "anti"] = field(
        default="long_short", metadata={"help": "guidance: one scale for all, or Zero-CFG or Anti-CFG, with teacher unguided"}
    )
    anti_guidance: float = field(
        default=-1.0, metadata={"help": "guidance of the fake score when it judges, with Anti-CFG", "below": 0}
    )
    prompt_dropout: float = field(
        default=0.1,
        metadata={"help": "share of samples without a prompt when the fake score learns", "at_least": 0, "at_most": 1},
    )
    gan_weight: float = field(
        default=0.0, metadata={"help": "weight of the GAN term, theirs 0.01; 0: none, no images", "at_least": 0}
    )
    critic_weight: float = field(
        default=1.0, metadata={"help": "weight of the discriminator's loss in the fake score's turn", "above": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy != "long_short" and self.guidance not in (None, 1):
            raise UserError(
                f'strategy = "{self.strategy}" has an unguided teacher, but guidance = {self.guidance:g}; set guidance = 1'
            )

    @property
    def teacher_guidance(self) -> float | None:
        return self.guidance if self.strategy == "long_short" else 1.0

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"prompts", "images"} if self.gan_weight else {"prompts"})

    @property
    def why_images(self) -> str:
        return f"gan_weight = {self.gan_weight:g} shows a critic real pictures; 0 does without"

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        if self.strategy == "long_short":
            guidance = pipeline.default_guidance if self.guidance is None else self.guidance
            self.guide_fake(guidance, guidance, self.prompt_dropout)
        else:
            if self.student.embeds_guidance:
                raise UserError(f'strategy = "{self.strategy}" needs true guidance, but this network is told its scale')
            self.teacher = pipeline.frozen()
            self.guide_fake(*((0.0, 0.0) if self.strategy == "zero" else (1.0, self.anti_guidance)), self.prompt_dropout)
        self.layers = layers_for(f"gan_weight = {self.gan_weight:g}", pipeline) if self.gan_weight else ()
        if self.layers:  # Said now if they give nothing to read, and how often they are called.
            feature_shapes(self.critic.fake, self.layers, pipeline.latent_shape, pipeline.encode_prompts([""]), self.device)

    def sampler(self, steps: int | None = None) -> FewStep:
        sampler = super().sampler(steps)
        if self.noise == "fixed":
            return SameNoise(sampler.times, gamma=1.0, guidance=sampler.guidance)
        return replace(sampler, gamma=1.0 if self.noise == "fresh" else 0.0)

    def fake_loss(self, batch: Batch) -> Loss:
        if not self.gan_weight:
            return super().fake_loss(batch)
        with torch.no_grad():
            x = self.generate(batch)
        assert batch.latents is not None
        t, eps, condition = self.draw_times(len(x)), torch.randn_like(x), self.learnt(batch.condition)
        learns = self.fake_scales[0]
        xt, real = (self.process.add_noise(each, eps, t) for each in (x, batch.latents.to(x)))
        prediction = self.judged(learns)(xt, t, condition, features=self.layers)
        features = features_of(self.judged(learns if learns == 0 else self.told), real, t, condition, self.layers)
        return {
            "score": squared(prediction.output, self.process.target(prediction.kind, x, eps, t)),
            "gan": self.critic_weight / 2 * nonsaturating_critic(pooled(features), pooled(prediction.features), t),
        }

    def student_loss(self, batch: Batch) -> Loss:
        x = guarded(self.generate(batch))
        loss, fake, weight = self.identity(x, batch.condition, self.layers)
        if not self.gan_weight:
            return {"identity": loss}
        # Each sample's share counts as much as its share of the identity.
        fooled = F.softplus(-pooled(fake.features)).mean(1)
        return {"identity": loss, "gan": self.gan_weight * (weight.flatten() * fooled).mean()}


def pooled(features: dict[str, Tensor] | None) -> Tensor:
    """Logits [B, L], above zero for real: maps [B, C, H, W] averaged over channels, tokens [B, N, C] over tokens."""
    assert features is not None
    parts = [wide(x) if x.ndim == 2 else wide(x).mean(1) for x in features.values()]
    return torch.cat([part.flatten(1) for part in parts], 1)


@dataclass(frozen=True)
class SameNoise(FewStep):
    """`FewStep` at gamma 1 that adds to each clean estimate the noise with which the sample began."""

    def _renewed(self, first: Tensor, generator: torch.Generator | None) -> Tensor:
        return first

    def scheduler(self, process: Process, kind: Kind) -> SchedulerSpec:
        if self.steps == 1:
            return super().scheduler(process, kind)
        raise UserError(
            "no stock diffusers scheduler adds the first noise again in every step; "
            'to export a student, train it with noise = "fresh" or noise = "ddim"'
        )
