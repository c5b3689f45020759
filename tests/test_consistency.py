"""Consistency models: Heun's order, the points of consistency training, its loss by hand, convergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.analytic import Exact, Gaussian, Mixture
from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.methods.consistency import ConsistencyModel
from fastgen.methods.lcm import LCM
from fastgen.methods.pcm import PCM
from fastgen.methods.tcd import TCD
from fastgen.methods.tdd import TDD
from fastgen.methods.tscd import TSCD
from fastgen.process import Kind
from fastgen.samplers import FewStep, even_times
from tests.method_fakes import KINDS, PROCESSES, TABLE, Affine, FakePipeline, batches, learn_teacher, train, wasserstein

ALONE: dict[str, Any] = {"teacher": False, "ema_decay": 0.0}


def ready(pipeline: FakePipeline, **options: Any) -> ConsistencyModel:
    method = ConsistencyModel(**options)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method


@pytest.mark.parametrize("process", ["vp", "flow", "trig", "edm"])
def test_the_order_of_the_solvers(process: str) -> None:
    """Within a fixed interval away from clean data the end errs as the step for one method, as its square for the other."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8, -0.3]), 0.5, p)
    pipeline = FakePipeline(p, teacher=teacher, labels=1)
    condition = teacher.unconditional(500)
    t, r = torch.full((500,), 0.8), torch.full((500,), 0.4)
    x = p.add_noise(teacher.sample(condition).float(), torch.randn(500, 2), t).double()
    exact, errors = teacher.flow_map(x, t, r, condition), {}
    for solver in ("ddim", "heun"):
        for steps in (8, 16):
            method = ready(pipeline, solver=solver, solver_steps=1)
            method.solver_steps = steps
            method.times = torch.linspace(0.8, 0.4, steps + 1, dtype=torch.float64)
            landed = method.solve(x, torch.zeros(500, dtype=torch.long), condition, torch.ones(500))
            errors[solver, steps] = float((landed - exact).abs().mean())
    assert 1.7 < errors["ddim", 8] / errors["ddim", 16] < 2.3
    assert 3.3 < errors["heun", 8] / errors["heun", 16] < 5
    assert errors["heun", 16] < errors["ddim", 16] / 5


