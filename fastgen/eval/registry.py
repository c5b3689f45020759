"""What a metric is, and the list of them. A new metric is one file in `fastgen/eval/measures/`, found by itself.

@metric("brightness", needs=("images",), readings={"brightness": Reading("Mean brightness", best="none")})
def brightness(evidence: Evidence) -> dict[str, float]:
    return {"brightness": evidence.images.float().mean().item() / 255}
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from torch import Tensor

from fastgen.data.toy.scenes import Scenes
from fastgen.eval.features import extract
from fastgen.eval.world import World

Need = Literal["images", "prompts", "scenes", "reference"]


@dataclass
class Evidence:
    """What metrics may look at. Image sets are uint8 [N, 3, H, W]; features are computed once and shared.

    `reference` holds real images; `floor` other real images, drawn like the reference, to see how far real is from real.
    Real images belong to the same prompts as the generated ones, in the same order, where `paired` is true.
    """

    images: Tensor
    world: World
    prompts: Sequence[str] | None = None
    scenes: Scenes | None = None
    reference: Tensor | None = None
    floor: Tensor | None = None
    paired: bool = False
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    _features: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def features(self, which: Literal["images", "reference", "floor"]) -> dict[str, Tensor]:
        """Feature vectors [N, D] of one of the image sets, float64 on the CPU: `fid` for distances, `prc` for neighbourhoods.

        Raises UserError when any is not finite.
        """
        if which not in self._features:
            images = getattr(self, which)
            self._features[which] = extract(images, self.world, device=self.device, name=which)
        return self._features[which]

    def note(self, sentence: str) -> None:
        """Keep a sentence for the reader of the result; the same one only once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


@dataclass(frozen=True)
class Reading:
    """How to show one number: a label, and which way is better."""

    label: str
    best: Literal["low", "high", "none"]


@dataclass(frozen=True)
class Metric:
    """A named function from evidence to numbers, what it needs, and how its numbers are shown."""

    name: str
    needs: tuple[Need, ...]
    readings: dict[str, Reading]
    compute: Callable[[Evidence], dict[str, float]]

    def missing(self, evidence: Evidence) -> list[str]:
        """Which needs the evidence does not meet."""
        return [need for need in self.needs if getattr(evidence, need) is None]


_REGISTRY: dict[str, Metric] = {}


def metric(name: str, *, needs: tuple[Need, ...], readings: dict[str, Reading]) -> Callable:
    """Register a function as a metric. Raises ValueError when the name or one of its keys is taken."""

    def register(compute: Callable[[Evidence], dict[str, float]]) -> Callable[[Evidence], dict[str, float]]:
        taken = {key for other in _REGISTRY.values() for key in other.readings}
        if name in _REGISTRY or taken & readings.keys():
            raise ValueError(f"metric {name!r} or one of its keys {sorted(taken & readings.keys())} is registered already")
        _REGISTRY[name] = Metric(name, needs, readings, compute)
        return compute

    return register


@cache
def _discover() -> None:
    package = importlib.import_module("fastgen.eval.measures")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def metrics() -> dict[str, Metric]:
    """Every metric by name."""
    _discover()
    return dict(_REGISTRY)


def readings() -> dict[str, Reading]:
    """How to show every key that may occur among the scores."""
    return {key: reading for entry in metrics().values() for key, reading in entry.readings.items()}
