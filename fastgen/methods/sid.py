"""Score identity distillation: one step, from prompts alone, along the Fisher divergence of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgen.families.score_identity import ScoreIdentity


@dataclass
class SiD(ScoreIdentity):
    """Score identity distillation (Zhou et al. 2024).

    A fake score learns to denoise what the student makes; the student descends a Fisher divergence between its diffused
    samples and the teacher's, in which the one score that is not known has been traded, by three identities, for samples.
    The gradient goes through teacher and fake score, whose weights are held. `alpha` takes off a share of the squared
    difference, which the lag of the fake score makes too large; 1.2 and 1 are the paper's best.

    Differences from the authors' code: losses are means, theirs sums over elements (and 100 times for the student);
    the fake score's loss is in the network's own kind of prediction over the times of the student's loss, theirs in EDM's
    weights and law; the first input is noise of unit variance, as samplers of diffusers start; an answer that is not finite
    gives no gradient, theirs leaves the sample out. Guidance, which the paper has not, is the teacher's alone.
    """

    steps: int = field(default=1, metadata={"help": "network calls a sample, evenly spaced in time"})
    alpha: float = field(default=1.2, metadata={"help": "share of the squared score difference that is taken off the loss"})
