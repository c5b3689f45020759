"""Losses and norms: averaged on the device, written a line at a time."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UserError

__all__ = ["Averages", "MetricsFile"]


class Averages:
    """Running means by name, kept on the device so that nothing waits for it between lines."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take in a scalar."""
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values())).tolist()
        means = {name: total / self.counts[name] for name, total in zip(self.sums, sums, strict=True)}
        self.sums, self.counts = {}, {}
        return means

    def count(self, name: str) -> int:
        """How often a name was added since the last call of `take`."""
        return self.counts.get(name, 0)

    def state(self) -> dict[str, Any]:
        return {name: [float(total), self.counts[name]] for name, total in self.sums.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: torch.tensor(total) for name, (total, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}


class MetricsFile:
    """One JSON object a line, "step" first; what is not finite is null; "health" names the readings that are not green."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []  # lines that the disk has refused so far

    def write(self, step: int, values: Mapping[str, float], health: Mapping[str, str] | None = None) -> None:
        """Append a line, on disk when this returns.

        Raises UserError where the disk refuses. The line is then written with the next, and no half of it is left.
        """
        line: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, **line, **({"health": dict(health)} if health else {})}
        self.waiting.append(json.dumps(line) + "\n")
        try:
            with self.path.open("ab", buffering=0) as file:
                whole, text = file.tell(), "".join(self.waiting).encode()
                try:
                    if file.write(text) < len(text):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(whole)
                    raise
            self.waiting = []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def cut(self, step: int) -> None:
        """Drop the lines of updates after `step`, and a last line that was cut off: a resumed run writes them anew."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)
