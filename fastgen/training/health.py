"""How training is going: readings of losses, loop and pictures, judged by their gauges, told when they turn."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.losses.readings import LEVELS, Readings, Summary
from fastgen.training.gauges import Advice, Colour, Gauge, gauge

__all__ = ["Health", "Value", "from_losses", "moved_and_size", "sampled", "with_update_sizes"]

PREFIX = "reading/"
FEW = 16
"""Samples of a noise level below which it is not judged."""
FIRST_LINES, EARLY = 10, 1
"""How many lines a gradient norm is measured against, and how many before them are passed over."""
SAMPLED = 4096
"""Elements of a weight that the size of an update is measured on."""
RANK: dict[Colour, int] = {"green": 0, "amber": 1, "red": 2}


@dataclass(frozen=True)
class Value:
    """A reading: its value, the standard error of that where it is known, and the values by noise level."""

    value: float
    error: float = 0.0
    levels: tuple[float | None, ...] = ()


@dataclass
class Health:
    """What the readings of a run say. `say` tells the user a line."""

    say: Callable[[str], None] = lambda line: None
    readings: Readings = field(default_factory=Readings)
    norms: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, float] = field(default_factory=dict)
    best: float = math.inf
    last: dict[str, Colour] = field(default_factory=dict)
    told: dict[str, Colour] = field(default_factory=dict)

    def line(
        self,
        step: int,
        metrics: Mapping[str, float],
        seen: Mapping[str, float],
        updates: Mapping[str, int],
        joint: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[dict[str, float], dict[str, Colour]]:
        """The readings for a line of the metrics and the colours of those that are not green.

        `metrics` are the means since the last line, `seen` what pictures and samples say, `updates` how many each player has
        made or skipped since the last line. `joint` adds up over the processes. What has turned is told.
        """
        values = from_losses(self.readings.take(joint)) | self.from_loop(metrics, updates) | self.from_pictures(seen)
        written: dict[str, float] = {}
        colours: dict[str, Colour] = {}
        for name, value in values.items():
            written[PREFIX + name] = value.value
            for level, one in enumerate(value.levels):
                if one is not None:
                    written[f"{PREFIX}{name}/t{(level + 0.5) / LEVELS:g}"] = one
            colour, advice = gauge(name).judge(value.value, value.error)
            if colour != "green":
                colours[name] = colour
            self.tell(step, name, value, colour, advice)
        return written, colours

    def from_loop(self, metrics: Mapping[str, float], updates: Mapping[str, int]) -> dict[str, Value]:
        """Gradient norms against those of the first lines, sizes of updates, skipped updates."""
        found = {}
        for player, made in updates.items():
            if (norm := metrics.get(f"{player}/gradient_norm")) is not None:
                early = self.norms.setdefault(player, [])
                base = [each for each in early[EARLY:] if math.isfinite(each)]
                if len(base) >= 3 and math.isfinite(norm) and (typical := statistics.median(base)) > 0:
                    found[f"gradient_norm/{player}"] = Value(norm / typical)
                if len(early) < EARLY + FIRST_LINES:
                    early.append(norm)
            if (size := metrics.get(f"{player}/update_size")) is not None:
                found[f"update_size/{player}"] = Value(size)
            skipped = metrics.get(f"{player}/skipped", 0.0)
            if made:
                found[f"skipped/{player}"] = Value(max(0.0, skipped - self.skipped.get(player, 0.0)) / made)
            self.skipped[player] = skipped
        return found

    def from_pictures(self, seen: Mapping[str, float]) -> dict[str, Value]:
        """Colours, diversity and the gap of sampling as they are, quality over the best."""
        found = {name: Value(value) for name, value in seen.items() if name != "quality"}
        if (quality := seen.get("quality")) is not None:
            if self.best < math.inf and self.best > 0:
                found["quality"] = Value(quality / self.best)
            self.best = min(self.best, quality)
        return found

    def tell(self, step: int, name: str, value: Value, colour: Colour, advice: Advice | None) -> None:
        """Say when a reading turns, once it has had the same colour twice: single lines are noise."""
        settled, self.last[name] = self.last.get(name) == colour or colour == "red", colour
        before = self.told.get(name, "green")
        if not settled or before == colour:
            return
        self.told[name] = colour
        kind = gauge(name)
        if advice is None:
            self.say(f"update {step}: {called(kind, name)} is green again ({value.value:.3g})")
        else:
            self.say(
                f"update {step}: {called(kind, name)} is {colour} ({value.value:.3g}{where(kind, value)}): {advice.means}. "
                f"Try: {advice.remedy}."
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `recall` knows the rest from the metrics."""
        return {"readings": self.readings.state(), "skipped": self.skipped}

    def load_state(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        self.readings.load_state(state.get("readings", {}), device)
        self.skipped = dict(state.get("skipped", {}))

    def recall(self, metrics: Path) -> None:
        """Remember, from the lines of a run that goes on, what early gradients were and how good it has been."""
        self.norms, self.best = {}, math.inf
        if not metrics.is_file():
            return
        for line in metrics.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            for name, value in values.items():
                player, _, what = name.partition("/")
                early = self.norms.setdefault(player, []) if what == "gradient_norm" else None
                if early is not None and len(early) < EARLY + FIRST_LINES:
                    early.append(math.nan if value is None else value)
            if values.get("quality") is not None:
                self.best = min(self.best, values["quality"])


def called(kind: Gauge, name: str) -> str:
    _, _, player = name.partition("/")
    title = kind.title[0].lower() + kind.title[1:]
    return f"{title} of {player}" if player else title


def where(kind: Gauge, value: Value) -> str:
    """At which noise level a reading is worst, where it knows."""
    known = {level: one for level, one in enumerate(value.levels) if one is not None}
    if kind.name != "fake_score_error" or not known:
        return ""
    worst = max(known, key=lambda level: known[level])
    return f", at times from {worst / LEVELS:g} to {(worst + 1) / LEVELS:g}"


def from_losses(found: Mapping[str, Summary]) -> dict[str, Value]:
    """The readings of what losses have recorded."""
    values = {}
    if "pull" in found and found["pulled"].sum:
        values["pull"] = Value(found["pull"].sum / found["pulled"].sum)
    if "fake_error" in found:
        fake, teacher, gap, lag = (found[name] for name in ("fake_error", "teacher_error", "score_gap", "score_lag"))
        ratios = [share(fake.at(level, FEW), teacher.at(level, FEW)) for level in range(LEVELS)]
        if known := [each for each in ratios if each is not None]:
            values["fake_score_error"] = Value(max(known), levels=tuple(ratios))
        if gap.sum > 1e-6 * max(teacher.sum, 1e-12):
            levels = tuple(share(lag.at(level, FEW), gap.at(level, FEW)) for level in range(LEVELS))
            values["fake_score_lag"] = Value(lag.sum / gap.sum, lag.error / gap.sum, levels)
        if fake.count >= FEW * LEVELS:
            shares = tuple(count / fake.count for count in fake.counts)
            values["noise_levels"] = Value(min(shares), levels=shares)
    if "derivative" in found and found["derived"].sum:
        values["derivative"] = Value(found["derivative"].sum / found["derived"].sum)
    if "discriminator_real" in found:
        real, false = found["discriminator_real"], found["discriminator_fake"]
        if real.mean is not None and false.mean is not None:
            values["discriminator"] = Value((real.mean + false.mean) / 2, levels=accuracies(real, false))
    return values


def accuracies(real: Summary, fake: Summary) -> tuple[float | None, ...]:
    """By noise level, where it was recorded."""
    if len(real.counts) == 1 or len(fake.counts) == 1:
        return ()
    pairs = [(real.at(level), fake.at(level)) for level in range(LEVELS)]
    return tuple(None if a is None or b is None else (a + b) / 2 for a, b in pairs)


def share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


@torch.no_grad()
def sampled(parts: Sequence[Tensor]) -> list[Tensor]:
    """A copy of a few thousand elements of every matrix."""
    return [part.detach().reshape(-1)[:SAMPLED].float().clone() for part in parts if part.ndim > 1 and part.numel()]


def moved_and_size(
    before: Sequence[Tensor], parts: Sequence[Tensor], like: Tensor, copies: Sequence[int] = ()
) -> dict[str, Tensor]:
    """How far `parts` have moved since `sampled` gave `before`, and their size then, squared: scalars; 0 where no matrix is.

    Their means over the processes are in the proportion of the whole, where `copies` says how many processes hold each part.
    """
    if not before:
        return {"moved": torch.zeros_like(like), "size": torch.zeros_like(like)}
    shares = [1 / n for part, n in zip(parts, copies or [1] * len(parts), strict=True) if part.ndim > 1 and part.numel()]
    pairs = list(zip(sampled(parts), before, shares, strict=True))
    moved = torch.stack([share * (now - then).square().sum() for now, then, share in pairs]).sum()
    size = torch.stack([share * then.square().sum() for _, then, share in pairs]).sum()
    return {"moved": moved.to(like.device), "size": size.to(like.device)}


def with_update_sizes(values: dict[str, float]) -> dict[str, float]:
    """Means of a line with the size of an update in place of its two squares, which processes have averaged."""
    found = {}
    for name, value in values.items():
        player, _, what = name.partition("/")
        if what == "moved" and (size := values[f"{player}/size"]) > 0:
            found[f"{player}/update_size"] = (value / size) ** 0.5
        elif what not in ("moved", "size"):
            found[name] = value
    return found
