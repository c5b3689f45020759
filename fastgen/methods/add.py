"""Adversarial diffusion distillation: a discriminator of pictures, and a teacher that denoises what the student made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgen.backbones import load_backbone
from fastgen.critics import PixelCritic, pooled_text
from fastgen.denoiser import Condition, Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.adversarial import Adversarial, decoded
from fastgen.losses import hinge_critic, hinge_student, squared, uniform_times, wide
from fastgen.method import Batch, Loss, Need
from fastgen.pipelines.base import Pipeline
from fastgen.process import SMALLEST

NEGATIVE = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"  # NFSD's own
)


@dataclass
class ADD(Adversarial):
    """Adversarial diffusion distillation (Sauer et al. 2023), the method of SDXL-Turbo.

    From pictures diffused to one of its times (noise alone at the last) the student makes a clean estimate in one call. It
    is decoded, and heads on a frozen image network tell it from the pictures; they know the text and the picture that was
    diffused. R1 is taken by what the heads look at. Besides, the estimate is diffused again and denoised by the guided
    teacher, whose answer it is pulled to: weighted by alpha ("exponential"), so that the gradient is that of score
    distillation ("sds"), or with the noise-free form of that (NFSD, Katzir et al. 2023), which the released models used.

    Differences from the paper: real pictures have been through the autoencoder, so that its traces give nothing away; heads
    know the picture by the mean of the backbone's deepest features, not by a larger DINOv2's, and the text by what the
    pipeline itself computes; distances are means, not sums; sampling renews the noise in whole, where SDXL-Turbo's scheduler
    renews the share that ancestral sampling does.
    """

    backbone: str = field(
        default="dinov2", metadata={"help": 'image network: "dinov2", a name of timm\'s, torchvision/NAME, "toy"'}
    )
    backbone_weights: str = field(default="", metadata={"help": "safetensors file for it; empty: timm's, from the hub"})
    backbone_size: int = field(default=0, metadata={"help": "pixels of what it looks at; 0: its own", "at_least": 0})
    text_known: bool = field(default=True, metadata={"help": "tell the heads the pooled text"})
    image_known: bool = field(default=True, metadata={"help": "tell the heads the picture that was diffused"})
    r1_weight: float = field(default=1e-5, metadata={"help": "weight of the R1 penalty; 0: none", "at_least": 0})
    distill_weight: float = field(default=2.5, metadata={"help": "weight of the distillation loss; 0: none", "at_least": 0})
    weighting: Literal["exponential", "sds", "nfsd"] = field(default="exponential", metadata={"help": "form of that loss"})
    distill_in: Literal["pixels", "latents"] = field(default="pixels", metadata={"help": "where its distance is measured"})
    low: float = field(default=0.02, metadata={"help": "least time at which the teacher denoises", "at_least": 0})
    high: float = field(default=0.98, metadata={"help": "greatest time at which the teacher denoises", "at_most": 1})
    negative_prompt: str = field(default=NEGATIVE, metadata={"help": "what NFSD moves away from"})

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting == "nfsd" and self.distill_in == "pixels":
            raise UserError('weighting = "nfsd" is a gradient, not a distance: distill_in = "pixels" must be "latents" for it')
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"low = {self.low:g} and high = {self.high:g} must be times, 0 <= low < high <= 1")

    def make_critic(self, pipeline: Pipeline) -> PixelCritic:
        self.decode = pipeline.decode
        self.teacher: Predicts = pipeline.frozen()
        if self.weighting == "nfsd" and self.distill_weight:
            if self.teacher.embeds_guidance:
                raise UserError('weighting = "nfsd" needs a teacher without guidance, but this network embeds its guidance')
            self.negative = pipeline.encode_prompts([self.negative_prompt])
        backbone = load_backbone(self.backbone, self.backbone_weights, size=self.backbone_size, device=self.device)
        image = decoded('method.name = "add"', pipeline)
        with torch.no_grad():
            facts = [pooled_text(pipeline.encode_prompts([""]))] if self.text_known else []
            known = sum(each.shape[1] for each in facts if each is not None)
            known += backbone(image.float())[-1].shape[1] if self.image_known else 0
        return PixelCritic(backbone, image.shape[-2:], known)

    @property
    def discriminator(self) -> PixelCritic:
        assert isinstance(self.critic, PixelCritic)
        return self.critic

    def facts(self, condition: Condition, pictures: Tensor) -> Tensor | None:
        """What the heads are told of each sample, [B, K]."""
        text = pooled_text(condition) if self.text_known else None
        image = self.discriminator.image_facts(pictures) if self.image_known else None
        known = [each for each in (text, image) if each is not None]
        return torch.cat(known, 1) if known else None

    @torch.no_grad()
    def pictures(self, batch: Batch) -> Tensor:
        """The real pictures, as the autoencoder gives them back."""
        assert batch.latents is not None
        return self.decode(batch.latents)

    def critic_loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        pictures = self.pictures(batch)
        with torch.no_grad():
            fake = self.decode(self.estimate(batch.latents, batch.condition).x0.to(batch.latents.dtype))
            features = self.discriminator.backbone(torch.cat([pictures, fake]))
        known = self.facts(batch.condition, pictures)
        real_features = [each[: len(pictures)] for each in features]
        logits_real = self.discriminator.judge(real_features, known)
        logits_fake = self.discriminator.judge([each[len(pictures) :] for each in features], known)
        terms = {"gan": hinge_critic(logits_real, logits_fake)}
        if self.r1_weight:
            terms["r1"] = self.r1_weight * self.discriminator.penalty(real_features, known)
        return terms

    def student_loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        x = self.estimate(batch.latents, batch.condition).x0.to(batch.latents.dtype)
        image = self.decode(x)
        known = self.facts(batch.condition, self.pictures(batch)) if self.image_known else self.facts(batch.condition, image)
        terms = {"gan": hinge_student(self.discriminator(image, known))}
        if self.distill_weight:
            terms["distill"] = self.distill_weight * self.distillation(x, image, batch.condition)
        return terms

    def distillation(self, x: Tensor, image: Tensor, condition: Condition) -> Tensor:
        """c(t) times the squared distance of the student's estimate from the teacher's of it, diffused to a random t."""
        with torch.no_grad():
            t = uniform_times(self.process, len(x), low=self.low, high=self.high, device=x.device)
            xt = self.process.add_noise(x, torch.randn_like(x), t).to(x.dtype)
            if self.weighting == "nfsd":
                alpha, sigma = self.process.coefficients(t, x)
                target = wide(x) - sigma / alpha.clamp_min(SMALLEST) * self.noise_free(xt, t, condition)
            else:
                target = Guided(self.teacher, self.scale)(xt, t, condition).x0
            student = image if self.distill_in == "pixels" else x
            alpha, sigma = self.process.coefficients(t, student)  # pictures may have more dimensions than latents
            # With alpha sigma / 2 and w = sigma^2 the gradient is w (eps of the teacher - eps), score distillation's.
            weight = alpha if self.weighting == "exponential" else alpha * sigma / 2
            if self.distill_in == "pixels":
                target = self.decode(target.to(x.dtype))
        return squared(student, target, weight)

    def noise_free(self, xt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """NFSD's direction in eps: guidance, and above t = 0.2 away from the negative prompt (Katzir et al. 2023)."""
        if condition.null is None:
            raise UserError('weighting = "nfsd" needs an unconditional twin, which this pipeline\'s conditions lack')
        negative = self.negative[[0] * len(xt)].to(xt.device)
        yes, no, bad = (self.teacher(xt, t, each).eps for each in (condition, condition.null, negative))
        late = (t < 0.2).view(-1, *[1] * (xt.ndim - 1))
        return self.scale * (yes - no) + torch.where(late, no, no - bad)
