"""SnapFusion's step distillation: a student of fewer steps that is guided in sampling just as its teacher is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.families.progressive import ProgressiveDistillation, divided
from fastgen.losses import drawn_scales, shared_uniform, squared, wide
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline
from fastgen.process import SMALLEST, Prediction

TINY = 1e-12


@dataclass
class SnapFusion(ProgressiveDistillation):
    """SnapFusion's step distillation with guidance in the loss (Li et al. 2023, section 4.2).

    Most updates are progressive distillation of the bare network: one step lands where the teacher's two do. A share
    `cfg_share` of them guides both, teacher and student, with a scale drawn for each sample, so that the student stays good
    under guidance, which it keeps in sampling. An ordinary denoising loss on the data is added, scaled to `denoising_share`
    of the distillation loss. As there, 32 steps are taken to 16, and those to 8.

    Differences from the paper: captions are dropped in some of the bare updates, as diffusion models are trained, so that
    the unconditional half of the guided student is taught too; a network that embeds its guidance is told the scale instead;
    at t = 1 the input is noise alone, as in sampling. The efficient UNet is not part of it.
    """

    start_steps: int = field(default=32, metadata={"help": "steps of the first teacher"})
    guidance: float | None = field(
        default=None, metadata={"help": "guidance in sampling, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    stop_steps: int = field(default=8, metadata={"help": "steps of the last student: start_steps over a power of factor"})
    factor: int = field(default=2, metadata={"help": "teacher steps that one step of the student replaces"})
    cfg_share: float = field(
        default=0.1, metadata={"help": "share of the updates in which both are guided", "at_least": 0, "at_most": 1}
    )
    guidance_low: float = field(default=2.0, metadata={"help": "least guidance scale in those updates", "at_least": 1})
    guidance_high: float = field(default=14.0, metadata={"help": "greatest guidance scale in those updates", "at_least": 1})
    denoising_share: float = field(
        default=0.2, metadata={"help": "size of the denoising loss over the distillation loss; 0: none", "at_least": 0}
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "share of captions dropped in bare updates", "at_least": 0, "at_most": 1}
    )

    def __post_init__(self) -> None:
        self.check_stages()
        if self.guidance_low > self.guidance_high:
            low, high = self.guidance_low, self.guidance_high
            raise UserError(f"guidance_low = {low:g} must be at most guidance_high = {high:g}")
        if self.guidance not in (None, 1) and not self.guidance_low <= self.guidance <= self.guidance_high:
            trained = f"1 and guidance_low = {self.guidance_low:g} to guidance_high = {self.guidance_high:g}"
            raise UserError(f"guidance = {self.guidance:g} is outside what the student is trained for, {trained}")

    @property
    def stages(self) -> list[int]:
        return divided(self.start_steps, self.stop_steps, self.factor)

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.told = self.scale  # the student is guided, by two predictions or by being told

    def loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        xt, times = self.begin(batch)
        t, condition = times[0], batch.condition
        guided = shared_uniform(device=xt.device) < self.cfg_share
        plain: float | Tensor = self.scale if self.student.embeds_guidance else 1.0
        scale = self.random_scales(xt) if guided else plain
        if not guided and self.caption_dropout:
            condition = condition.dropout(torch.rand(len(xt), device=xt.device) < self.caption_dropout)
        prediction = Guided(self.student, scale)(xt, t, condition)
        error = self.regression(prediction, times, condition, teacher=Guided(self.source, scale))
        terms = {"guided_step" if guided else "step": error}
        if self.denoising_share:
            bare = Guided(self.student, plain)(xt, t, condition) if guided else prediction
            denoising = self.denoising(bare, batch.latents)
            ratio = wide(error).detach() / wide(denoising).detach().clamp_min(TINY)
            terms["denoising"] = self.denoising_share * ratio * denoising
        return terms

    def random_scales(self, xt: Tensor) -> Tensor:
        """A guidance scale for each sample, [B]."""
        return drawn_scales(self.guidance_low, self.guidance_high, len(xt), xt.device)

    def denoising(self, prediction: Prediction, x0: Tensor) -> Tensor:
        """The ordinary diffusion loss, in the network's own kind of prediction; the noise is what x_t is besides the data."""
        process, t = self.student.process, prediction.t
        alpha, sigma = process.coefficients(t, x0)
        eps = (wide(prediction.xt) - alpha * wide(x0)) / sigma.clamp_min(SMALLEST)
        return squared(prediction.output, process.target(prediction.kind, wide(x0), eps, t))