def test_heuns_step_by_hand() -> None:
    """One guided step on a table: v at both ends of an arc, the second less what a turn alone makes of the first."""
    teacher = Mixture([0.5, 0.5], torch.tensor([[-1.0], [1.0]]), [0.4, 0.4], TABLE)
    pipeline = FakePipeline(TABLE, (1,), "v", teacher=teacher)
    method = ready(pipeline, grid=8, guidance_low=3.0, guidance_high=3.0)
    batch = next(batches(pipeline, 64))
    chain = method.chain(batch)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        yes, no = (teacher(x, t, c).v for c in (batch.condition, batch.condition.null))
        return no + 3 * (yes - no)

    a, b = (TABLE.angle(t)[:, None].float() for t in (chain.t, chain.r))
    first = guided(chain.xt, chain.t)
    euler = (b - a).cos() * chain.xt + (b - a).sin() * first
    turned = (b - a).cos() * first - (b - a).sin() * chain.xt
    heun = euler + (b - a) / 2 * (guided(euler, chain.r) - turned)
    expected = torch.where(chain.r[:, None] > 0, heun, euler)
    torch.testing.assert_close(chain.xr, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", ["vp", "flow", "trig"])
def test_the_exact_function_is_a_fixed_point(process: str) -> None:
    """Up to the solver, whose second order leaves far less than the first; the last step, Euler's in both, is left out."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8, -0.3]), 0.5, p)
    pipeline = FakePipeline(p, teacher=teacher, labels=1)
    batch, found = next(batches(pipeline, 4000, ("0",))), {}
    for solver in ("heun", "ddim"):
        method = ready(pipeline, grid=20, huber_c=10.0, solver=solver, ema_decay=0.0)
        method.student = Exact(teacher)  # type: ignore[assignment]
        torch.manual_seed(5)
        chain = method.chain(batch)
        estimate, target = method.meet(chain)
        found[solver] = float((estimate - target)[chain.r > 0].square().mean())
    assert found["heun"] < found["ddim"] / 10


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_without_an_average_is_lcm(kind: Kind) -> None:
    pipeline = FakePipeline(TABLE, (3,), kind)
    batch, found = next(batches(pipeline, 256)), []
    same: dict[str, Any] = {"guidance_low": 4.0, "guidance_high": 4.0, "grid": 20, "ema_decay": 0.0}
    for method in (ConsistencyModel(solver="ddim", **same), LCM(**same)):
        torch.manual_seed(3)
        method.setup(pipeline)  # type: ignore[arg-type]
        torch.manual_seed(4)
        found.append(float(method.loss(batch)["consistency"].detach()))
    assert abs(found[0] / found[1] - 1) < 1e-4


@pytest.mark.parametrize("process", ["vp", "flow", "trig", "edm"])
def test_two_points_share_data_and_noise(process: str) -> None:
    p = PROCESSES[process]
    pipeline = FakePipeline(p, (3,), "v")
    method = ready(pipeline, **ALONE)
    batch = next(batches(pipeline, 5000))
    for stage in (0, 3, 7):
        method.advance(stage * 100, 800)
        assert method.stage == stage
        chain = method.chain(batch)
        rho_t, rho_r = p.ratio(chain.t.double()), p.ratio(chain.r.double())
        far = (rho_t < 10) & (rho_t > 0.05)
        wanted = rho_t * (1 - (1 + 8 * torch.sigmoid(-rho_t)) / 2 ** (stage + 1)).clamp_min(0)
        wanted = wanted.clamp_min(float(p.ratio(torch.zeros((), dtype=torch.float64))))  # 0.002 where time 0 is not quite clean
        torch.testing.assert_close(rho_r[far], wanted[far], rtol=2e-3, atol=2e-3)
        assert (chain.r <= chain.t).all() and not chain.s.any()
        if process != "vp":  # whose table ends at a ratio of 15
            assert abs(float(rho_t.log().mean()) + 0.4) < (0.15 if process != "edm" else 0.5)
        alpha, sigma = p.coefficients(chain.t, chain.xt)
        alpha_r, sigma_r = p.coefficients(chain.r, chain.xr)
        eps = (chain.xt - alpha * batch.latents) / sigma
        clear = (sigma[:, 0] > 0.2) & (chain.t < 0.999)
        torch.testing.assert_close(chain.xr[clear], (alpha_r * batch.latents + sigma_r * eps)[clear], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [LCM, ConsistencyModel, PCM, TCD, TDD, TSCD])
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_lowest_point_is_regression_on_the_solvers_clean_end(process: str, kind: Any) -> None:
    """No jump is left from there: the target is the guided teacher's own estimate, exactly, whatever the student says.

    Were the grid a single point this would be all of the loss.
    """
    pipeline = FakePipeline(PROCESSES[process], (3,), "x0")  # of which clean data is no fixed point by itself
    method: Any = kind(grid=16, ema_decay=0.0, guidance_low=2.0, guidance_high=2.0)
    method.setup(pipeline)
    chain = method.chain(next(batches(pipeline, 256)))
    lowest = chain.t < 1.5 / 16
    assert lowest.sum() > 5 and torch.equal(lowest, chain.r == 0)
    with torch.no_grad():
        clean = Guided(pipeline.frozen(), chain.scale)(chain.xt, chain.t, chain.condition).x0
        method.student.network.leave.bias.fill_(100.0)
        estimate, target = method.meet(chain)
    torch.testing.assert_close(chain.xr[lowest], clean[lowest], rtol=1e-5, atol=1e-6)
    assert torch.equal(target[lowest], chain.xr[lowest])
    assert (target - chain.xr)[~lowest].abs().max() > 10 and (estimate - chain.xt)[lowest].abs().min() > 1


def test_consistency_training_by_hand() -> None:
    """A flow network in the first stage, where near points are held to the data themselves."""
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    method = ready(pipeline, huber_c=0.1, **ALONE)
    batch = next(batches(pipeline, 64))
    torch.manual_seed(7)
    loss = float(method.loss(batch)["consistency"].detach())
    torch.manual_seed(7)
    rho = (-0.4 + 2 * torch.randn(64)).exp()
    nearer = rho * (1 - (1 + 8 / (1 + rho.exp())) / 2).clamp_min(0)
    t, r, eps = (rho / (1 + rho))[:, None], (nearer / (1 + nearer))[:, None], torch.randn(64, 3)
    mask = batch.condition.inputs["components"]

    def clean(time: Tensor) -> Tensor:
        x = (1 - time) * batch.latents + time * eps
        return x - time * method.student.network(x, time[:, 0], mask, None)

    target = torch.where(r > 0, clean(r), batch.latents)
    assert 0.2 < float((r == 0).float().mean()) < 0.9
    distance = ((clean(t) - target) ** 2 + 0.1**2).sqrt() - 0.1
    assert abs(loss / float((distance / (rho - nearer)[:, None]).mean().detach()) - 1) < 1e-3


def test_the_target_gets_no_gradient_and_both_see_one_dropout_mask() -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3,), "flow")
    method = ready(pipeline, **ALONE)
    masks: list[Tensor] = []
    inner = method.jump

    def jump(*args: Any) -> Tensor:
        masks.append(torch.rand(5))
        return inner(*args)

    method.jump = jump  # type: ignore[method-assign]
    estimate, target = method.meet(method.chain(next(batches(pipeline, 4))))
    assert torch.equal(*masks) and estimate.requires_grad and not target.requires_grad
    assert not torch.equal(torch.rand(5), masks[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": False, "guidance_high": 3.0}, "guidance_high = 3 guides a teacher, and teacher = false leaves none"),
        ({"teacher": False, "embed_guidance": True}, "embed_guidance = true needs a guided teacher, and teacher = false"),
        ({"guidance": 3.0}, "guidance = 3 is outside what the student is trained for"),
        ({"ema_decay": 1.5}, "ema_decay must be .* not 1.5"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(FakePipeline(TABLE, (3,)), **options)


@pytest.mark.parametrize("kind_of", [LCM, ConsistencyModel])
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_a_gaussian_student_learns_the_solvers_end(process: str, kind_of: type[LCM | ConsistencyModel]) -> None:
    """An affine student can be exact, so that its one step is the teacher's eight solver steps."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8]), 0.5, p)
    pipeline = FakePipeline(p, (1,), "v", teacher=teacher, labels=1, networks={"student": lambda: Affine(8)})
    method = kind_of(grid=8, huber_c=1.0, ema_decay=0.0, guidance_low=1.0, guidance_high=1.0)
    method.setup(pipeline)  # type: ignore[arg-type]
    train(method, batches(pipeline, 64, ("0",)), 500, 0.1)
    noise, condition = torch.linspace(-2, 2, 9)[:, None], teacher.unconditional(9)
    with torch.no_grad():
        one = method.sampler(1).sample(method.trained, noise, condition)
    method.solver_steps = 8
    walked = method.solve(noise, torch.zeros(9, dtype=torch.long), condition, torch.ones(9))
    assert (one - walked).abs().max() < 0.005  # measured below 5e-5 for LCM


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lcm", "heun", "alone"])
def test_a_mixture_is_learnt_in_one_step(how: str) -> None:
    """Three modes in one dimension, distilled with DDIM as LCM does, with Heun's method, or learnt from data alone."""
    mixture = Mixture([0.4, 0.35, 0.25], torch.tensor([[-1.2], [0.2], [1.3]]), [0.2, 0.15, 0.25], PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (1,), "flow", teacher=mixture, labels=3, width=64)
    learn_teacher(pipeline, 1000)
    distilled: dict[str, Any] = {"grid": 16, "huber_c": 1.0}
    methods: dict[str, Any] = {
        "lcm": LCM(guidance_low=1.0, guidance_high=1.0, **distilled),
        "heun": ConsistencyModel(ema_decay=0.5, **distilled),
        "alone": ConsistencyModel(huber_c=0.03, **ALONE),
    }
    method = methods[how]
    method.setup(pipeline)
    train(method, batches(pipeline, 128, ("0 1 2",)), 2500, 3e-3)
    condition, noise = pipeline.encode_prompts([""] * 4000), torch.randn(4000, 1)
    with torch.no_grad():
        one, two = (method.sampler(n).sample(method.trained, noise, condition) for n in (1, 2))
    ends = FewStep(even_times(64)).sample(mixture, noise, condition)
    blur = wasserstein(FewStep((1.0,)).sample(mixture, noise, condition), ends)
    found = wasserstein(one, ends), wasserstein(two, ends)
    # Measured in one step and in two: 0.096 and 0.102; without a teacher 0.111 and 0.103; LCM 0.105 in one; from 0.88.
    assert max(found) < 0.16 and blur > 0.4
