"""How a student turns noise into a sample. The same object rolls out in training, validates, evaluates and is exported.

Between calls a sampler either follows the probability-flow ODE (DDIM), re-noises its clean estimate (consistency models; Song
et al. 2023, algorithm 1), or does a part of each (gamma sampling; TCD, Zheng et al. 2024, algorithm 4).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Guided, Predicts
from fastgen.errors import UserError
from fastgen.process import VP, Flow, Kind, Prediction, Process


@dataclass(frozen=True)
class SchedulerSpec:
    """A stock diffusers scheduler that reproduces a sampler: class, config entries, and arguments of the pipeline call."""

    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


class Sampler(ABC):
    """Turns noise into clean samples with a fixed number of network calls."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Network calls a sample."""

    @abstractmethod
    def sample(
        self,
        denoiser: Predicts,
        noise: Tensor,
        condition: Condition,
        *,
        generator: torch.Generator | None = None,
        exit_at: int | None = None,
        guidance: float | None = None,
        watch: Callable[[Prediction], None] | None = None,
    ) -> Tensor:
        """Samples x0 from unit `noise` [B, ...].

        With `exit_at`, stop after that call (0 is the first) and keep the graph of that call alone: the backward simulation of
        DMD2 (Yin et al. 2024, section 4.5). `guidance`, where given, takes the place of the sampler's own. `watch` sees every
        prediction.
        """

    @abstractmethod
    def scheduler(self, process: Process, kind: Kind) -> SchedulerSpec:
        """The diffusers scheduler that reproduces this sampler. Raises UserError where there is none."""


