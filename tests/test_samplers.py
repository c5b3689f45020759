"""Samplers against the stock diffusers schedulers that they name, step by step and as whole loops."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler, TCDScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.process import EDM, VP, Flow, Kind, Prediction, Process, Trig
from fastgen.samplers import PREDICTION_TYPES, FewStep, below_time, even_times, timesteps_to_times
from tests.test_process import PROCESSES, STABLE_DIFFUSION, ZERO_SNR

SHAPE = (2, 1, 4, 4)
NOTHING = Condition({})


class Linear(nn.Module):
    """A fixed random linear map of the sample, different at every time."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        mixed: Tensor = self.mix(x.flatten(1)).view(x.shape)
        return 0.5 * mixed * torch.cos(timestep.float() / 300).view(-1, 1, 1, 1) + 0.3 * x


def student(process: Process, kind: Kind) -> Denoiser:
    def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        output: Tensor = network(xt, process.timestep(t))
        return output

    return Denoiser(Linear(), call, process, kind)


def loop(sampler: FewStep, denoiser: Denoiser, base: dict[str, Any], noise: Tensor, generator: torch.Generator) -> Tensor:
    """What a diffusers pipeline does with the scheduler that the sampler names."""
    spec = sampler.scheduler(denoiser.process, denoiser.kind)
    scheduler = getattr(diffusers, spec.class_name).from_config({**base, **spec.config})
    call = {key: value for key, value in spec.call.items() if key not in ("eta", "guidance_scale")}
    scheduler.set_timesteps(**call)
    extra = {"eta": spec.call["eta"]} if "eta" in spec.call else {}
    if spec.class_name != "EulerDiscreteScheduler" and spec.class_name != "DDIMScheduler":
        extra["generator"] = generator
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    assert len(scheduler.timesteps) == sampler.steps
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = denoiser.network(scaled, timestep.expand(len(x)))
        x = scheduler.step(output, timestep, x, **extra, return_dict=False)[0]
    return x


