"""Adversarial distillation: a few-step student is trained against a discriminator of its clean estimates.

The family of ADD and LADD. The student starts from diffused data at the times of its own sampler; methods say what the
discriminator looks at and what else the student minimises.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgen.critics import FeatureCritic
from fastgen.denoiser import Condition, Guided, Predicts
from fastgen.errors import UserError
from fastgen.losses import noised
from fastgen.method import Batch, Loss, Method, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import Prediction
from fastgen.samplers import FewStep, even_times, fewer_calls


def layers_for(option: str, pipeline: Pipeline, remedy: str = "set it to 0") -> tuple[str, ...]:
    """The pipeline's feature layers, for the discriminator that `option` asks for.

    Raises UserError, with the `remedy`, where it has none.
    """
    if not pipeline.feature_layers:
        raise UserError(f"{option} needs feature layers, and this pipeline has none; {remedy}")
    return pipeline.feature_layers


def decoded(option: str, pipeline: Pipeline) -> Tensor:
    """One picture [1, 3, H, W] of the pipeline's, for `option`, which looks at pictures.

    Raises UserError for a pipeline that makes videos.
    """
    with torch.no_grad():
        image = pipeline.decode(torch.zeros(1, *pipeline.latent_shape, device=pipeline.device))
    if image.ndim > 4:
        raise UserError(f"{option} looks at pictures, and this pipeline makes videos, of shape {list(image.shape[1:])}")
    return image


def require_others(option: str, count: int) -> None:
    """Raise UserError where a part of a batch has a single sample, and so no other's text that `option` could take."""
    if count < 2:
        raise UserError(
            f"{option} takes texts of other samples, and parts of a batch have {count} sample; "
            "lower train.micro_batches or raise train.batch"
        )


def feature_critic(
    pipeline: Pipeline, backbone: Predicts, layers: Sequence[str], *, width: int = 1280, conditioned: bool = False
) -> FeatureCritic:
    """A discriminator of the pipeline's noised latents: heads on features of the frozen `backbone`."""
    seen = backbone, layers, pipeline.latent_shape, pipeline.encode_prompts([""])
    return FeatureCritic(*seen, device=pipeline.device, width=width, conditioned=conditioned)


@dataclass
class Adversarial(Method):
    """A student that goes from diffused data to its clean estimate in one call, and a discriminator.

    After `setup` there are `process`, `device`, `times` (at which the student is called), `scale` (the teacher's guidance),
    `student`, `told` (what a network that embeds its guidance is told; else 1), and `critic`.
    """

    steps: int = field(default=4, metadata={"help": "network calls a sample, evenly spaced in time", "at_least": 1})
    gamma: float = field(
        default=1.0, metadata={"help": "share of noise renewed between calls in sampling, 0 to 1", "at_least": 0, "at_most": 1}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    critic_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rate of the discriminator over the student's", "above": 0}
    )
    shift: float = field(default=1.0, metadata={"help": "moves the student's steps towards noise, for flow models", "above": 0})

    family: ClassVar[str] = "adversarial"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")

    def setup(self, pipeline: Pipeline) -> None:
        self.process, self.device = pipeline.process, pipeline.device
        self.times = even_times(self.steps, self.process, self.shift)
        self.scale = pipeline.default_guidance if self.guidance is None else self.guidance
        self.student = pipeline.trainable("student")
        self.told = self.scale if self.student.embeds_guidance else 1.0
        self.critic = self.make_critic(pipeline).to(self.device)

    @abstractmethod
    def make_critic(self, pipeline: Pipeline) -> nn.Module:
        """The discriminator. Raises UserError for options that this pipeline cannot serve."""

    def players(self) -> Sequence[Player]:
        return [
            Player("critic", self.critic, self.critic_loss, lr_scale=self.critic_lr_scale),
            Player("student", self.student, self.student_loss),
        ]

    def sampler(self, steps: int | None = None) -> FewStep:
        """All of the times trained, or evenly spaced ones among them."""
        return FewStep(self.times[:: self.steps // fewer_calls(self.steps, steps)], gamma=self.gamma, guidance=self.told)

    def estimate(self, x0: Tensor, condition: Condition, shares: Sequence[float] = (), eps: Tensor | None = None) -> Prediction:
        """The student's prediction at data `x0` [B, ...] diffused to one of its times, drawn for each sample.

        `shares` say how often each time is drawn, by default equally; `eps` is the noise, by default fresh. At t = 1 the
        input is the noise alone (zero terminal signal), as in sampling.
        """
        weights = torch.tensor(shares or [1.0] * len(self.times), device=x0.device)
        t = torch.tensor(self.times, device=x0.device)[torch.multinomial(weights, len(x0), replacement=True)]
        xt = noised(self.process, x0, torch.randn_like(x0) if eps is None else eps, t)
        return Guided(self.student, self.told)(xt, t, condition)

    @abstractmethod
    def critic_loss(self, batch: Batch) -> Loss:
        """What the discriminator minimises."""

    @abstractmethod
    def student_loss(self, batch: Batch) -> Loss:
        """What the student minimises."""
