"""The gauges of a run: what each reading measures, when it is amber or red, what that usually means, and what to try.

`docs/health.md` is written from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["GAUGES", "Advice", "Colour", "Gauge", "gauge"]

Colour = Literal["green", "amber", "red"]
NONE = float("inf")


@dataclass(frozen=True)
class Advice:
    """What a reading beyond its bounds usually means, and what to try: a sentence each."""

    means: str
    remedy: str


@dataclass(frozen=True)
class Gauge:
    """A reading with its bounds: beyond `amber` or `red`, each (from below, from above), it has that colour."""

    name: str
    title: str
    about: str
    amber: tuple[float, float]
    red: tuple[float, float]
    low: Advice | None = None
    high: Advice | None = None

    def judge(self, value: float, error: float = 0.0) -> tuple[Colour, Advice | None]:
        """The colour of a value, and the advice that goes with it; bounds must be passed by twice its standard `error`."""
        if value != value:
            return "red", self.high or self.low
        colours: tuple[tuple[Colour, tuple[float, float]], ...] = (("red", self.red), ("amber", self.amber))
        for colour, (below, above) in colours:
            if self.low is not None and value + 2 * error < below:
                return colour, self.low
            if self.high is not None and value - 2 * error > above:
                return colour, self.high
        return "green", None


GAUGES = (
    Gauge(
        "pull",
        "Pull on the samples",
        "root mean square of the distribution matching gradient over that of the student's samples",
        amber=(0.003, 2.0),
        red=(0.0003, 6.0),
        low=Advice(
            "fake score and teacher say the same, so the student no longer learns: either it is done, or the fake score "
            "does not move",
            "compare the pictures with the teacher's; if they differ, check that the fake score has a learning rate",
        ),
        high=Advice(
            "fake score and teacher disagree about more than there is in the samples: one of them is asked at noise "
            "levels, or with a guidance, that it does not know",
            "lower method.guidance, let the fake score learn faster (method.fake_lr_scale, method.student_every), "
            "check method.noise_shift",
        ),
    ),
    Gauge(
        "fake_score_error",
        "Error of the fake score",
        "mean squared error of the fake score over the teacher's, on the same samples of the student, at the worst noise level",
        amber=(0, 1.1),
        red=(0, 1.5),
        high=Advice(
            "the fake score knows the student's samples less well than the teacher does: it learns too slowly, or is broken",
            "raise method.student_every or method.fake_lr_scale; if its loss jumps, lower its learning rate instead",
        ),
    ),
    Gauge(
        "fake_score_lag",
        "Lag of the fake score",
        "how far the student's samples are from where the fake score believes them, as a share of the way to the teacher's "
        "estimate; 0 for a perfect fake score",
        amber=(-0.75, 0.75),
        red=(-1.25, 1.25),
        low=Advice(
            "the student's samples are farther from the teacher than the fake score believes: it hardly learns, or swings",
            "raise method.student_every or method.fake_lr_scale; if its loss jumps, lower its learning rate instead",
        ),
        high=Advice(
            "the student is where the fake score no longer expects it, and is pushed past its aim: the fake score is too slow",
            "raise method.student_every or method.fake_lr_scale, or lower the student's learning rate",
        ),
    ),
    Gauge(
        "noise_levels",
        "Noise levels compared",
        "share of the least visited quarter of the time from 0 to 1 among the times at which the scores are compared",
        amber=(0.03, NONE),
        red=(0.01, NONE),
        low=Advice(
            "the scores are hardly ever compared at some noise levels, so layout (high ones) or detail (low ones) is not "
            "learnt: the shift is wrong",
            "set method.noise_shift to the teacher's own shift (1 where it has none), and method.low and method.high to 0.02 "
            "and 0.98",
        ),
    ),
    Gauge(
        "discriminator",
        "Accuracy of the discriminator",
        "how often it is right, of real samples and the student's alike; 0.5 is guessing",
        amber=(0.4, 0.97),
        red=(0.25, 0.998),
        low=Advice(
            "the discriminator is wrong more often than right: the student moves faster than it learns",
            "raise method.critic_lr_scale or method.critic_weight, or lower the student's learning rate",
        ),
        high=Advice(
            "the discriminator is never fooled, so its gradient no longer tells the student where to go",
            "lower method.critic_lr_scale or method.critic_weight, or set method.r1_weight where the method has it",
        ),
    ),
    Gauge(
        "derivative",
        "Size of the derivative",
        "root mean square of the derivative of the student's answer along a trajectory, over that of the answer",
        amber=(0, 20.0),
        red=(0, 60.0),
        high=Advice(
            "the answer changes within a step of time by many times its own size: the student learns its own fast waves in "
            "time, which grow with every update",
            'set method.tangent = "central" and method.tangent_step = 0.02, or lower train.lr',
        ),
    ),
    Gauge(
        "gradient_norm",
        "Gradient norm",
        "norm of a player's gradient before clipping, over what it was in the first lines of the run",
        amber=(0, 8.0),
        red=(0, 50.0),
        high=Advice(
            "this player's loss has become steep: its learning rate is too high, or the other player has run away",
            "lower train.lr, or this player's in train.players, and go on from an earlier checkpoint",
        ),
    ),
    Gauge(
        "update_size",
        "Size of an update",
        "how far one update moves a player's weights, as a share of their own size",
        amber=(0, 0.02),
        red=(0, 0.08),
        high=Advice(
            "every update replaces a good part of the weights: the learning rate is too high to keep what the teacher knows",
            "lower train.lr, or this player's in train.players, by three to ten times; set train.warmup",
        ),
    ),
    Gauge(
        "skipped",
        "Skipped updates",
        "share of a player's updates since the last line whose gradient was not finite, and that were not made",
        amber=(0, 0.0),
        red=(0, 0.2),
        high=Advice(
            "losses or gradients overflow, or the data holds what is not a number",
            'take train.precision = "bf16" in place of fp16, or lower the learning rate; look for broken pictures in the data',
        ),
    ),
    Gauge(
        "saturation",
        "Saturation",
        "mean saturation of the student's pictures over that of the teacher's, for the same prompts and noise",
        amber=(0.8, 1.25),
        red=(0.5, 1.7),
        low=Advice(
            "the student's pictures are greyer than the teacher's: they are averages of several",
            "train on, or compare at higher noise levels (method.noise_shift); add a discriminator where the method has one",
        ),
        high=Advice(
            "the student's pictures are more colourful than the teacher's: it is pushed past its aim, or guided too much",
            "lower method.guidance, or let the fake score follow faster (method.student_every)",
        ),
    ),
    Gauge(
        "contrast",
        "Contrast",
        "mean standard deviation of brightness within the student's pictures over that in the teacher's",
        amber=(0.8, 1.25),
        red=(0.5, 1.7),
        low=Advice(
            "the student's pictures are flat: they are averages of several, or training has only begun",
            "train on; if it stays, compare at higher noise levels (method.noise_shift)",
        ),
        high=Advice(
            "the student's pictures are harsher than the teacher's: it is pushed past its aim, or guided too much",
            "lower method.guidance, or let the fake score follow faster (method.student_every)",
        ),
    ),
    Gauge(
        "diversity",
        "Seed diversity",
        "how much pictures of one prompt differ from seed to seed, over how much the teacher's do",
        amber=(0.7, 1.5),
        red=(0.4, 2.5),
        low=Advice(
            "the student gives much the same picture for every seed: it has lost modes",
            "lower method.guidance or the learning rate, train shorter, or take a method with a discriminator",
        ),
        high=Advice(
            "the student's pictures of a prompt differ more than the teacher's: they do not follow it yet, or hold noise",
            "train on; if it stays, lower the learning rate",
        ),
    ),
    Gauge(
        "sampling_gap",
        "Gap between training and sampling",
        "how far the student's estimates in sampling are from those in training at the same times, in standard deviations, "
        "at the worst of its calls",
        amber=(0, 0.35),
        red=(0, 0.8),
        high=Advice(
            "the student is trained on inputs that it does not meet when it samples: its own earlier calls are not simulated",
            "train on the outputs of its own sampler (backward simulation), and with the sampler that it is used with",
        ),
    ),
    Gauge(
        "quality",
        "Quality",
        "distance of the student's samples from the teacher's, over the least that this run has reached",
        amber=(0, 2.0),
        red=(0, 4.0),
        high=Advice(
            "the student has been better: it has broken down, or has been trained for too long",
            "export the best checkpoint (fastgen export RUN --checkpoint best), and lower train.lr before going on",
        ),
    ),
)  # fmt: skip


def gauge(name: str) -> Gauge:
    """The gauge of a reading, whose name may end in a player's or a level's: "gradient_norm/student"."""
    first = name.split("/")[0]
    return next(each for each in GAUGES if each.name == first)
