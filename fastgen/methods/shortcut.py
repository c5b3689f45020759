"""Shortcut models: a network that is told how far a step goes learns long steps from pairs of its own shorter ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.families.mean_velocity import MeanVelocities
from fastgen.losses import landing, noised, shared_uniform, squared, wide
from fastgen.method import Batch, Loss
from fastgen.pipelines.base import Pipeline
from fastgen.rollouts import time_grid
from fastgen.samplers import MeanVelocity, even_times


@dataclass
class Shortcut(MeanVelocities):
    """Shortcut models (Frans et al. 2025), as distillation of a teacher or, with `training`, from data alone.

    A part of each batch learns that a step of 2 d is two steps of d (equation 5), with d a power of two times the finest, the
    two steps being the student's own without gradient; the rest, told no step at all, learns the velocity. The shortest of
    the student's own steps are told none either.

    Differences from the authors' code: the velocity is the guided teacher's; the target comes from the student itself, not from
    its average; steps are DDIM's on the network's own times, which for a flow are the paper's.
    """

    finest: int = field(default=128, metadata={"help": "shortest steps from noise to data, a power of two"})
    bootstrap: float = field(
        default=0.25, metadata={"help": "share of a batch that learns long steps", "above": 0, "at_most": 1}
    )
    clip: float = field(default=4.0, metadata={"help": "bound of the velocities that long steps learn", "above": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finest < 2 or self.finest & (self.finest - 1):
            raise UserError(f"finest must be a power of two, at least 2, not {self.finest}")
        self._require_trained(self.steps)

    def _require_trained(self, steps: int) -> None:
        # A step of the shortest length is asked as one of no length, which no sampler tells a network.
        if steps < 1 or self.finest % steps or steps == self.finest:
            most = f"half of finest = {self.finest}"
            raise UserError(f"a shortcut model takes a power of two of steps up to {most}, not {steps}")

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.times = time_grid(f"finest = {self.finest}", self.finest, self.process, self.shift, self.device)

    def sampler(self, steps: int | None = None) -> MeanVelocity:
        steps = self.steps if steps is None else steps
        self._require_trained(steps)
        return MeanVelocity(
            tuple(even_times(self.finest, self.process, self.shift)[:: self.finest // steps]), guidance=self.told
        )

    def loss(self, batch: Batch) -> Loss:
        assert batch.latents is not None
        x0, condition, times = wide(batch.latents), batch.condition, self.times
        # How many there are decides which calls follow, so that all processes draw the same.
        long = int(len(x0) * self.bootstrap + shared_uniform(device=x0.device))
        start, stop = self.draw_steps(len(x0), long, x0.device)
        t, end, eps = times[start], times[stop], torch.randn_like(x0)
        xt = noised(self.process, x0, eps, t)
        with torch.no_grad():
            parts = []
            if long:
                parts.append(self.two_steps(xt[:long], times, start[:long], stop[:long], condition[:long]))
            if long < len(x0):
                rest = slice(long, len(x0))
                parts.append(self.velocity(x0[rest], eps[rest], xt[rest], t[rest], condition[rest]))
        answer = self.student(xt, t, condition, guidance=self.scales(len(x0)), end=end).flow
        return {"shortcut": squared(answer, torch.cat(parts))}

    def draw_steps(self, count: int, long: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions [B] on the grid where steps begin and end: `long` of them a power of two apart, the others none."""
        octaves = self.finest.bit_length() - 1
        cells = 2 ** torch.randint(1, octaves + 1, (count,), device=device)
        cells[long:] = 1
        start = (torch.rand(count, device=device) * (self.finest // cells)).long() * cells
        cells[long:] = 0
        return start, start + cells

    def two_steps(self, x: Tensor, times: Tensor, start: Tensor, stop: Tensor, condition: Condition) -> Tensor:
        """The flow velocity of the one step that lands where two of the student's, half as long, land."""
        half, told = (stop - start) // 2, self.scales(len(x))
        landed = x
        for first in (start, start + half):
            t, end = times[first], times[first + half]
            asked = torch.where(half == 1, t, end)
            landed = self.student(landed, t, condition, guidance=told, end=asked).at(end)
        x0, eps = landing(self.process, x, times[start], landed, times[stop])
        return (eps - x0).float().clamp(-self.clip, self.clip)