def compare(sampler: FewStep, process: Process, kind: Kind, base: dict[str, Any]) -> float:
    """The error of our samples relative to the stock loop's."""
    denoiser, noise = student(process, kind), torch.randn(SHAPE)
    with torch.no_grad():
        ours = sampler.sample(denoiser, noise, NOTHING, generator=torch.Generator().manual_seed(3))
        theirs = loop(sampler, denoiser, base, noise, torch.Generator().manual_seed(3))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_a_table_is_sampled_as_its_scheduler_samples(kind: Kind, gamma: float, steps: int) -> None:
    process = PROCESSES["vp"]
    sampler = FewStep(even_times(steps, process), gamma)
    assert compare(sampler, process, kind, STABLE_DIFFUSION) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_table_with_zero_terminal_snr_is_sampled_as_its_scheduler_samples(kind: Kind, gamma: float, steps: int) -> None:
    process = PROCESSES["zero_snr"]
    sampler = FewStep(even_times(steps, process), gamma)
    # EulerDiscreteScheduler puts 2^-24 in place of a zero squared signal: 2.4e-4 of the input, once.
    euler = sampler.scheduler(process, kind).class_name == "EulerDiscreteScheduler"
    assert compare(sampler, process, kind, ZERO_SNR) < (5e-4 if euler else 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_sampled_as_its_scheduler_samples(shift: float, gamma: float, steps: int) -> None:
    # The base's own shifts must not come on top of the sampler's.
    base = {"shift": 3.0, "use_dynamic_shifting": True, "shift_terminal": 0.1}
    assert compare(FewStep(even_times(steps, shift=shift), gamma), Flow(), "flow", base) < 1e-5


@given(st.sets(st.integers(30, 999), min_size=1, max_size=6), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_any_list_of_timesteps_is_sampled_as_its_scheduler_samples(chosen: set[int], gamma: float) -> None:
    process = PROCESSES["vp"]
    times = timesteps_to_times(process, sorted(chosen, reverse=True))
    assert compare(FewStep(times, gamma), process, "v", STABLE_DIFFUSION) < 1e-5


@given(st.integers(1, 60), st.sampled_from([20, 100, 999, 1000]), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_named_scheduler_visits_exactly_the_samplers_timesteps(steps: int, table: int, gamma: float) -> None:
    base: dict[str, Any] = {"num_train_timesteps": table, "clip_sample": True, "timestep_spacing": "leading", "steps_offset": 1}
    process = VP(DDIMScheduler(**base).alphas_cumprod)
    if steps > table / 12:
        steps = max(1, table // 12)  # Above the LCM scheduler's floor.
    sampler = FewStep(even_times(steps, process), gamma)
    spec = sampler.scheduler(process, "eps")
    scheduler = getattr(diffusers, spec.class_name).from_config({**base, **spec.config})
    scheduler.set_timesteps(**{key: value for key, value in spec.call.items() if key in ("num_inference_steps", "timesteps")})
    ours = process.timestep(torch.tensor(sampler.times, dtype=torch.float64))
    assert scheduler.timesteps.tolist() == ours.tolist()
    assert spec.call["guidance_scale"] == 1.0


def step(gamma: float, process: Process, kind: Kind, output: Tensor, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
    prediction = Prediction(output, kind, xt, t.expand(len(xt)), process)
    return FewStep((1.0,), gamma)._onward(prediction, s.expand(len(xt)), xt, torch.Generator().manual_seed(9))


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, ZERO_SNR], ids=["plain", "zero_snr"])
def test_one_step_equals_lcms(config: dict[str, Any]) -> None:
    scheduler, process = LCMScheduler(**config, prediction_type="v_prediction"), PROCESSES["vp"]
    process = VP(scheduler.alphas_cumprod)
    scheduler.set_timesteps(4, original_inference_steps=40)
    output, xt = torch.randn(2, *SHAPE)
    for t, s in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25)):
        timestep = scheduler.timesteps[round(4 * (1 - t))]
        theirs = scheduler.step(output, timestep, xt, generator=torch.Generator().manual_seed(9)).prev_sample
        ours = step(1.0, process, "v", output, xt, torch.tensor(t), torch.tensor(s))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 0.7])
def test_one_step_equals_tcds(gamma: float) -> None:
    scheduler = TCDScheduler(**STABLE_DIFFUSION)
    process = VP(scheduler.alphas_cumprod)
    scheduler.set_timesteps(timesteps=[900, 613, 77])
    output, xt = torch.randn(2, *SHAPE)
    for timestep, after in ((900, 613), (613, 77)):
        theirs = scheduler.step(output, timestep, xt, eta=gamma, generator=torch.Generator().manual_seed(9)).prev_sample
        t, s = process.time(torch.tensor(timestep)), process.time(torch.tensor(after))
        torch.testing.assert_close(step(gamma, process, "eps", output, xt, t, s), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [FlowMatchLCMScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)])
def test_one_step_equals_both_flow_schedulers_that_renoise(scheduler: Any) -> None:
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    output, xt = torch.randn(2, *SHAPE)
    for timestep, t, s in ((1000.0, 1.0, 0.6), (600.0, 0.6, 0.2)):
        generator = torch.Generator().manual_seed(9)
        theirs = scheduler.step(output, torch.tensor(timestep), xt, generator=generator).prev_sample
        ours = step(1.0, Flow(), "flow", output, xt, torch.tensor(t), torch.tensor(s))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gamma_is_the_share_of_the_way_that_is_taken_below() -> None:
    process = PROCESSES["vp"]
    t = process.time(torch.tensor([613.0]))
    assert process.timestep(below_time(process, t, 0.3)).item() == 429  # floor(0.7 * 613)
    torch.testing.assert_close(below_time(Flow(), torch.tensor([0.5]), 0.3), torch.tensor([0.35]))


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["flow", "trig", "edm"])
def test_every_process_samples_a_known_point(name: str, gamma: float) -> None:
    process = PROCESSES[name]

    def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        return torch.full_like(xt, 0.25)

    seen: list[Prediction] = []
    sampler = FewStep((1.0, 0.5, 0.25), gamma)
    noise = torch.randn(SHAPE)
    x0 = sampler.sample(Denoiser(nn.Identity(), call, process, "x0"), noise, NOTHING, watch=seen.append)
    torch.testing.assert_close(x0, torch.full(SHAPE, 0.25))
    assert [round(float(p.t[0]), 4) for p in seen] == [1.0, 0.5, 0.25]
    torch.testing.assert_close(seen[0].xt, noise * process.initial_scale(torch.tensor(1.0)))


