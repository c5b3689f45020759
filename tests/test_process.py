"""The algebra of noise processes: identities under random times, and parity with diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastgen.process import EDM, VP, Flow, Kind, Prediction, Process, Trig, dynamic_shift, shift_time, unshift_time

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True}
PROCESSES: dict[str, Process] = {
    "vp": VP(DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod),
    "zero_snr": VP(DDPMScheduler(**ZERO_SNR).alphas_cumprod),
    "flow": Flow(),
    "edm": EDM(),
    "trig": Trig(),
}
KINDS: tuple[Kind, ...] = ("x0", "eps", "v", "flow")

processes = st.sampled_from(sorted(PROCESSES))
kinds = st.sampled_from(KINDS)
times = st.floats(0.002, 0.998, allow_nan=False)


def pair(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x0, eps = torch.randn(2, batch, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x0, eps


def filled(t: float, batch: int = 3) -> Tensor:
    return torch.full((batch,), t, dtype=torch.float64)


@given(processes, kinds, times)
def test_every_kind_on_every_process_recovers_the_sample_and_the_noise(name: str, kind: Kind, t: float) -> None:
    process, (x0, eps), at = PROCESSES[name], pair(), filled(t)
    xt = process.add_noise(x0, eps, at)
    prediction = Prediction(process.target(kind, x0, eps, at), kind, xt, at, process)
    torch.testing.assert_close(prediction.x0, x0, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(prediction.eps, eps, atol=1e-7, rtol=1e-7)
    alpha, sigma = process.coefficients(at, x0)
    torch.testing.assert_close(prediction.v, alpha * eps - sigma * x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(prediction.flow, eps - x0, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(prediction.score, (alpha * x0 - xt) / sigma**2, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"), [("zero_snr", "v"), ("zero_snr", "x0"), ("flow", "flow"), ("flow", "x0"), ("trig", "v")]
)
def test_pure_noise_is_no_special_time(name: str, kind: Kind) -> None:
    process, (x0, eps), at = PROCESSES[name], pair(), filled(1.0)
    xt = process.add_noise(x0, eps, at)
    torch.testing.assert_close(xt, eps, atol=1e-12, rtol=0)
    prediction = Prediction(process.target(kind, x0, eps, at), kind, xt, at, process)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)


@given(processes, times)
def test_time_at_inverts_the_ratio(name: str, t: float) -> None:
    process, at = PROCESSES[name], filled(t)
    torch.testing.assert_close(process.time_at(process.ratio(at)), at, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_ratios_beyond_the_process_give_its_ends(name: str) -> None:
    process = PROCESSES[name]
    ends = process.time_at(torch.tensor([0.0, math.inf], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


@given(processes, times)
def test_network_timesteps_invert(name: str, t: float) -> None:
    process, at = PROCESSES[name], filled(t)
    torch.testing.assert_close(process.time(process.timestep(at)), at, atol=1e-6, rtol=0)


@given(processes, st.floats(0, 1))
def test_snapping_gives_a_trained_time_and_is_idempotent(name: str, t: float) -> None:
    process, at = PROCESSES[name], filled(t)
    snapped = process.snap(at)
    torch.testing.assert_close(process.snap(snapped), snapped, atol=0, rtol=0)
    if isinstance(process, VP):
        timestep = process.timestep(snapped)
        torch.testing.assert_close(timestep, timestep.round(), atol=0, rtol=0)
        assert (snapped - at).abs().max() <= 1 / process.steps


@given(processes, times, times)
def test_the_kernel_has_the_variance_and_scale_of_the_process(name: str, one: float, two: float) -> None:
    process = PROCESSES[name]
    s, t = filled(min(one, two)), filled(max(one, two))
    ones, zeros = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    alpha_s, sigma_s = process.coefficients(s, ones)
    alpha_t, sigma_t = process.coefficients(t, ones)
    scale, fresh = process.diffuse(ones, zeros, s, t), process.diffuse(zeros, ones, s, t)
    torch.testing.assert_close(scale * alpha_s, alpha_t)
    torch.testing.assert_close((scale * sigma_s) ** 2 + fresh**2, sigma_t**2, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["vp", "zero_snr", "flow", "trig"])
def test_the_kernel_from_clean_data_is_add_noise(name: str) -> None:
    process, (x0, eps) = PROCESSES[name], pair()
    for t in (0.25, 0.5, 1.0):
        torch.testing.assert_close(process.diffuse(x0, eps, filled(0.0), filled(t)), process.add_noise(x0, eps, filled(t)))


def test_the_kernel_between_close_levels_is_accurate_in_single_precision() -> None:
    process, s, t = PROCESSES["vp"], torch.tensor([0.998]), torch.tensor([0.999])
    single = process.diffuse(torch.zeros(1, 1), torch.ones(1, 1), s, t)
    double = process.diffuse(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), s, t)
    torch.testing.assert_close(single.double(), double, atol=0, rtol=1e-6)


@given(processes, kinds, times, times)
def test_moving_a_perfect_prediction_lands_on_the_path(name: str, kind: Kind, t: float, s: float) -> None:
    process, (x0, eps) = PROCESSES[name], pair()
    xt = process.add_noise(x0, eps, filled(t))
    prediction = Prediction(process.target(kind, x0, eps, filled(t)), kind, xt, filled(t), process)
    torch.testing.assert_close(prediction.at(filled(s)), process.add_noise(x0, eps, filled(s)), atol=1e-6, rtol=1e-7)
    torch.testing.assert_close(prediction.at(filled(t)), xt, atol=1e-6, rtol=1e-7)


@given(times, st.floats(0.1, 20))
def test_shifts_invert_and_keep_the_ends(t: float, shift: float) -> None:
    at = filled(t)
    torch.testing.assert_close(unshift_time(shift_time(at, shift), shift), at)
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(shift_time(ends, shift), ends)
    assert bool((shift_time(at, shift) >= at).all()) == (shift >= 1) or math.isclose(shift, 1)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_dynamic_shift_is_the_exponential_of_diffusers_mu(tokens: int) -> None:
    mu = calculate_shift(tokens)
    assert dynamic_shift(tokens) == pytest.approx(math.exp(mu), rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    ours = shift_time(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), dynamic_shift(tokens))
    torch.testing.assert_close(scheduler.sigmas, ours, atol=1e-6, rtol=0)


def test_static_shift_equals_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas[:-1], shift_time(torch.tensor([1.0, 0.75, 0.5, 0.25]), 3.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_half_precision_outputs_are_solved_in_single_precision(name: str, kind: Kind) -> None:
    process, (x0, eps) = PROCESSES[name], pair()
    at = torch.full((3,), 0.6)
    xt = process.add_noise(x0.float(), eps.float(), at).bfloat16()
    output = process.target(kind, x0.float(), eps.float(), at).bfloat16()
    half, single = Prediction(output, kind, xt, at, process), Prediction(output.float(), kind, xt.float(), at, process)
    for name in ("x0", "eps", "v", "flow", "score"):
        value = getattr(half, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(single, name), atol=0, rtol=0)
    assert half.at(at).dtype == torch.float32


@pytest.mark.parametrize("name", ["vp", "zero_snr"])
def test_tables_have_a_derivative_at_and_between_their_entries(name: str) -> None:
    process = PROCESSES[name]
    for t in (0.25, 0.3337, 0.5):
        at = torch.tensor(t, dtype=torch.float64)
        _, slope = torch.func.jvp(process.sigma, (at,), (torch.ones_like(at),))
        near = torch.tensor([t, t + 2e-4], dtype=torch.float64)
        low, high = process.sigma(near)
        torch.testing.assert_close(slope, (high - low) / 2e-4, atol=0, rtol=1e-2)
        alpha_slope = torch.func.grad(process.alpha)(at)
        assert alpha_slope < 0
        torch.testing.assert_close(process.alpha(at) * alpha_slope, -process.sigma(at) * slope)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, ZERO_SNR], ids=["plain", "zero_snr"])
def test_tables_equal_diffusers_add_noise_and_velocity_at_every_index(config: dict[str, object]) -> None:
    scheduler = DDPMScheduler(**config)
    process = VP(scheduler.alphas_cumprod)
    index = torch.arange(1000)
    t = process.time(index)
    assert t.dtype == torch.float32
    x0, eps = torch.randn(2, 1000, 1, 2, 2)
    torch.testing.assert_close(process.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, index), atol=1e-5, rtol=0)
    torch.testing.assert_close(process.target("v", x0, eps, t), scheduler.get_velocity(x0, eps, index), atol=1e-5, rtol=0)
    torch.testing.assert_close(process.timestep(t), index.float(), atol=0, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("kind, name", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, ZERO_SNR], ids=["plain", "zero_snr"])
def test_moving_equals_ddim(config: dict[str, object], kind: Kind, name: str, steps: int) -> None:
    if kind == "eps" and "rescale_betas_zero_snr" in config:
        kind, name = "v", "v_prediction"  # The noise says nothing of the sample where there is no signal.
    scheduler = DDIMScheduler(**config, prediction_type=name, clip_sample=False, timestep_spacing="trailing")
    process = VP(scheduler.alphas_cumprod)
    scheduler.set_timesteps(steps)
    for i, timestep in enumerate(scheduler.timesteps):
        output, xt = torch.randn(2, 2, 1, 4, 4)
        theirs = scheduler.step(output, timestep, xt)
        prediction = Prediction(output, kind, xt, torch.full((2,), 1 - i / steps), process)
        scale = max(1.0, float(theirs.pred_original_sample.abs().max()))  # 1 / alpha is 15 at the last entry.
        torch.testing.assert_close(prediction.x0, theirs.pred_original_sample, atol=1e-5 * scale, rtol=0)
        ours = prediction.at(torch.full((2,), 1 - (i + 1) / steps))
        torch.testing.assert_close(ours, theirs.prev_sample, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("kind, name", [("eps", "epsilon"), ("v", "v_prediction")])
def test_moving_equals_euler_in_its_own_scaling(kind: Kind, name: str) -> None:
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, prediction_type=name, timestep_spacing="trailing")
    process = VP(scheduler.alphas_cumprod)
    scheduler.set_timesteps(4)
    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    for timestep, t, s in zip(scheduler.timesteps, levels, levels[1:], strict=False):
        output, xt = torch.randn(2, 2, 1, 4, 4)
        alpha_t, _ = process.coefficients(torch.tensor(t), xt)
        alpha_s, _ = process.coefficients(torch.tensor(s), xt)
        scaled = xt / alpha_t
        torch.testing.assert_close(scheduler.scale_model_input(scaled, timestep), xt, atol=1e-5, rtol=0)
        theirs = scheduler.step(output, timestep, scaled).prev_sample
        ours = Prediction(output, kind, xt, torch.full((2,), t), process).at(torch.full((2,), s)) / alpha_s
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_moving_equals_flow_match_euler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    process = Flow()
    for i, timestep in enumerate(scheduler.timesteps):
        output, xt = torch.randn(2, 2, 1, 4, 4)
        t, s = shift_time(torch.tensor([1 - i / 4, 0.75 - i / 4]), shift)
        torch.testing.assert_close(process.timestep(t), timestep)
        ours = Prediction(output, "flow", xt, t.expand(2), process).at(s.expand(2))
        torch.testing.assert_close(ours, scheduler.step(output, timestep, xt).prev_sample, atol=1e-5, rtol=0)


def test_karras_schedule_and_time_input_of_edm() -> None:
    process = EDM()
    t = torch.linspace(1, 0, 18, dtype=torch.float64)
    i = torch.arange(18, dtype=torch.float64)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(process.sigma(t), karras)
    torch.testing.assert_close(process.timestep(t), karras.log() / 4)
    torch.testing.assert_close(process.initial_scale(t), karras)


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_times_may_come_shaped_to_broadcast(name: str) -> None:
    process, (x0, eps) = PROCESSES[name], pair()
    t = torch.tensor([0.2, 0.5, 0.9])
    flat, shaped = process.add_noise(x0, eps, t), process.add_noise(x0, eps, t.view(3, 1, 1, 1))
    torch.testing.assert_close(flat, shaped, atol=0, rtol=0)
    torch.testing.assert_close(process.add_noise(x0, eps, torch.tensor(0.5))[1], flat[1], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_rounded_times_stay_within_the_process(name: str, dtype: torch.dtype) -> None:
    """Whatever a time is rounded to, all that follows from it lies between what follows from 0 and from 1, and is finite."""
    process, ends = PROCESSES[name], torch.tensor([0.0, 1.0], dtype=torch.float64)
    t = torch.linspace(0, 1, 4001, dtype=torch.float64).to(dtype)
    (alpha, sigma), (alphas, sigmas) = (process.coefficients(each, ends[:1]) for each in (t, ends))
    snapped, told = process.snap(t), process.timestep(t.float())
    back = process.time_at(process.ratio(t.double()))
    least, most = process.timestep(ends).tolist()
    first = ends[:1]
    if isinstance(process, VP):  # which has entries alone
        least, most, first = 0.0, process.steps - 1.0, torch.tensor([1 / process.steps]).to(dtype).double()
    for found, between in (
        (alpha, alphas),
        (sigma, sigmas),
        (told, torch.tensor([least, most])),
        (back, ends),
        (snapped, torch.cat([first, ends[1:]])),
    ):
        assert bool((found >= between.min()).all()) and bool((found <= between.max()).all())
    torch.testing.assert_close(back, t.double(), atol=1.01e-6, rtol=0)  # so near to an entry a table means the entry
    assert torch.equal(process.snap(snapped), snapped)
    output, xt = torch.randn(2, len(t), 1)
    for kind in KINDS:
        prediction = Prediction(output, kind, xt, t, process)
        assert all(getattr(prediction, each).isfinite().all() for each in ("x0", "eps", "v", "flow", "score"))


def test_at_the_ends_the_unseen_part_keeps_its_direction() -> None:
    """The noise points from alpha x0 to x_t, the sample from sigma eps to x_t, also where nothing of either is in x_t."""
    process, (known, xt) = PROCESSES["flow"], torch.randn(2, 5, 3, dtype=torch.float64)
    for t in (0.0, 1e-9, 1e-7, 1e-4):
        direction = (xt - (1 - t) * known) / max(t, 1e-6)
        clean, noisy = filled(t, 5), filled(1 - t, 5)
        torch.testing.assert_close(Prediction(known, "x0", xt, clean, process).eps, direction)
        torch.testing.assert_close(Prediction(known, "eps", xt, noisy, process).x0, direction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_both_ends_are_themselves_in_every_precision(name: str, dtype: torch.dtype) -> None:
    process, ends = PROCESSES[name], torch.tensor([0.0, 1.0], dtype=dtype)
    exact = process.timestep(ends.double())
    torch.testing.assert_close(process.timestep(ends).double(), exact, rtol=1e-5, atol=0)
    if dtype.itemsize > 2:
        torch.testing.assert_close(process.time_at(process.ratio(ends)), ends, atol=1e-6, rtol=0)