@dataclass(frozen=True)
class FewStep(Sampler):
    """Call the network at each of `times` (decreasing, in (0, 1]) and go on to the next with noise level `gamma`.

    `gamma` 0 follows the ODE, 1 re-noises the clean estimate, between them goes below the next level by that share of its time
    and diffuses back; on a table it then ends where diffusers' TCDScheduler does, at the table's first entry. `guidance`
    (diffusers convention, at least 1) is 1 for a student that needs none, the embedded scale for a network that embeds it, and
    true guidance with two predictions a call for a teacher.

    Noise is drawn as diffusers draws it, one standard normal of x's shape before every call but the first.
    """

    times: tuple[float, ...]
    gamma: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.times or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            shown = [round(time, 4) for time in self.times[:8]] + ["..."] * (len(self.times) > 8)
            raise UserError(f"the times of {len(self.times)} calls must decrease, not {shown}; other steps or shift may do")
        if not (self.times[-1] > 0 and self.times[0] <= 1):
            raise UserError(f"the times of calls must lie above 0 and up to 1, not {self.times[0]:g} to {self.times[-1]:g}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], not be {self.gamma}")
        if self.guidance < 1:
            raise UserError(f"the guidance scale of a sampler must be at least 1, which means none, not {self.guidance:g}")

    @property
    def steps(self) -> int:
        return len(self.times)

    def sample(
        self,
        denoiser: Predicts,
        noise: Tensor,
        condition: Condition,
        *,
        generator: torch.Generator | None = None,
        exit_at: int | None = None,
        guidance: float | None = None,
        watch: Callable[[Prediction], None] | None = None,
    ) -> Tensor:
        last = self.steps - 1 if exit_at is None else exit_at
        guided = Guided(denoiser, self.guidance if guidance is None else guidance)
        x, process, prediction = noise, denoiser.process, None
        for i in range(last + 1):
            t = self._time(i, noise)
            if prediction is None:
                x = (x * process.initial_scale(t).view(-1, *[1] * (x.ndim - 1))).to(noise.dtype)
            else:
                with torch.set_grad_enabled(torch.is_grad_enabled() and exit_at is None):
                    x = self._onward(prediction, t, noise, generator).to(noise.dtype)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (exit_at is None or i == exit_at)):
                prediction = self._ask(guided, x, t, i, condition)
            if watch is not None:
                watch(prediction)
        assert prediction is not None
        if isinstance(process, VP) and 0 < self.gamma < 1 and exit_at is None:
            return prediction.at(torch.full_like(t, 1 / process.steps)).to(noise.dtype)
        return prediction.x0.to(noise.dtype)

    def _ask(self, guided: Guided, x: Tensor, t: Tensor, i: int, condition: Condition) -> Prediction:
        return guided(x, t, condition)

    def _time(self, i: int, like: Tensor) -> Tensor:
        return like.new_full((len(like),), self.times[i], dtype=torch.promote_types(like.dtype, torch.float32))

    def _onward(self, prediction: Prediction, t: Tensor, first: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.gamma == 0:
            return prediction.at(t)
        process, x0 = prediction.process, prediction.x0
        eps = self._renewed(first, generator).to(x0)
        if self.gamma == 1:
            return process.add_noise(x0, eps, t)
        below = below_time(process, t, self.gamma)
        return process.diffuse(prediction.at(below), eps, below, t)

    def _renewed(self, first: Tensor, generator: torch.Generator | None) -> Tensor:
        """The noise to add between two calls; `first` [B, ...] is what the samples began with."""
        return torch.randn(first.shape, generator=generator, device=generator.device if generator else first.device)

    def scheduler(self, process: Process, kind: Kind) -> SchedulerSpec:
        if isinstance(process, VP) and kind in PREDICTION_TYPES:
            return self._table_scheduler(process, kind)
        if isinstance(process, Flow) and kind == "flow" and self.gamma in (0.0, 1.0):
            config: dict[str, Any] = {"num_train_timesteps": process.timesteps, "shift": 1.0, "shift_terminal": None}
            config |= {"use_dynamic_shifting": False, "stochastic_sampling": self.gamma == 1.0} | OWN_SIGMAS
            return SchedulerSpec("FlowMatchEulerDiscreteScheduler", config, self._call({"sigmas": list(self.times)}))
        world = f"{kind} prediction on {type(process).__name__}"
        raise UserError(f"no stock diffusers scheduler does what this sampler does (gamma {self.gamma:g}, {world})")

    def _table_scheduler(self, process: VP, kind: Kind) -> SchedulerSpec:
        steps, table = self.steps, process.steps
        timesteps = [int(process.timestep(torch.tensor(t, dtype=torch.float64)).round()) for t in self.times]
        config: dict[str, Any] = {"prediction_type": PREDICTION_TYPES[kind], "clip_sample": False, "thresholding": False}
        if self.gamma == 0:
            # DDIM goes down by a whole stride whatever the next timestep is, so 3 steps of 1000 do not meet their own grid.
            if timesteps == [table - 1 - i * (table // steps) for i in range(steps)] and table // steps * steps == table:
                config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
                return SchedulerSpec("DDIMScheduler", config, self._call({"num_inference_steps": steps}))
            # Euler's method on x / alpha is DDIM; with "leading" its first input is unit noise, with "trailing" a little less.
            config |= {"timestep_spacing": "leading", "interpolation_type": "linear", "timestep_type": "discrete"}
            config |= {"final_sigmas_type": "zero"} | OWN_SIGMAS
            return SchedulerSpec("EulerDiscreteScheduler", config, self._call({"timesteps": timesteps}))
        original = _original_steps(table, timesteps)
        config |= {"original_inference_steps": original or min(50, table), "timestep_scaling": TIMESTEP_SCALING}
        call: dict[str, Any] = {"num_inference_steps": steps} if original else {"timesteps": timesteps}
        if self.gamma < 1:
            return SchedulerSpec("TCDScheduler", config, self._call(call | {"eta": self.gamma}))
        if timesteps[-1] < 10:
            raise UserError(
                "diffusers' LCMScheduler hands back its input near clean data: "
                f"the last timestep must be at least 10, not {timesteps[-1]}"
            )
        return SchedulerSpec("LCMScheduler", config, self._call(call))

    def _call(self, steps: dict[str, Any]) -> dict[str, Any]:
        return steps | {"guidance_scale": self.guidance}


@dataclass(frozen=True)
class MeanVelocity(FewStep):
    """Follow the mean velocity of a network that is told where a step ends: x_s = x_t - (t - s) u(x_t, t, s) for a flow.

    Any other process takes the same step by its DDIM formula. `gamma` must be 0 (MeanFlow, Geng et al. 2025, equation 12).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma:
            raise ValueError(f"mean velocities are followed without new noise, so gamma must be 0, not {self.gamma}")

    def _ask(self, guided: Guided, x: Tensor, t: Tensor, i: int, condition: Condition) -> Prediction:
        if not getattr(guided.denoiser, "takes_end", False):
            raise UserError("mean velocities are those of a network that is told where a step ends, and this one is not")
        end = self._time(i + 1, x) if i + 1 < self.steps else torch.zeros_like(t)
        return guided(x, t, condition, end=end)

    @property
    def stock(self) -> FewStep:
        """The sampler whose stock scheduler takes these steps, around a network that is told their ends by other means."""
        return FewStep(self.times, guidance=self.guidance)

    def scheduler(self, process: Process, kind: Kind) -> SchedulerSpec:
        raise UserError(
            "no stock scheduler of diffusers tells a network where its step ends: only a pipeline folder, which brings a "
            'file of its own for that, can be exported, format "diffusers" or "fused"'
        )


PREDICTION_TYPES: dict[Kind, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What diffusers' schedulers for a table call the kinds of output."""

TIMESTEP_SCALING = 10.0
"""How fast the skip to the input fades in latent consistency models: the default of diffusers' LCMScheduler."""

OWN_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
"""Keeps a scheduler from replacing the levels that it is given."""


def fewer_calls(trained: int, steps: int | None) -> int:
    """The number of a student's `trained` calls that are made for `steps`, evenly; None: all.

    Raises UserError where that is not every so many of them.
    """
    steps = trained if steps is None else steps
    if steps < 1 or trained % steps:
        fit = [count for count in range(1, trained + 1) if trained % count == 0]
        raise UserError(f"this student was trained for {', '.join(map(str, fit))} steps, not for {steps}")
    return steps


def _original_steps(table: int, timesteps: list[int]) -> int | None:
    """The `original_inference_steps` with which diffusers' LCM and TCD schedulers choose just these timesteps, if any does."""
    for original in range(min(50, table), len(timesteps) - 1, -1):
        stride = table // original
        chosen = [(original - i * original // len(timesteps)) * stride - 1 for i in range(len(timesteps))]
        if chosen == timesteps:
            return original
    return None


def below_time(process: Process, t: Tensor, gamma: float) -> Tensor:
    """The time (1 - gamma) of the way up to `t`; on a table, the index that diffusers' TCDScheduler takes."""
    if isinstance(process, VP):
        # In float32 whatever the times are, as diffusers multiplies.
        return process.time((process.timestep(t).float() * (1 - gamma)).floor()).to(t.dtype)
    return t * (1 - gamma)


def even_times(steps: int, process: Process | None = None, shift: float = 1.0) -> tuple[float, ...]:
    """`steps` times from 1 down, evenly spaced ("trailing"), shifted towards noise; on a table's grid when `process` has one.

    Raises UserError for fewer than one step.
    """
    if steps < 1:
        raise UserError(f"the number of sampling steps must be at least 1, not {steps}")
    times = [1 - i / steps for i in range(steps)]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    if isinstance(process, VP):
        # Python's rounding, half to even, is numpy's: diffusers' trailing grid.
        times = [round(t * process.steps) / process.steps for t in times]
    return tuple(times)


def timesteps_to_times(process: Process, timesteps: Sequence[float]) -> tuple[float, ...]:
    """A list of diffusers timesteps, such as (999, 749, 499, 249), as times."""
    times = process.time(torch.tensor(timesteps, dtype=torch.float64)).tolist()
    return tuple(min(1.0, t) for t in times if not math.isnan(t))
