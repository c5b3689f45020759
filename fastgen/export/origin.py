"""Where an export comes from: a hash of the base network's weights."""

from __future__ import annotations

import torch
from torch import nn

from fastgen.denoiser import Denoiser
from fastgen.pipelines.quantization import weights_sha256


def base_hash(network: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a network's weights without its adapters; see `weights_sha256`."""
    return weights_sha256(network)


def timesteps_of(student: Denoiser, times: tuple[float, ...]) -> list[float]:
    """The timesteps that the network is called with at `times`, rounded to six digits."""
    if not times:
        return []
    steps = student.process.timestep(torch.tensor(times, dtype=torch.float64))
    return [round(float(step), 6) for step in steps]


def shift_of(times: tuple[float, ...]) -> float | None:
    """The shift s with which evenly spaced times u became `times`, t = s u / (1 + (s - 1) u); None where there is none."""
    if not times or times[0] != 1.0:
        return None
    n = len(times)
    even = [1 - i / n for i in range(n)]
    shift = times[1] * (1 - even[1]) / (even[1] * (1 - times[1])) if n > 1 else 1.0
    fits = all(abs(shift * u / (1 + (shift - 1) * u) - t) < 1e-3 for u, t in zip(even, times, strict=True))
    return round(shift, 2) if fits else None
