"""Flow maps learnt from data alone, or from differences in place of derivatives: one call lands where the ODE leads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.analytic import Gaussian
from fastgen.methods.mean_flow import MeanFlow
from fastgen.methods.scm import SCM
from fastgen.methods.shortcut import Shortcut
from fastgen.samplers import FewStep
from tests.method_fakes import PROCESSES, FakePipeline, batches, train

DIFFERENCES = {"warmup": 200, "tangent": "central"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "updates", "bound"),
    # Measured, on average over the noise: 0.130, 0.042, 0.060, 0.060 and 0.037; one call of the teacher is 0.512 away.
    [
        (MeanFlow, {"training": True, "power": 0.0, "time_std": 1.5, "warmup": 200}, 1500, 0.2),
        (Shortcut, {"training": True, "finest": 16, "bootstrap": 0.5}, 2000, 0.09),
        (SCM, {"training": True, "warmup": 200}, 1000, 0.12),
        (SCM, {"training": True, **DIFFERENCES}, 1000, 0.12),
        (SCM, {"guidance": 1.0, **DIFFERENCES}, 1000, 0.08),
    ],
    ids=["mean flow", "shortcut", "scm", "scm, by differences", "scm of a teacher, by differences"],
)
def test_a_gaussian_is_learnt_in_one_call(kind: Any, options: dict[str, Any], updates: int, bound: float) -> None:
    """Noise by noise, from a network at random: m + s z (methods in one dimension); where it trains alone nobody is asked."""
    torch.manual_seed(0)
    teacher = Gaussian(torch.tensor([0.8]), 0.5, PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (1,), "flow", teacher=teacher, labels=1, width=32)
    method = kind(**options)
    method.setup(pipeline)
    if method.training:
        method.teacher = None
    train(method, batches(pipeline, 128, ("0",)), updates, 4e-3)
    noise = torch.linspace(-2, 2, 41)[:, None]
    goal, condition = 0.8 + 0.5 * noise, teacher.unconditional(41)
    with torch.no_grad():
        one = method.sampler(1).sample(method.trained, noise, condition)
    blur = FewStep((1.0,)).sample(teacher, noise, condition)
    assert (one - goal).abs().mean() < bound < 0.5 < (blur - goal).abs().mean()