def test_equal_seeds_give_equal_samples_and_unequal_ones_do_not() -> None:
    denoiser, noise, sampler = student(Flow(), "flow"), torch.randn(SHAPE), FewStep(even_times(3), 1.0)
    one, same, other = (sampler.sample(denoiser, noise, NOTHING, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("exit_at", [0, 1, 2])
def test_an_early_exit_keeps_the_graph_of_its_own_call_alone(exit_at: int, gamma: float) -> None:
    denoiser, noise, sampler = student(Flow(), "flow"), torch.randn(SHAPE), FewStep(even_times(3), gamma)
    seen: list[Prediction] = []
    generator = torch.Generator().manual_seed(1)
    x0 = sampler.sample(denoiser, noise, NOTHING, generator=generator, exit_at=exit_at, watch=seen.append)
    assert len(seen) == exit_at + 1
    assert [p.output.requires_grad for p in seen] == [False] * exit_at + [True]
    assert not seen[-1].xt.requires_grad
    torch.testing.assert_close(x0, seen[-1].x0)
    x0.sum().backward()
    assert denoiser.network.mix.weight.grad.abs().sum() > 0


def test_without_an_exit_the_whole_rollout_is_differentiable() -> None:
    denoiser, noise = student(Flow(), "flow"), torch.randn(SHAPE).requires_grad_()
    FewStep(even_times(3)).sample(denoiser, noise, NOTHING).sum().backward()
    assert noise.grad is not None
    assert noise.grad.abs().sum() > 0


def test_half_precision_noise_gives_half_precision_samples() -> None:
    denoiser = student(Flow(), "flow").bfloat16()
    assert FewStep(even_times(2), 1.0).sample(denoiser, torch.randn(SHAPE).bfloat16(), NOTHING).dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50])
def test_even_times_on_a_table_are_diffusers_trailing_grid(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    process = VP(scheduler.alphas_cumprod)
    times = even_times(steps, process)
    assert timesteps_to_times(process, scheduler.timesteps.tolist()) == pytest.approx(times, abs=1e-12)


def test_bad_samplers_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="at least 1, not 0"):
        even_times(0)
    for times in ((), (0.5, 0.5), (0.2, 0.4), (1.1, 0.5), (0.5, 0.0)):
        with pytest.raises(UserError, match="the times of"):
            FewStep(times)
    with pytest.raises(ValueError, match="gamma must lie in"):
        FewStep((1.0,), 1.5)
    with pytest.raises(UserError, match="must be at least 1, which means none, not 0"):
        FewStep((1.0,), guidance=0.0)


@pytest.mark.parametrize(
    ("process", "kind", "gamma"),
    [(Flow(), "flow", 0.3), (Flow(), "v", 0.0), (EDM(), "x0", 0.0), (Trig(), "v", 0.0), (PROCESSES["vp"], "flow", 0.0)],
)
def test_samplers_without_a_stock_scheduler_say_so(process: Process, kind: Kind, gamma: float) -> None:
    with pytest.raises(UserError, match="no stock diffusers scheduler"):
        FewStep((1.0, 0.5), gamma).scheduler(process, kind)


def test_the_lcm_scheduler_is_not_named_where_it_would_return_its_input() -> None:
    process = PROCESSES["vp"]
    with pytest.raises(UserError, match="at least 10, not 0"):
        FewStep(timesteps_to_times(process, [999, 0]), 1.0).scheduler(process, "v")


def test_every_table_kind_has_a_name_in_diffusers() -> None:
    assert PREDICTION_TYPES == {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
