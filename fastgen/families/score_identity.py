"""Score identity distillation: a Fisher divergence of student and teacher, written so that no score of the student is needed.

The family of SiD (Zhou et al. 2024), SiD with long and short guidance (Zhou et al. 2025a) and few-step SiD (Zhou et al.
2025b, c). Unlike the rest of score distillation the student's gradient goes through the two denoisers, whose weights are
held, and not around them: no second derivatives, but the graph of three networks at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Guided, Predicts, features_of
from fastgen.errors import UserError
from fastgen.families.score_distillation import ScoreDistillation
from fastgen.losses import denoising, logit_normal_times, record_scores, snr, wide
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline
from fastgen.process import Prediction, Process

Weight = Literal["normalised", "alpha", "alpha_squared", "inverse_sigma", "inverse_sigma_squared", "sqrt_snr", "snr"]
"""How much a time counts: 1 / mean|x - real| of each sample, or a function of the process; alpha is 1 - sigma of a flow."""

SMALLEST = 1e-5


def score_identity(x: Tensor, fake: Tensor, real: Tensor, alpha: float, weight: Tensor | float = 1.0) -> Tensor:
    """Mean over all elements of weight (real - fake) ((real - x) - alpha (real - fake)): SiD's fused loss.

    `fake` and `real` are the clean estimates of the fake score and of the teacher for `x` with noise added, with their graphs
    back to x; all [B, ...], `weight` broadcasts. With estimates cut off from x its gradient is that of distribution matching,
    weight (fake - real) over the number of elements. With an exact fake score its expectation is (1 - alpha) times that of
    weight (real - fake)^2. Elements that are not finite count as zero.
    """
    difference = wide(real) - wide(fake)
    terms = weight * difference * ((wide(real) - wide(x)) - alpha * difference)
    return torch.where(terms.isfinite(), terms, 0.0).mean()


def time_weight(name: Weight, process: Process, t: Tensor, x: Tensor, real: Tensor) -> Tensor:
    """The weight of every sample [B, 1, ...] at times `t` [B], without gradient; divisors are at least 1e-5."""
    with torch.no_grad():
        alpha, sigma = process.coefficients(t, wide(x))
        if name == "normalised":
            distance = (wide(x) - wide(real)).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
            return 1 / distance.clamp_min(SMALLEST)
        if name in ("snr", "sqrt_snr"):
            ratio = snr(process, t, wide(x))
            return ratio.sqrt().clamp_max(1 / SMALLEST) if name == "sqrt_snr" else ratio.clamp_max(1 / SMALLEST)
        if name in ("alpha", "alpha_squared"):
            return alpha if name == "alpha" else alpha**2
        return 1 / (sigma if name == "inverse_sigma" else sigma**2).clamp_min(SMALLEST)


def guarded(x: Tensor) -> Tensor:
    """`x`, whose gradient is zero where it is not finite: a network that answers nonsense does not move the student."""
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda gradient: torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0))  # type: ignore[no-untyped-call]
    return x


@dataclass
class ScoreIdentity(ScoreDistillation):
    """What SiD's methods share: the loss through two held denoisers, and the guidance of the fake score in its two roles.

    Subclasses call `guide_fake` in `setup` where the fake score is guided.
    """

    alpha: float = field(default=1.0, metadata={"help": "share of the squared score difference that is taken off the loss"})
    weight: Weight = field(
        default="normalised",
        metadata={"help": "how much a time counts: 1 / mean|x - teacher's x0|, or a function of its noise"},
    )
    noise_law: Literal["uniform", "logit_normal"] = field(
        default="uniform",
        metadata={"help": "law of the times of both losses: uniform from low to high, or SiD-DiT's for flows, of all times"},
    )

    family: ClassVar[str] = "score identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight not in get_args(Weight):
            raise UserError(f"weight must be one of {', '.join(get_args(Weight))}, not {self.weight!r}")
        if self.noise_law == "logit_normal":
            self.refuse_idle('with noise_law = "logit_normal", which is of all times', "low", "high")

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.guide_fake(self.told, self.told)

    def guide_fake(self, learns: float, judges: float, prompt_dropout: float = 0.0) -> None:
        """Guide the fake score by these scales when it learns and when it judges the student.

        `prompt_dropout`: the share of samples that it learns without their condition; none where guidance takes no null twin.
        """
        self.fake_scales = learns, judges
        self.drop_share = 0.0 if self.student.embeds_guidance or learns == judges == 1 else prompt_dropout

    def judged(self, scale: float) -> Predicts:
        """The fake score under a guidance scale (diffusers convention; 1 = off, 0 = unconditional, below 0 away)."""
        if scale == 0:
            return Unconditional(self.critic.fake)
        return Guided(self.critic.fake, scale)

    def draw_times(self, count: int) -> Tensor:
        """Times [B] of either loss."""
        if self.noise_law == "uniform":
            return self.score_times(count)
        mean, std = math.log(2), 1.6  # SiD-DiT's code
        return logit_normal_times(self.process, count, mean=mean, std=std, shift=self.noise_shift, device=self.device)

    def learnt(self, condition: Condition) -> Condition:
        """What the fake score is conditioned on when it learns: in a share of the samples nothing, where it is guided."""
        if not self.drop_share:
            return condition
        return condition.dropout(torch.rand(len(condition), device=self.device) < self.drop_share)

    def fake_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            x = self.generate(batch)
        t, fake = self.draw_times(len(x)), self.judged(self.fake_scales[0])
        return {"score": denoising(fake, x, torch.randn_like(x), t, self.learnt(batch.condition))}

    def student_loss(self, batch: Batch) -> Loss:
        x = guarded(self.generate(batch))
        return {"identity": self.identity(x, batch.condition)[0]}

    def identity(self, x: Tensor, condition: Condition, features: Sequence[str] = ()) -> tuple[Tensor, Prediction, Tensor]:
        """The loss of the student's samples `x`, the fake score's prediction with its graph, and each sample's weight."""
        t = self.draw_times(len(x))
        xt = self.process.add_noise(x, torch.randn_like(x), t)
        fake = self.judged(self.fake_scales[1])(xt, t, condition, features=features)
        real = self.teacher(xt, t, condition).x0
        weight = time_weight(self.weight, self.process, t, x, real)
        if self.fake_scales[0] == self.fake_scales[1]:  # else it judges otherwise than it has learnt to denoise
            record_scores(x, fake.x0, real, t)
        return score_identity(x, fake.x0, real, self.alpha, weight), fake, weight


class Unconditional:
    """A denoiser that is told nothing of what its samples are conditioned on."""

    def __init__(self, denoiser: Predicts):
        self.denoiser = denoiser

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def embeds_guidance(self) -> bool:
        return self.denoiser.embeds_guidance

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """As `Denoiser.forward`, with the null condition in the place of `condition`."""
        return self.denoiser(xt, t, self._null(condition), guidance=guidance, features=features, end=end)

    def only_features(self, xt: Tensor, t: Tensor, condition: Condition, **more: Any) -> dict[str, Tensor]:
        """See `features_of`."""
        layers = more.pop("features", ())
        return features_of(self.denoiser, xt, t, self._null(condition), layers, **more)

    def _null(self, condition: Condition) -> Condition:
        if condition.null is None:
            raise UserError("an unconditional score needs a condition with a null twin, which this pipeline's has not")
        return condition.null
