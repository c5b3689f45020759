"""TDD: its targets are those of the schedules, its limits LCM and decoupled guidance; a student learns its schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.analytic import Gaussian, Mixture
from fastgen.errors import UserError
from fastgen.methods.lcm import LCM
from fastgen.methods.tcd import TCD
from fastgen.methods.tdd import TDD
from fastgen.samplers import FewStep, even_times
from tests.method_fakes import PROCESSES, TABLE, FakePipeline, batches, learn_teacher, train, wasserstein

OFF = {"guidance_low": 1.0, "guidance_high": 1.0, "prompt_dropout": 0.0}


def ready(pipeline: FakePipeline, **options: Any) -> TDD:
    method = TDD(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


def authors_choices(r: int) -> set[int]:
    """The table indices, without jitter, among which the authors' code chooses for the later point `r`, an index too."""
    grid = [4 * i - 1 for i in range(250, 0, -1)]
    targets = sorted({grid[i * 250 // n] for n in range(4, 9) for i in range(n)} | {0})[:-1]
    near = max(index for index in targets if index <= r)
    return {index for index in targets if near - 260 <= index <= near}


def test_targets_are_the_authors() -> None:
    """From every point of their grid, the same set of ends, each met, and none but those."""
    method = ready(FakePipeline(TABLE, (3,)), jitter=0.0)
    draws = 400
    start = torch.arange(250).repeat_interleave(draws)
    s = method.end(start).view(250, draws)
    for n in range(250):
        index = 4 * (250 - n) - 1 - 4  # of the next point, -1 where it is clean data
        # Index 0, their last, stands for clean data, which here is time 0; others are at time (index + 1) / 1000.
        wanted = {(i + 1) / 1000 if i else 0.0 for i in authors_choices(max(index, 0))}
        assert {round(float(each), 3) for each in s[n].unique()} == wanted, n


def test_every_schedule_is_covered_with_jitter_below() -> None:
    method = ready(FakePipeline(PROCESSES["flow"], (3,), "flow"), shift=3.0, steps=6, solver_steps=2)
    start = 2 * torch.randint(250, (50000,))
    s, r = method.end(start), method.times[start + 2]
    assert (s <= r + 1e-6).all() and (s >= 0).all()
    for steps in range(4, 9):
        for t in (*method.sampler(steps).times[1:], 0.0):
            near = (s <= t + 1e-6) & (s >= 0.7 * t - 1e-6)
            assert near.float().mean() > 0.05, (steps, t)
    exact = ready(FakePipeline(PROCESSES["flow"], (3,), "flow"), shift=3.0, jitter=0.0)
    points = exact.end(torch.randint(250, (50000,))).unique()
    wanted = {round(t, 5) for n in range(4, 9) for t in exact.sampler(n).times[1:]} | {0.0}
    assert {round(float(t), 5) for t in points} == wanted


def test_one_schedule_of_one_step_is_lcm() -> None:
    pipeline = FakePipeline(TABLE, (3,), "v")
    batch, found = next(batches(pipeline, 256)), []
    same = {"guidance_low": 4.5, "guidance_high": 4.5, "steps": 1}
    for method in (TDD(steps_low=1, steps_high=1, grid=50, prompt_dropout=0.0, **same), LCM(**same)):
        torch.manual_seed(3)
        method.setup(pipeline)  # type: ignore[arg-type]
        torch.manual_seed(4)
        found.append(float(method.loss(batch)["consistency"].detach()))
    assert abs(found[0] / found[1] - 1) < 1e-4


def test_all_targets_are_tcd() -> None:
    """Schedules of one to eight steps meet all points of a grid of eight: the ends are even over those that are not above r.

    That is TCD's law on the grid, s ~ U{0 .. r}; ours, even between them too, comes to it where the share of r is rounded.
    With the same ends the losses are one.
    """
    pipeline, everything = FakePipeline(TABLE, (3,), "v"), {"grid": 8, "steps_low": 1, "jitter": 0.0, **OFF}
    tdd, tcd = ready(pipeline, **everything), TCD(grid=8, **OFF)
    tcd.setup(pipeline)  # type: ignore[arg-type]
    for start in range(8):
        below = 7 - start  # points after r, of which the last is clean data
        position, wanted = torch.full((40000,), start), torch.full((below + 1,), 1 / (below + 1))
        share = tcd.end(position) / tcd.times[start + 1] if below else torch.zeros(40000)
        ends = (8 * tdd.end(position)).round(), (share * (below + 1)).floor().clamp(max=below)
        for each in ends:
            found = torch.bincount(each.long(), minlength=below + 1) / 40000
            torch.testing.assert_close(found, wanted, rtol=0, atol=0.015)  # six standard deviations
    batch, found = next(batches(pipeline, 256)), []
    tdd.student, tcd.target = tcd.student, None
    tcd.end = tdd.end  # type: ignore[method-assign]
    for method in (tdd, tcd):
        torch.manual_seed(4)
        found.append(method.loss(batch)["consistency"].detach())
    assert torch.equal(*found)


def test_guidance_is_decoupled() -> None:
    """A dropped prompt is walked without guidance, a kept one with the fixed scale, and the student sees what was kept."""
    p = PROCESSES["flow"]
    teacher = Mixture([0.5, 0.5], torch.tensor([[-1.0], [1.0]]), [0.4, 0.4], p)
    pipeline = FakePipeline(p, (1,), "flow", teacher=teacher)
    method = ready(pipeline, prompt_dropout=0.3, grid=20)
    batch = next(batches(pipeline, 2000))
    chain = method.chain(batch)
    dropped = chain.condition.inputs["components"].all(1)
    assert 0.25 < dropped.float().mean() < 0.35
    for some, scale in ((dropped, 1.0), (~dropped, 4.5)):
        condition = chain.condition[some]
        yes = teacher(chain.xt[some], chain.t[some], condition)
        no = teacher(chain.xt[some], chain.t[some], condition.null)
        velocity = no.flow + scale * (yes.flow - no.flow)
        landed = chain.xt[some] - (chain.t - chain.r)[some][:, None] * velocity
        torch.testing.assert_close(chain.xr[some], landed, rtol=1e-4, atol=1e-4)
    assert ready(pipeline, guidance=2.0).sampler().guidance == 2.0 and ready(pipeline).sampler().guidance == 1.0


def test_the_adversary_looks_a_quarter_up() -> None:
    method = ready(FakePipeline(TABLE, (3, 4, 4)), adversary=0.1)
    s = torch.linspace(0, 1, 5000)
    t = method.seen_at(s)
    assert (t >= s).all() and (t <= (s + 0.2505).clamp(max=1)).all() and (t - s).max() > 0.24
    batch = next(batches(FakePipeline(TABLE, (3, 4, 4)), 4))
    assert [set(player.loss(batch)) for player in method.players()] == [{"hinge"}, {"consistency", "gan"}]


def test_sampling() -> None:
    method = ready(FakePipeline(TABLE, (3,)))
    assert method.sampler().steps == 4 and method.sampler().gamma == 0.2
    assert method.sampler().scheduler(TABLE, "eps").class_name == "TCDScheduler"
    assert ready(FakePipeline(PROCESSES["flow"], (3,), "flow")).sampler().gamma == 0.0
    with pytest.raises(UserError, match="trained for steps_low = 4 to steps_high = 8 steps, not 3"):
        method.sampler(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "trained for steps_low = 4 to steps_high = 8 steps, not 2"),
        ({"steps_low": 5, "steps_high": 3}, "steps_low = 5 must be .* at most steps_high = 3"),
        ({"steps_high": 9}, "at most steps_high = 9, and that at most 8"),
        ({"grid": 2000}, "grid = 2000 .* finer than the pipeline's own times"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(FakePipeline(TABLE, (3,)), **options)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_exact_flow_map_is_a_fixed_point_up_to_the_solver(process: str) -> None:
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8, -0.3]), 0.5, p)
    pipeline = FakePipeline(p, teacher=teacher, labels=1)
    batch, found = next(batches(pipeline, 4000, ("0",))), []
    for grid in (12, 24):
        method = ready(pipeline, grid=grid, huber_c=10.0, **OFF)
        method.jump = lambda network, x, t, s, condition, scale: teacher.flow_map(x, t, s, condition).float()  # type: ignore[method-assign]
        torch.manual_seed(5)
        found.append(float(method.loss(batch)["consistency"]))
    low, high = (5, 11) if process == "vp" else (12, 21)
    assert low < found[0] / found[1] < high


@pytest.mark.slow
def test_a_guided_mixture_is_learnt_in_four_steps() -> None:
    """Two labels of two modes each, guidance 2: the student's four steps come near the teacher's many."""
    means = torch.tensor([[-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    teacher = Mixture([0.25] * 4, means, [0.25] * 4, PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (2,), "flow", teacher=teacher, labels=4, width=64)
    learn_teacher(pipeline, 1500)
    method = ready(pipeline, grid=40, huber_c=0.1, guidance_low=2.0, guidance_high=2.0, gamma=0.3)
    train(method, batches(pipeline, 128, ("0 1", "2 3")), 1500, 2e-3)
    condition, noise = pipeline.encode_prompts(["0 1", "2 3"] * 1000), torch.randn(2000, 2)
    with torch.no_grad():
        four = method.sampler().sample(method.trained, noise, condition)
    many, plain = (FewStep(even_times(n), guidance=2.0).sample(teacher, noise, condition) for n in (40, 4))
    distance, before = (max(wasserstein(a[:, d], many[:, d]) for d in range(2)) for a in (four, plain))
    # Measured 0.072, without renewing noise, which jitter prepares for, 0.105; from 0.13 before.
    assert distance < 0.1 < before
