"""What losses record while they are computed: right, by noise level, and without a trace in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.analytic import Gaussian
from fastgen.losses import (
    distribution_matching,
    hinge_critic,
    least_squares_critic,
    listen,
    nonsaturating_critic,
    pull,
)
from fastgen.losses.readings import LEVELS, Readings, Summary, heard, record, record_answers
from fastgen.process import Flow
from fastgen.tangents import answer_and_derivative
from fastgen.training.health import from_losses

SHAPE = (3, 2, 2)
PROCESS = Flow()


def gaussian(mean: float = 0.0, std: float = 1.0) -> Gaussian:
    return Gaussian(torch.full(SHAPE, mean), std, PROCESS, "flow")


def scores(fake: Gaussian, real: Gaussian, x: Tensor) -> dict[str, Summary]:
    readings = Readings()
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(len(x), generator=generator) * 0.9 + 0.05
    with listen(readings):
        distribution_matching(x, t, fake.unconditional(len(x)), fake, real)
    return readings.take()


def test_sums_are_sorted_by_noise_level_and_what_is_not_finite_is_left_out() -> None:
    readings = Readings()
    values = torch.tensor([1.0, 3.0, math.nan, 5.0, math.inf, -2.0])
    readings.add("a", values, torch.tensor([0.0, 0.2, 0.2, 0.6, 0.9, 1.0]))
    readings.add("a", torch.tensor([2.0]), torch.tensor([0.1]))
    readings.add("b", torch.tensor([4.0, 6.0]))
    found = readings.take()
    a, b = found["a"], found["b"]
    assert a.counts == (3, 0, 1, 1) and a.sums == (6, 0, 5, -2) and a.squares == (14, 0, 25, 4)
    assert a.at(0) == 2 and a.at(1) is None and a.mean == 9 / 5 and a.error == math.sqrt(43)
    assert b.counts == (2,) and b.mean == 5 and Summary((0.0,), (0.0,), (0.0,)).mean is None
    assert readings.take() == {}


def test_what_processes_have_recorded_is_added_up() -> None:
    one, two = Readings(), Readings()
    one.add("a", torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.9]))
    two.add("a", torch.tensor([5.0]), torch.tensor([0.1]))
    other = torch.cat(list(two.sums.values()))
    assert one.take(lambda mine: mine + other)["a"].sums == (6.0, 0.0, 0.0, 2.0)


def test_a_checkpoint_carries_what_was_recorded() -> None:
    one, two = Readings(), Readings()
    one.add("a", torch.rand(7), torch.rand(7))
    two.load_state(one.state())
    for readings in (one, two):
        readings.add("a", torch.ones(3), torch.ones(3) / 2)
    assert one.take() == two.take()


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.0])
def test_a_fake_score_that_knows_the_students_samples_has_no_lag(ahead: float) -> None:
    """The student is at 1 - ahead, the teacher at 0; the fake score believes that the student is still at 1."""
    torch.manual_seed(0)
    x = 1 - ahead + torch.randn(4000, *SHAPE)
    found = scores(gaussian(1.0), gaussian(0.0), x)
    lag = found["score_lag"].sum / found["score_gap"].sum
    assert lag == pytest.approx(ahead, abs=4 * found["score_lag"].error / found["score_gap"].sum + 1e-3)
    assert found["score_lag"].error / found["score_gap"].sum < 0.1
    error = [found[name].mean or 0 for name in ("fake_error", "teacher_error")]
    assert (error[0] < error[1]) == (ahead < 0.5) or ahead == 0.5


def test_errors_by_noise_level_are_those_of_a_perfect_denoiser() -> None:
    torch.manual_seed(0)
    found = scores(gaussian(), gaussian(0.0, 0.5), torch.randn(8000, *SHAPE))
    for level in range(LEVELS):
        t = torch.linspace(max(level / LEVELS, 0.05), min((level + 1) / LEVELS, 0.95), 1001)
        alpha, sigma = 1 - t, t
        expected = (sigma**2 / (alpha**2 + sigma**2)).mean()  # the variance of x0 given x_t
        assert found["fake_error"].at(level) == pytest.approx(float(expected), rel=0.05)
        assert (found["teacher_error"].at(level) or 0) > (found["fake_error"].at(level) or 1)


def test_the_pull_on_samples_is_measured_against_their_size() -> None:
    readings, x = Readings(), torch.full((2, *SHAPE), 4.0)
    gradient = torch.stack([torch.full(SHAPE, 1.0), torch.full(SHAPE, math.nan)])
    with listen(readings):
        pull(x, gradient)
    found = readings.take()
    assert found["pull"].mean == 0.5 and found["pulled"].mean == 4


@pytest.mark.parametrize("way", ["exact", "central"])
@pytest.mark.parametrize("few", [False, True])
def test_a_derivative_is_measured_against_the_answer(way: Any, few: bool) -> None:
    """Of sin(80 t), which a step of 1e-3 still sees: 80 cos(80 t), in the samples that have one."""
    readings, t = Readings(), torch.linspace(0.2, 0.8, 50)
    where = torch.arange(50) < (10 if few else 50)
    with listen(readings):
        answer_and_derivative(
            lambda index: lambda x, t: x + torch.sin(80 * t)[:, None],
            *(gaussian(), torch.zeros(50, 3), t, torch.zeros(50, 3)),
            way=way,
            where=where,
        )
    expected = 80 * torch.cos(80 * t[where]).abs().sum() / torch.sin(80 * t[where]).abs().sum()
    assert from_losses(readings.take())["derivative"].value == pytest.approx(float(expected), rel=2e-3)


@pytest.mark.parametrize(
    ("critic", "right"),
    [(hinge_critic, (0.75, 1.0)), (nonsaturating_critic, (0.75, 1.0)), (least_squares_critic, (0.5, 0.5))],
)
def test_critics_tell_how_often_they_are_right(critic: Any, right: tuple[float, float]) -> None:
    real, fake = torch.tensor([[0.6, 2.0], [-1.0, 0.4]]), torch.tensor([[-0.3, -2.0], [-0.1, -0.2]])
    if critic is least_squares_critic:
        fake = torch.tensor([[0.3, 0.7], [0.6, 0.2]])
    readings = Readings()
    silent = critic(real, fake)
    with listen(readings):
        assert torch.equal(critic(real, fake, (torch.tensor([0.1, 0.9]), torch.tensor([0.6, 0.6]))), silent)
    found = readings.take()
    assert (found["discriminator_real"].mean, found["discriminator_fake"].mean) == right
    assert found["discriminator_real"].counts == (1, 0, 0, 1) and found["discriminator_fake"].counts == (0, 0, 2, 0)


def test_nobody_who_listens_changes_anything() -> None:
    def run(readings: Readings | None) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        x = torch.randn(6, *SHAPE, requires_grad=True)
        fake, real = gaussian(0.3), gaussian()
        with listen(readings):
            loss = distribution_matching(x, torch.rand(6), fake.unconditional(6), fake, real)
            loss = loss + hinge_critic(x.flatten(1), 2 * x.flatten(1), torch.rand(6))
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad, torch.get_rng_state()

    readings = Readings()
    assert all(torch.equal(a, b) for a, b in zip(run(None), run(readings), strict=True))
    assert {"pull", "fake_error", "teacher_error", "score_lag", "discriminator_real"} <= set(readings.sums)
    assert not any(total.requires_grad for total in readings.sums.values())


def test_listening_ends_with_its_block_and_can_be_stopped_within() -> None:
    readings = Readings()
    assert not heard()
    record("a", torch.ones(1))
    with listen(readings):
        assert heard()
        with listen(None):
            record("a", torch.ones(1))
            record_answers(torch.ones(1), torch.ones(1))
        with pytest.raises(ZeroDivisionError), listen(Readings()):
            raise ZeroDivisionError
        record("a", torch.ones(1))
    assert not heard() and readings.take()["a"].count == 1
