"""Improved distribution matching distillation: the student's distribution is moved along the difference of two scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.critics import ScoreCritic, feature_shapes
from fastgen.denoiser import Condition, Denoiser, Guided
from fastgen.errors import UserError
from fastgen.losses import (
    contrast,
    denoising,
    nonsaturating_critic,
    nonsaturating_student,
    shared_choice,
    squared,
    uniform_times,
)
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import FewStep, even_times, timesteps_to_times


@dataclass
class DMD2(Method):
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

    steps: int = field(default=4, metadata={"help": "network calls a sample, evenly spaced in time"})
    timesteps: tuple[int, ...] = field(
        default=(), metadata={"help": "the calls' timesteps, such as [999, 749, 499, 249], in place of steps"}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    student_every: int = field(default=5, metadata={"help": "updates of the fake score for one of the student"})
    fake_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rate of the fake score over the student's", "above": 0}
    )
    gan_weight: float = field(
        default=5e-3, metadata={"help": "weight of the GAN loss in the student's turn; 0: none, no images"}
    )
    critic_weight: float = field(default=1e-2, metadata={"help": "weight of the discriminator's loss in the fake score's turn"})
    low: float = field(default=0.02, metadata={"help": "least time at which the scores are compared"})
    high: float = field(default=0.98, metadata={"help": "greatest time at which the scores are compared"})
    shift: float = field(default=1.0, metadata={"help": "moves the student's steps towards noise, for flow models", "above": 0})
    noise_shift: float = field(default=1.0, metadata={"help": "moves the times of all losses towards noise", "above": 0})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        decreasing = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if self.timesteps and (not decreasing or self.timesteps[-1] < 0):
            raise UserError(f"timesteps must decrease and not be negative, not {list(self.timesteps)}")
        if self.timesteps and self.shift != 1:
            raise UserError(
                f"timesteps = {list(self.timesteps)} are taken as they are, without shift = {self.shift:g}; drop one"
            )
        if self.student_every < 1:
            raise UserError(f"student_every must be at least 1, not {self.student_every}")
        if min(self.gan_weight, self.critic_weight) < 0:
            raise UserError(f"gan_weight = {self.gan_weight:g} and critic_weight = {self.critic_weight:g} must not be negative")
        if self.gan_weight and not self.critic_weight:
            raise UserError(
                f"gan_weight = {self.gan_weight:g} needs a discriminator that learns, so critic_weight must be above 0"
            )
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"low = {self.low:g} and high = {self.high:g} must be times, 0 <= low < high <= 1")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"prompts", "images"} if self.gan_weight else {"prompts"})

    def setup(self, pipeline: Pipeline) -> None:
        self.process, self.device = pipeline.process, pipeline.device
        if self.timesteps:
            last = float(self.process.timestep(torch.ones((), dtype=torch.float64)))
            if self.timesteps[0] > last:
                raise UserError(f"timesteps begin at {self.timesteps[0]}, but the pipeline's last is {last:g}")
            self.times = timesteps_to_times(self.process, self.timesteps)
        else:
            self.times = even_times(self.steps, self.process, self.shift)
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        self.teacher = Guided(pipeline.frozen(), guidance)
        self.student, fake = pipeline.trainable("student"), pipeline.trainable("fake_score")
        self.told = guidance if self.student.embeds_guidance else 1.0
        self.fake = Guided(fake, self.told)
        layers = pipeline.feature_layers if self.gan_weight else ()
        if self.gan_weight and not layers:
            raise UserError(f"gan_weight = {self.gan_weight:g} needs feature layers, and this pipeline has none; set it to 0")
        condition = pipeline.encode_prompts([""])
        shapes = feature_shapes(self.fake, layers, pipeline.latent_shape, condition, self.device) if layers else []
        self.critic = ScoreCritic(fake, layers, shapes).to(self.device)

    def players(self) -> Sequence[Player]:
        return [
            Player("fake_score", self.critic, self.fake_loss, lr_scale=self.fake_lr_scale),
            Player("student", self.student, self.student_loss, every=self.student_every),
        ]

    @property
    def trained(self) -> Denoiser:
        return self.student

    def sampler(self, steps: int | None = None) -> FewStep:
        if steps not in (None, len(self.times)):
            raise UserError(f"this student was trained for {len(self.times)} steps, not for {steps}")
        return FewStep(self.times, gamma=1.0, guidance=self.told)

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean estimate at a random call of its own sampler, with the graph of that call alone."""
        noise = torch.randn(batch.shape, device=self.device)
        exit_at = shared_choice(len(self.times), self.device)
        return self.sampler().sample(self.student, noise, batch.condition, exit_at=exit_at)

    def fake_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            x = self.generate(batch)
        t, eps = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device), torch.randn_like(x)
        if not self.gan_weight:
            return {"score": denoising(self.fake, x, eps, t, batch.condition)}
        assert batch.latents is not None
        real = batch.latents.to(x)
        xt = self.process.add_noise(torch.cat([x, real]), torch.cat([eps, torch.randn_like(x)]), torch.cat([t, t]))
        both = Condition.cat([batch.condition, batch.condition])
        prediction = self.fake(xt, torch.cat([t, t]), both, features=self.critic.layers)
        logits_fake, logits_real = self.critic.logits(prediction.features).chunk(2)
        return {
            "score": squared(prediction.output[: len(x)], self.process.target(prediction.kind, x, eps, t)),
            "gan": self.critic_weight * nonsaturating_critic(logits_real, logits_fake),
        }

    def student_loss(self, batch: Batch) -> Loss:
        x = self.generate(batch)
        terms = {"dmd": self.matching(x, batch.condition)}
        if self.gan_weight:
            t = uniform_times(self.process, len(x), shift=self.noise_shift, device=x.device)
            xt = self.process.add_noise(x, torch.randn_like(x), t)
            features = self.fake(xt, t, batch.condition, features=self.critic.layers).features
            terms["gan"] = self.gan_weight * nonsaturating_student(self.critic.logits(features))
        return terms

    def matching(self, x: Tensor, condition: Condition) -> Tensor:
        """The distribution matching loss of the student's samples `x`."""
        with torch.no_grad():
            t = uniform_times(self.process, len(x), low=self.low, high=self.high, shift=self.noise_shift, device=x.device)
            xt = self.process.add_noise(x, torch.randn_like(x), t)
            fake, real = self.fake(xt, t, condition).x0, self.teacher(xt, t, condition).x0
        return contrast(x, fake, real)
