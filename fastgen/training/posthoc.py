"""Power-law averages of any width, made after training from two (Karras et al. 2024, arXiv:2312.02696, section 3.2).

Two averages are tracked along the run and are part of every checkpoint. What they were there is kept under RUN/averages, linked
to the checkpoint's own file, when that is long gone. An average of another width is the sum of those whose profile over the
course of training is nearest to it, in least squares.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.training import checkpoint
from fastgen.training.ema import EMA, exponent, power

__all__ = ["TRACKED", "Tracked", "coefficients", "keep", "reconstruct"]

TRACKED = (0.05, 0.10)
"""Widths of the two averages, as shares of the run: the paper's."""
FOLDER, PART = "averages", "averages"
NAME = re.compile(r"step-(\d{8,})\.safetensors")


class Tracked:
    """The two averages of a module's trainable weights; all is as of one `EMA`."""

    def __init__(self, module: nn.Module, started: int):
        """`started`: after which update of the run the averages begin; those of one stage go together."""
        self.started = started
        self.averages = {width: EMA(module, power(width)) for width in TRACKED}

    def follows(self, weights: Sequence[Tensor]) -> bool:
        return self.averages[TRACKED[0]].follows(weights)

    def update(self) -> None:
        for average in self.averages.values():
            average.update()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: both averages, and after how many updates."""
        found = {f"{width}/{name}": each for width, ema in self.averages.items() for name, each in ema.tensors().items()}
        return found | {"updates": torch.tensor(self.averages[TRACKED[0]].updates), "started": torch.tensor(self.started)}

    def load(self, path: Path) -> None:
        """Inverse of `tensors`, from a checkpoint. Raises UserError where it does not fit."""
        counts = {"updates": torch.tensor(0), "started": torch.tensor(0)}
        averages = {f"{width}/{name}": each for width, ema in self.averages.items() for name, each in ema.average.items()}
        checkpoint.restore(averages | counts, path, PART)
        self.started = int(counts["started"])
        for ema in self.averages.values():
            ema.updates = int(counts["updates"])


def keep(path: Path, run: Path) -> None:
    """Keep what a run's checkpoint has of the averages, if it has any. Raises UserError where the disk refuses."""
    source = path / f"{PART}.safetensors"
    if not source.is_file():
        return
    folder = run / FOLDER
    partial, final = folder / f".{path.name}.partial", folder / f"{path.name}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:  # a file system without links
            shutil.copy2(source, partial)
        partial.replace(final)
    except OSError as error:
        raise UserError(f"{folder}: averages cannot be kept there ({error.strerror or error})") from error


def reconstruct(run: Path, path: Path, sigma_rel: float) -> dict[str, Tensor]:
    """The average of width `sigma_rel` at the checkpoint `path` of a run, by the names of the weights, on the CPU.

    Raises UserError for a width that cannot be had, and where the run kept no averages.
    """
    if not 0 < sigma_rel <= 0.28:
        raise UserError(f"the width of an average must be above 0 and at most 0.28, not {sigma_rel:g}")
    if not (path / f"{PART}.safetensors").is_file():
        raise UserError(f"{path} holds no averages to make others of; they are kept where train.ema_posthoc = true")
    last = checkpoint.read(path, PART)
    found = [(int(last["updates"]), last)]
    for file in sorted((run / FOLDER).glob("step-*.safetensors")):
        match = NAME.fullmatch(file.name)
        if match and int(match[1]) < checkpoint.step_of(path):
            some = checkpoint.read(file.parent, file.stem)
            if int(some["started"]) == int(last["started"]) and int(some["updates"]) > 0:
                found.append((int(some["updates"]), some))
    times = [time for time, _ in found for _ in TRACKED]
    shares = coefficients(times, [*TRACKED] * len(found), found[0][0], sigma_rel)
    parts = [(some, width) for _, some in found for width in TRACKED]
    return joined(parts, shares)


def joined(parts: Sequence[tuple[Mapping[str, Tensor], float]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of averages, in double precision on the way."""
    some, width = parts[0]
    names = [key.removeprefix(f"{width}/") for key in some if key.startswith(f"{width}/")]
    result = {}
    for name in names:
        first = some[f"{width}/{name}"]
        total = torch.zeros(first.shape, dtype=torch.float64)
        for (each, of), share in zip(parts, shares, strict=True):
            total += share * each[f"{of}/{name}"].double()
        result[name] = total.to(first.dtype)
    return result


def coefficients(times: Sequence[int], widths: Sequence[float], time: int, width: float) -> list[float]:
    """The shares with which averages of `widths` at `times` (updates, above 0) come nearest to that of `width` at `time`.

    Least squares of the profiles: A x = b with their inner products (arXiv:2312.02696, appendix C, algorithm 3).
    """
    t, gamma = np.array(times, dtype=np.float64), np.array([exponent(each) for each in widths])
    products = inner(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = inner(t, gamma, np.array(float(time)), np.array(exponent(width)))
    found: list[float] = np.linalg.lstsq(products, wanted, rcond=1e-12)[0].tolist()
    return found


def inner(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The inner product over time of the profiles (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t, of two averages."""
    low, high = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    of_later = np.where(t_a > t_b, gamma_a, gamma_b)
    result: np.ndarray = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / high * (low / high) ** of_later
    return result
