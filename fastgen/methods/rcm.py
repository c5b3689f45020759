"""Score-regularised continuous-time consistency: sCM, with distribution matching over the student's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.critics import ScoreCritic
from fastgen.denoiser import Guided, Predicts, Retimed
from fastgen.errors import UserError
from fastgen.families.continuous import RIGHT, TRIG, ContinuousConsistency, trig_times
from fastgen.losses import denoising, distribution_matching, shared_choice
from fastgen.method import Batch, Loss, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import shift_time

ANGLES = (RIGHT, 1.3, 1.0, 0.6)
"""Of up to four calls in the authors' code."""


@dataclass
class RCM(ContinuousConsistency):
    """Score-regularised continuous-time consistency models, rCM (Zheng et al. 2025).

    sCM keeps the teacher's diversity and loses fine detail, distribution matching the other way round: the student
    minimises the sum of both. Its samples for the second come from backward simulation, up to `most_calls` calls at random
    decreasing times, the last with gradient; a fake score learns to denoise them, by squared error in F.

    Differences from the authors' code: guidance is in the convention where 1 is off (theirs, 5, plus 1); the fake score moves
    in every update from the first, and distribution matching begins at once, not after the warm-up; the number of calls is
    drawn, not counted; losses are means, not sums, so that `dmd_weight` 1 there is the root of the number of latents over 50
    here, 10 for 16 x 128 x 128; the tangent's norm, to which `normaliser` is added, is a root mean square, theirs
    the root of a sum; the derivative of the network is taken in its own precision.
    """

    steps: int = field(default=4, metadata={"help": "network calls a sample, 1 to 8"})
    guidance: float | None = field(
        default=6.0, metadata={"help": "guidance of the teacher, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    noise_mean: float = field(default=0.7, metadata={"help": "mean of the log of sigma_data tan(angle) in training"})
    sigma_data: float = field(default=1.0, metadata={"help": "sigma_data in the law of the angles", "above": 0})
    warmup: int = field(
        default=1000, metadata={"help": "the student's updates over which the tangent's terms are let in", "at_least": 0}
    )
    dmd_weight: float = field(default=10.0, metadata={"help": "weight of distribution matching", "above": 0})
    most_calls: int = field(default=4, metadata={"help": "most calls in backward simulation"})
    noise_shift: float = field(
        default=5.0, metadata={"help": "moves times of simulation and scores, uniform as a flow's, to noise", "above": 0}
    )
    student_every: int = field(default=5, metadata={"help": "updates of the fake score for one of the student"})
    fake_lr_scale: float = field(
        default=0.2, metadata={"help": "learning rate of the fake score over the student's", "above": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("most_calls", "student_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(set(self.guidance_scales)) > 1:
            scales = f"guidance_scales = {list(self.guidance_scales)}"
            raise UserError(f"{scales} would be drawn, and rcm's fake score is not told a sample's scale; give one")

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        fake = pipeline.trainable("fake_score")
        self.critic = ScoreCritic(fake)
        self.fake: Predicts = Retimed(Guided(fake, self.scale if fake.embeds_guidance else 1.0), TRIG)

    def calls(self, steps: int | None) -> tuple[float, ...]:
        if steps is None and self.angles:
            return self.angles
        steps = self.steps if steps is None else steps
        return ANGLES[:steps] if steps <= len(ANGLES) else super().calls(steps)

    def players(self) -> Sequence[Player]:
        return [
            Player("fake_score", self.critic, self.fake_loss, lr_scale=self.fake_lr_scale),
            Player("student", self.weights, self.loss, every=self.student_every),
        ]

    def advance(self, step: int, total: int) -> bool:
        return super().advance(step // self.student_every, total)

    def pull(self, cos: Tensor, sin: Tensor) -> Tensor:
        return cos * (1 - (self.share * sin).square()).sqrt()

    def loss(self, batch: Batch) -> Loss:
        return {"consistency": self.consistency(batch), "dmd": self.dmd_weight * self.matching(batch)}

    def fake_loss(self, batch: Batch) -> Loss:
        """The fake score learns to denoise the student's samples."""
        with torch.no_grad():
            x = self.generate(batch, self.draw_scales(batch.shape[0]))
        return {"score": denoising(self.fake, x, torch.randn_like(x), self.noise_times(len(x)), batch.condition)}

    def matching(self, batch: Batch) -> Tensor:
        """The distribution matching loss of samples of the student."""
        told = self.draw_scales(batch.shape[0])
        x = self.generate(batch, told)
        return distribution_matching(x, self.noise_times(len(x)), batch.condition, self.fake, self.teacher, told)

    def generate(self, batch: Batch, told: Tensor | None) -> Tensor:
        """The student's clean estimate after a random number of calls at random decreasing times, the first at pure noise.

        It has the graph of the last call alone.
        """
        more = shared_choice(self.most_calls, self.device)
        x, t = torch.randn(batch.shape, device=self.device), torch.ones(batch.shape[0], device=self.device)
        for _ in range(more):
            with torch.no_grad():
                x0 = self.flow(x, t, batch.condition, guidance=told).x0
                t = torch.minimum(self.noise_times(len(x)), t)
                x = TRIG.add_noise(x0, torch.randn_like(x0), t)
        return self.flow(x, t, batch.condition, guidance=told).x0

    def noise_times(self, count: int) -> Tensor:
        """Times of TrigFlow whose noise is that of a flow's uniform times, moved towards noise by `noise_shift`."""
        u = shift_time(torch.rand(count, dtype=torch.float64, device=self.device), self.noise_shift)
        return trig_times(u / (1 - u))
