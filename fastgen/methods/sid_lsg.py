"""Score identity distillation with long and short guidance: the fake score is guided too, when it learns and when it judges."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgen.families.score_identity import ScoreIdentity
from fastgen.pipelines.base import Pipeline


@dataclass
class SiDLSG(ScoreIdentity):
    """Guided score identity distillation, long and short guidance (Zhou et al. 2025a).

    SiD of a text-to-image model. The fake score's guided prediction is what learns to denoise the student's samples (kappa_1),
    and what judges them (kappa_2 = kappa_3), against the guided teacher (kappa_4); the paper's strategy takes one scale for
    all: 1.5 for the best FID, up to 4.5 for the best CLIP score. A tenth of the samples has no prompt when the fake score
    learns.

    Differences from the authors' code: losses are means, theirs sums over elements; v-networks learn from the plain error in v,
    theirs weighted with SNR / (1 + SNR); the first input is noise of unit variance, as samplers of diffusers start, theirs
    of the variance at its timestep, 625; samples whose prompt the fake score does not see were made with it, theirs without;
    an answer that is not finite gives no gradient, theirs leaves the sample out.
    """

    steps: int = field(default=1, metadata={"help": "network calls a sample, evenly spaced in time"})
    guidance: float | None = field(
        default=2.0, metadata={"help": "guidance of the teacher, kappa_4, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    fake_guidance: float | None = field(
        default=None, metadata={"help": "guidance of the fake score when it judges, kappa_2 = kappa_3; none: the teacher's"}
    )
    fake_training_guidance: float | None = field(
        default=None, metadata={"help": "guidance of the fake score when it learns, kappa_1; none: the teacher's"}
    )
    prompt_dropout: float = field(
        default=0.1,
        metadata={"help": "share of samples without a prompt when the fake score learns", "at_least": 0, "at_most": 1},
    )

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        guidance = pipeline.default_guidance if self.guidance is None else self.guidance
        if self.student.embeds_guidance:
            why = "where networks are told their guidance, as here: the fake score learns and judges at the teacher's"
            self.refuse_idle(why, "fake_guidance", "fake_training_guidance")
        learns = guidance if self.fake_training_guidance is None else self.fake_training_guidance
        judges = guidance if self.fake_guidance is None else self.fake_guidance
        self.guide_fake(learns, judges, self.prompt_dropout)
