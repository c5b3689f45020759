"""The best state of a run so far by its measure of quality, kept apart from the newest checkpoints; when to stop waiting."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from fastgen.errors import UserError
from fastgen.training import checkpoint
from fastgen.training.launch import processes, rank

__all__ = ["FOLDER", "Best", "find_best", "keep"]

FOLDER = "best"


class Best:
    """The least distance so far, and how many measurements there have been since. The same in every process."""

    def __init__(self, patience: int = 0, device: torch.device | str = "cpu"):
        """`patience` is how many measurements without a better one there may be; 0: any number."""
        self.patience, self.device = patience, torch.device(device)
        self.value, self.waited = math.inf, 0

    def add(self, value: float) -> bool:
        """Take in a measurement, of the first process where there are several; whether it is the best."""
        value = self._shared(value)[0]
        better = value < self.value
        self.value, self.waited = (value, 0) if better else (self.value, self.waited + 1)
        return better

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.waited

    def recall(self, metrics: Path | None) -> None:
        """Start from the lines of a run that goes on; only the first process needs them."""
        self.value, self.waited = math.inf, 0
        if rank() == 0 and metrics is not None and metrics.is_file():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                if "quality" in values:
                    value = math.inf if values["quality"] is None else values["quality"]
                    self.value, self.waited = (value, 0) if value < self.value else (self.value, self.waited + 1)
        self.value, waited = self._shared(self.value, float(self.waited))
        self.waited = int(waited)

    def _shared(self, *values: float) -> list[float]:
        """The values of the first process."""
        if processes() == 1:
            return list(values)
        joint = torch.tensor(values, device=self.device)
        dist.broadcast(joint, 0)
        found: list[float] = joint.tolist()
        return found


def keep(path: Path, run: Path) -> Path:
    """Keep a checkpoint as the run's best, in place of the one before; its files are linked where they can be, else copied.

    Raises UserError where that cannot be done.
    """
    folder = run / FOLDER
    final, partial = folder / path.name, folder / f".{path.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted(path.iterdir()):
            try:
                os.link(file, partial / file.name)
            except OSError:
                shutil.copy2(file, partial / file.name)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in folder.iterdir():
            if old != final:
                shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"{folder}: the best checkpoint cannot be kept there ({error.strerror or error})") from error
    return final


def find_best(run: Path) -> Path:
    """The best checkpoint of a run. Raises UserError where none was kept."""
    folder = run / FOLDER
    there = list(folder.iterdir()) if folder.is_dir() else []
    found = sorted((each for each in there if checkpoint.NAME.fullmatch(each.name)), key=checkpoint.step_of)
    if not found:
        raise UserError(f"{run}: has no best checkpoint; it is kept where train.quality_every is set")
    return found[-1]
