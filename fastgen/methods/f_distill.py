"""f-distill: DMD2 under another divergence, by weighting each sample with the density ratio that its discriminator knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from fastgen.errors import UserError
from fastgen.losses import contrast, nonsaturating_student, record_scores
from fastgen.method import Batch, Loss
from fastgen.methods.dmd2 import DMD2
from fastgen.pipelines.base import Pipeline

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"
]

WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}
"""h(r) = f''(r) r^2 with r the density of real samples over that of the student's, up to a constant (f-distill, table 1)."""


@dataclass
class FDistill(DMD2):
    """f-distill, distribution matching under a general f-divergence (Xu et al. 2025).

    DMD2's gradient times h(r) of each noised sample, where the discriminator's mean logit is log r (theorem 1). r is
    divided by its mean at about this noise level, h by its mean, so that neither the level nor the divergence changes the
    size of the gradient. Reverse KL is DMD2 itself; the others hold on to more modes.

    Differences from NVIDIA's code: the means are running ones by default, not those of one batch, which for a few samples
    a device would divide the ratio by itself (`ratio_decay = 0` is theirs); the discriminator looks at the fake score's
    features, as DMD2's does. Differences from the authors' DMD2: see dmd2.
    """

    divergence: Divergence = field(default="jensen_shannon", metadata={"help": "what is minimised"})
    ratio_low: float = field(default=0.1, metadata={"help": "ratios are clipped from below", "above": 0})
    ratio_high: float = field(default=20.0, metadata={"help": "ratios are clipped from above"})
    ratio_bins: int = field(
        default=10, metadata={"help": "ranges of time over which ratios are averaged; 0: no division", "at_least": 0}
    )
    ratio_decay: float = field(
        default=0.9, metadata={"help": "share of the means that a batch keeps", "at_least": 0, "below": 1}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gan_weight:
            raise UserError("gan_weight = 0 leaves f_distill without its discriminator, which knows the ratio; use dmd2")
        if self.ratio_low >= self.ratio_high:
            raise UserError(f"ratio_low = {self.ratio_low:g} must be below ratio_high = {self.ratio_high:g}")

    @property
    def why_images(self) -> str:
        return f"gan_weight = {self.gan_weight:g} shows a critic real pictures; dmd2 can do without"

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.ratio_means = torch.ones(max(self.ratio_bins, 1), device=self.device)
        self.weight_mean = torch.ones(1, device=self.device)

    def state(self) -> dict[str, Any]:
        return {"ratio_means": self.ratio_means, "weight_mean": self.weight_mean}

    def load_state(self, state: dict[str, Any]) -> None:
        self.ratio_means = state["ratio_means"].to(self.device)
        self.weight_mean = state["weight_mean"].to(self.device)

    def student_loss(self, batch: Batch) -> Loss:
        x = self.generate(batch)
        t = self.score_times(len(x))
        xt = self.process.add_noise(x, torch.randn_like(x), t)
        fake = self.fake(xt, t, batch.condition, features=self.critic.layers)
        logits = self.critic.logits(fake.features)
        with torch.no_grad():
            real = self.teacher(xt, t, batch.condition).x0
            record_scores(x, fake.x0, real, t)
            weight = self.weight(logits, t).view(-1, *[1] * (x.ndim - 1))
        return {
            "dmd": contrast(x, fake.x0, real, weight),
            "gan": self.gan_weight * nonsaturating_student(logits),
        }

    def weight(self, logits: Tensor, t: Tensor) -> Tensor:
        """h(r) [B] over its running mean, from the discriminator's `logits` [B, L] of samples noised to `t` [B]."""
        ratio = logits.float().mean(1).clamp(-10, 10).exp().clamp(self.ratio_low, self.ratio_high)
        if self.ratio_bins:
            place = (t * self.ratio_bins).long().clamp(max=self.ratio_bins - 1)
            self.ratio_means = self._moved(self.ratio_means, place, ratio)
            ratio = ratio / self.ratio_means[place]
        weight = WEIGHTS[self.divergence](ratio)
        self.weight_mean = self._moved(self.weight_mean, torch.zeros_like(t, dtype=torch.long), weight)
        return weight / self.weight_mean

    def _moved(self, means: Tensor, place: Tensor, values: Tensor) -> Tensor:
        """`means` after a batch with `values` [B] at positions `place` [B], over all processes; others stay."""
        sums = torch.zeros(2, len(means), device=means.device)
        sums[0].index_add_(0, place, values)
        sums[1].index_add_(0, place, torch.ones_like(values))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        new = self.ratio_decay * means + (1 - self.ratio_decay) * sums[0] / sums[1].clamp_min(1)
        return torch.where(sums[1] > 0, new, means)
