"""What a metric is, and the list of them. A new metric is one file in `fastgen/eval/measures/`, found by itself.

@metric("brightness", needs=("images",), readings={"brightness": Reading("Mean brightness", best="none")})
def brightness(evidence: Evidence) -> dict[str, Score]:
    each = torch.cat([batch.float().mean((1, 2, 3)) / 255 for batch in batches(evidence.images)])
    return {"brightness": Score.mean(each)}
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from torch import Tensor

from fastgen.data.toy.scenes import Scenes
from fastgen.eval.features import Embedded, embed
from fastgen.eval.images import Images
from fastgen.eval.moments import Moments
from fastgen.eval.statistics import Statistics
from fastgen.eval.world import World

Need = Literal["images", "prompts", "scenes", "reference", "teacher", "reference_or_statistics"]
ImageSet = Literal["images", "reference", "floor", "teacher"]


@dataclass(frozen=True)
class Score:
    """A number, and how far it can be trusted.

    `each` [N] holds the value of every image, where the score is their mean: it gives the confidence interval, and lets two
    candidates be compared image by image. `error` is the standard error of a score that is no mean, where it is known.
    """

    value: float
    each: Tensor | None = None
    error: float | None = None

    @classmethod
    def mean(cls, each: Tensor) -> Score:
        """The score that is the mean of `each` [N]."""
        return cls(each.double().mean().item(), each.detach().float().cpu())


@dataclass
class Evidence:
    """What metrics may look at. Image sets give uint8 [n, 3, H, W] for a slice (`fastgen.eval.images.Images`).

    `reference` holds real images; `floor` other real images, drawn like the reference, to see how far real is from real.
    Real images belong to the same prompts as the generated ones, in the same order, where `paired` is true. `teacher` holds the
    teacher's images of the same prompts from the same noise, in the same order. `statistics`, where there are some, take the
    reference's place in the Fréchet distance. Features are computed once and shared.
    """

    images: Images
    world: World
    prompts: Sequence[str] | None = None
    scenes: Scenes | None = None
    reference: Images | None = None
    floor: Images | None = None
    teacher: Images | None = None
    paired: bool = False
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    statistics: Statistics | None = None
    _features: dict[tuple[str, str], Embedded] = field(default_factory=dict, repr=False)

    @property
    def reference_or_statistics(self) -> Images | Statistics | None:
        """What the Fréchet distance is measured to."""
        return self.reference if self.statistics is None else self.statistics

    def features(self, which: ImageSet, extractor: str | None = None) -> dict[str, Tensor]:
        """Feature vectors [min(N, 10,000), D] of the first pictures of a set, float64 on the CPU
        (`fastgen.eval.features.ROWS`).

        `fid` are those for distances, `prc` for neighbourhoods. `extractor` names one that torch-fidelity knows; by default the
        world's. Raises UserError when one is not finite.
        """
        return {metric: rows.double() for metric, rows in self.embedded(which, extractor).rows.items()}

    def moments(self, which: ImageSet, extractor: str | None = None) -> Moments:
        """Mean and covariance of the `fid` features of all pictures of a set; arguments and errors as of `features`."""
        return self.embedded(which, extractor).moments

    def embedded(self, which: ImageSet, extractor: str | None = None) -> Embedded:
        """What one pass over a set keeps of its features; made once."""
        world = self.world
        if extractor not in (None, world.features):
            world = replace(world, features=extractor, features_weights=None)
        key = (which, world.features)
        if key not in self._features:
            self._features[key] = embed(getattr(self, which), world, device=self.device, name=which)
        return self._features[key]

    def provide(self, which: ImageSet, embedded: Embedded) -> None:
        """Features of the world's extractor that were computed elsewhere."""
        self._features[which, self.world.features] = embedded

    def known(self, which: ImageSet) -> Embedded | None:
        """The features of the world's extractor, if they were computed already."""
        return self._features.get((which, self.world.features))

    def share(self, other: Evidence, sets: Sequence[ImageSet]) -> None:
        """Take over the features that `other` has computed of sets that are the same here."""
        self._features |= {key: found for key, found in other._features.items() if key[0] in sets}

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
    """A named function from evidence to scores, what it needs, how its numbers are shown, and where it is used.

    `worlds` names the worlds whose pictures it can measure; what is not `usual` is measured only when asked for by name.
    `version` is raised whenever the same pictures would give other numbers. `networks` gives the SHA-256 of every file of
    weights it looks through, by name (None: unknown), besides the world's own features and CLIP; records hold both.
    """

    name: str
    needs: tuple[Need, ...]
    readings: dict[str, Reading]
    compute: Callable[[Evidence], Mapping[str, float | Score]]
    worlds: tuple[str, ...] = ("toy", "photo")
    usual: bool = True
    version: int = 1
    networks: Callable[[World], Mapping[str, str | None]] | None = None

    def missing(self, evidence: Evidence) -> list[str]:
        """Which needs the evidence does not meet."""
        return [need for need in self.needs if getattr(evidence, need) is None]

    def measure(self, evidence: Evidence) -> dict[str, Score]:
        """The scores by key."""
        found = self.compute(evidence)
        return {key: value if isinstance(value, Score) else Score(float(value)) for key, value in found.items()}


_REGISTRY: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    needs: tuple[Need, ...],
    readings: dict[str, Reading],
    worlds: tuple[str, ...] = ("toy", "photo"),
    usual: bool = True,
    version: int = 1,
    networks: Callable[[World], Mapping[str, str | None]] | None = None,
) -> Callable:
    """Register a function as a metric. Raises ValueError when the name or one of its keys is taken."""

    def register(compute: Callable[[Evidence], Mapping[str, float | Score]]) -> Callable:
        taken = {key for other in _REGISTRY.values() for key in other.readings}
        if name in _REGISTRY or taken & readings.keys():
            raise ValueError(f"metric {name!r} or one of its keys {sorted(taken & readings.keys())} is registered already")
        _REGISTRY[name] = Metric(name, needs, readings, compute, worlds, usual, version, networks)
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
