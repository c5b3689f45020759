"""A cheap measure of quality while training goes on: how far the student's samples are from the teacher's.

The Fréchet distance (Dowson and Landau 1982) of fixed random features of latents: layout, a random projection of the latent
reduced to 4 x 4, and texture, the mean answers of random filters at two scales. Nothing is downloaded and nothing is decoded.
It orders the states of one run, which is what early stopping and "best so far" need; it is no FID and cannot be compared
between pipelines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.data.source import encode_prompts
from fastgen.method import Method
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import Sampler
from fastgen.training.calls import Calls
from fastgen.training.ema import EMA
from fastgen.training.grids import describe, draw_latents, evaluating, keep, noise_of, read_kept
from fastgen.training.launch import rank
from fastgen.training.random_state import undisturbed

__all__ = ["Quality", "features", "frechet"]

LAYOUT, TEXTURE = 16, 16
SEED = 20_000
"""Seeds of these samples begin here, so that they are others than the grids'."""


class Quality:
    """Measures a student against samples of the teacher that are drawn once and kept in `folder`."""

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        prompts: Sequence[str],
        *,
        teacher: Sampler,
        samples: int = 64,
        at_once: int = 16,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        """`prompts` are used in turn, each sample with a noise of its own; `teacher` is how the teacher is sampled."""
        self.pipeline, self.folder, self.teacher, self.at_once, self.autocast = pipeline, folder, teacher, at_once, autocast
        chosen = list(prompts)[:samples]
        self.prompts = [chosen[i % len(chosen)] for i in range(samples)]
        known = encode_prompts(pipeline, chosen)
        self.condition = known[torch.arange(samples) % len(chosen)]
        self.reference: Tensor | None = None

    def measure(self, method: Method, ema: EMA | None = None, calls: Calls | None = None) -> dict[str, float]:
        """The distance, as "quality" (lower is better), and the gap of sampling where `calls` has watched training.

        The student is averaged where `ema` is given. All processes that hold parts of its weights take part; the first has the
        answer, others have none.
        """
        with undisturbed(self.pipeline.device), torch.no_grad(), self.autocast():
            if self.reference is None:
                self.reference = self.teachers()
            averaged = ema.applied(method.trained) if ema else nullcontext()
            watched = calls.in_sampling() if calls and ema is None else nullcontext()
            with evaluating(method.trained), averaged, watched:
                latents = self.draw(method.trained, method.sampler())
            if calls and ema is not None:  # The gap is that of the weights that learn.
                with evaluating(method.trained), calls.in_sampling():
                    self.draw(method.trained, method.sampler())
        if rank() > 0:
            return {}
        found = {"quality": frechet(features(latents), features(self.reference))}
        gap = calls.gap() if calls else None
        return found | ({} if gap is None else {"sampling_gap": gap})

    def draw(self, denoiser: Any, sampler: Sampler) -> Tensor:
        """Latents [samples, ...] on the CPU, float32."""
        shape = self.pipeline.latent_shape
        noise = torch.stack([noise_of(i, SEED, shape) for i in range(len(self.prompts))])
        return draw_latents(denoiser, sampler, noise, self.condition, self.pipeline.device, self.at_once)

    def teachers(self) -> Tensor:
        """The teacher's samples: those kept in the folder where they are of these prompts and this sampler, else drawn."""
        about = json.dumps([describe(self.teacher), self.prompts, list(self.pipeline.latent_shape)])
        key = hashlib.sha256(about.encode()).hexdigest()
        path = self.folder / "teacher-latents.safetensors"
        kept = read_kept(path, key)
        if kept is None:
            kept = self.draw(self.pipeline.frozen(), self.teacher)
            if rank() == 0:
                keep(path, key, kept)
        return kept


def features(latents: Tensor) -> Tensor:
    """Random features [B, 32], double precision, of latents [B, C, ...]; the same weights for the same number of channels.

    Frames of a video are averaged; latents of another form than maps are looked at as they are.
    """
    x = latents.float()
    frames = 1
    if x.ndim == 5:  # [B, C, frames, H, W]
        frames, x = x.shape[2], x.transpose(1, 2).flatten(0, 1)
    if x.ndim != 4:
        flat = x.flatten(1)
        return (flat @ weights(flat.shape[1], LAYOUT + TEXTURE, 0)).double()
    small = F.adaptive_avg_pool2d(x, (min(4, x.shape[2]), min(4, x.shape[3]))).flatten(1)
    parts = [small @ weights(small.shape[1], LAYOUT, 0)]
    filters = weights(x.shape[1] * 9, TEXTURE, 1).T.reshape(TEXTURE, x.shape[1], 3, 3)
    for view in (x, F.avg_pool2d(x, 2) if min(x.shape[2:]) >= 4 else x):
        parts.append(F.conv2d(view, filters, padding=1).abs().mean((2, 3)).chunk(2, 1)[len(parts) - 1])
    return torch.cat(parts, 1).unflatten(0, (-1, frames)).mean(1).double()


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """A fixed random matrix whose columns have unit length on average."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 * rows + seed)) / rows**0.5


def frechet(one: Tensor, two: Tensor) -> float:
    """The Fréchet distance of Gaussians with the moments of two sets of features [N, D], finite or infinity."""
    if not (torch.isfinite(one).all() and torch.isfinite(two).all()):
        return float("inf")
    first, second = torch.cov(one.T), torch.cov(two.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (one.mean(0) - two.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    return float(distance.clamp_min(0))
