"""The terms that methods share. Everything is computed in float32 or better, whatever precision the networks run in."""

from __future__ import annotations

from fastgen.losses.adversarial import (
    approximate_r1,
    hinge_critic,
    hinge_student,
    least_squares_critic,
    least_squares_student,
    nonsaturating_critic,
    nonsaturating_student,
)
from fastgen.losses.contrast import contrast, distribution_matching, pull
from fastgen.losses.diffusion import denoising, kernel, landing, level_denoising, level_target, noised
from fastgen.losses.distances import distance, pseudo_huber, snr, squared, wide
from fastgen.losses.draws import drawn_scales, logit_normal_times, shared_choice, shared_uniform, uniform_times
from fastgen.losses.readings import listen, record_derivative, record_scores

__all__ = [
    "approximate_r1",
    "contrast",
    "denoising",
    "distance",
    "distribution_matching",
    "drawn_scales",
    "hinge_critic",
    "hinge_student",
    "kernel",
    "landing",
    "least_squares_critic",
    "least_squares_student",
    "level_denoising",
    "level_target",
    "listen",
    "logit_normal_times",
    "noised",
    "nonsaturating_critic",
    "nonsaturating_student",
    "pseudo_huber",
    "pull",
    "record_derivative",
    "record_scores",
    "shared_choice",
    "shared_uniform",
    "snr",
    "squared",
    "uniform_times",
    "wide",
]
