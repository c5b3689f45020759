"""Continuous-time consistency models: distilled from a teacher's trajectories, or trained from data alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.families.continuous import TRIG, ContinuousConsistency
from fastgen.pipelines.base import Pipeline


@dataclass
class SCM(ContinuousConsistency):
    """Simplified continuous-time consistency models, sCM (Lu and Song 2025).

    The student's clean estimate f along a trajectory is held constant by its tangent df / dangle, taken through the network in
    forward mode, normalised, and let in over the first updates (algorithm 1). Distillation follows the guided teacher's
    trajectories (sCD); with `training` the speed is that of the very data and noise (sCT), and no teacher is asked.

    Differences from the paper: a student that is not told its guidance follows one fixed scale; the norm of the tangent is the
    root mean square, the same for every size of latents; the law of the angles is SANA-Sprint's, made for text-to-image
    latents, and of those beyond the end of a noise table the network is told its last timestep; there is no weight over angles
    unless it is asked for, since a normalised tangent has one size at all of them and the learnt weight would only take the
    prior one back; it is linear in waves of the angle, and bounded. The paper's changes to the network (normalisation of the
    time embedding, no high frequencies) are left to whoever makes the teacher.
    """

    training: bool = field(default=False, metadata={"help": "learn from data alone, without the teacher's trajectories"})

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = [self.guidance] if self.guidance is not None else list(self.guidance_scales)
        if self.training and any(scale != 1 for scale in asked):
            raise UserError(f"training = true asks no teacher, so guidance = {asked[0]:g} has nothing to guide; drop one")
        if self.training and self.embed_guidance:
            raise UserError("training = true asks no teacher, so embed_guidance = true has no guidance to tell; drop one")

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        if self.training:
            self.scale = self.told = 1.0

    def speed(self, xt: Tensor, t: Tensor, condition: Condition, x0: Tensor, eps: Tensor, told: Tensor | None) -> Tensor:
        if not self.training:
            return super().speed(xt, t, condition, x0, eps, told)
        return TRIG.target("v", x0, eps, t)
