"""Is B better than A? Paired by prompt and seed, with intervals, p values, and a sentence for each metric.

Of metrics that are means over images: the mean difference, its bootstrap interval over prompts (images of a prompt are alike),
and the p value of a sign-flip test, exact for few prompts (Fisher 1935: were A and B alike, each prompt's difference could as
well have had the other sign). Of the Fréchet distance: both sets' influence functions (`fastgen.eval.frechet`) are paired, so
that what both share cancels; a normal approximation. The p values are corrected for looking at several metrics (Holm 1979).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.evaluation import values_file
from fastgen.eval.features import Embedded
from fastgen.eval.frechet import FrechetTo, standard_error
from fastgen.eval.gathering import load_embedded
from fastgen.eval.intervals import LEVEL, resampled_means
from fastgen.eval.protocol import require_same
from fastgen.eval.results import Results, Row, load_json, load_results
from fastgen.eval.table import number, reading

SIGNIFICANT = 1 - LEVEL
FLIPS = 10_000
"""Random sign flips; with fewer possible ones than that, all of them."""


@dataclass(frozen=True)
class Subject:
    """One side of a comparison: a row of a sweep, or an evaluation. `values` [N] belong to `prompts` and `seeds`."""

    name: str
    protocol: dict[str, Any]
    scores: dict[str, float]
    prompts: list[str]
    seeds: list[int]
    values: dict[str, Tensor]
    features: Embedded | None = None
    reference: Embedded | None = None


@dataclass(frozen=True)
class Verdict:
    """What the data say of one score: B minus A, its 95 % interval, p value and the same after Holm's correction."""

    key: str
    label: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    corrected: float = math.nan
    sentence: str = ""

    @property
    def seen(self) -> bool:
        """Whether a difference can be seen, all metrics that were looked at considered."""
        return self.corrected < SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """All verdicts, on how many images of how many prompts, and what could not be tested."""

    a: str
    b: str
    images: int
    prompts: int
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_subject(text: str, *, sweep: str | None = None) -> tuple[Subject, str | None]:
    """What `text` names, and the sweep's folder, if it is of one.

    A record of `fastgen eval` (a JSON file, or the folder of its images), or a row of a sweep: FOLDER::NAME/STEPS or
    FOLDER::NAME/STEPS/GUIDANCE; without the folder it is `sweep`. Raises UserError for what is neither.
    """
    folder, found, row = text.rpartition("::")
    path = Path(folder or sweep or "") if found else Path(text)
    if found and not (folder or sweep):
        raise UserError(f"{text}: names a row, but no sweep; write FOLDER::NAME/STEPS")
    if (path / "results.json").is_file():
        return _row_subject(load_results(path), row if found else None), str(path)
    if found:
        raise UserError(f"{path} is not a sweep: it has no results.json")
    record = path / "evaluation.json" if path.is_dir() else path
    if not record.is_file():
        raise UserError(f"{path}: is neither a sweep, nor a record of `fastgen eval`, nor a folder of pictures that it kept")
    return _evaluation_subject(record), None


def _row_subject(results: Results, wanted: str | None) -> Subject:
    rows = [row for row in results.rows if row.role != "real"]
    chosen = [row for row in rows if wanted is None or wanted in _names(row)]
    if len(chosen) != 1:
        names = ", ".join(f"::{_names(row)[0]}" for row in rows)
        what = "which row is meant?" if wanted is None else f"{len(chosen) or 'no'} rows are called {wanted!r};"
        raise UserError(f"{results.folder}: {what} there are {names}")
    row = chosen[0]
    return Subject(
        row.key, results.protocol_of(row), row.scores, results.prompts, results.seeds, results.values(row),
        load_embedded(results.file("features", row)), load_embedded(results.reference),
    )  # fmt: skip


def _names(row: Row) -> list[str]:
    """How a row may be named, the most exact name first."""
    plain = f"{row.name}/{row.steps}"
    return [*([] if row.guidance is None else [f"{plain}/{row.guidance:g}"]), plain, row.key, row.label]


def _evaluation_subject(path: Path) -> Subject:
    record, values = load_json(path), values_file(path)
    if "protocol" not in record or "scores" not in record:
        raise UserError(f"{path} is not a record of `fastgen eval`: it has no protocol; evaluate again")
    try:
        with safe_open(str(values), "pt") as file:
            asked = {key: json.loads(file.metadata()[key]) for key in ("prompts", "seeds")}
            each = {key: file.get_tensor(key) for key in file.keys() if key != "none"}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{values}, which holds the values of single images, cannot be read: {error}; evaluate again"
        ) from error
    return Subject(str(path), record["protocol"], record["scores"], asked["prompts"], asked["seeds"], each)


def compare(a: Subject, b: Subject, *, ignore: Sequence[str] = (), only: Sequence[str] | None = None) -> Comparison:
    """Every score that both have, B against A; what divides another score up only where `only` names it, among other keys.

    Raises UserError where the protocols differ, naming the field, unless it is in `ignore`; where no image has a partner; and
    for a key in `only` that cannot be tested.
    """
    require_same(a.protocol, b.protocol, ignore=("teacher", *ignore))  # what is measured against it is left out below
    pairs = _pairs(a, b)
    prompts = [a.prompts[i] for i, _ in pairs]
    made = Comparison(a.name, b.name, len(pairs), len(set(prompts)))
    teachers = [each.protocol.get("teacher") for each in (a, b)]
    keys = [key for key in a.scores if key in b.scores and reading(key).best != "none"]
    keys = [key for key in keys if (key in only if only is not None else not _is_part(key, keys))]
    untested = []
    for key in keys:
        if teachers[0] != teachers[1] and "teacher" in key:
            untested.append(key)
        elif key in a.values and key in b.values:
            first, second = (each.values[key].double()[[p[side] for p in pairs]] for side, each in ((0, a), (1, b)))
            made.verdicts.append(mean_verdict(key, first, second, prompts))
        elif key == "fd" and (verdict := frechet_verdict(a, b)) is not None:
            made.verdicts.append(verdict)
        else:
            untested.append(key)
    if only is not None and (missing := [key for key in only if key not in {each.key for each in made.verdicts}]):
        can = ", ".join(verdict.key for verdict in made.verdicts) or "nothing"
        raise UserError(f"{missing[0]} cannot be tested between these two; of what was asked for, {can} can")
    if untested:
        told = ", ".join(f"{reading(key).label} ({number(a.scores[key])} and {number(b.scores[key])})" for key in untested)
        made.notes.append(f"Not tested, since no value of a single image belongs to them: {told}.")
    made.verdicts[:] = _told(made.verdicts, made.images)
    return made


def _is_part(key: str, keys: Sequence[str]) -> bool:
    """Whether a score divides another one up: strict accuracy by colour, by shape, ..."""
    return any(key.startswith(f"{other}_") for other in keys)


def _pairs(a: Subject, b: Subject) -> list[tuple[int, int]]:
    """Rows of a and b with the same prompt and seed."""
    place = {asked: i for i, asked in enumerate(zip(b.prompts, b.seeds, strict=True))}
    asked = enumerate(zip(a.prompts, a.seeds, strict=True))
    pairs = [(i, place[one]) for i, one in asked if one in place]
    if len({a.prompts[i] for i, _ in pairs}) < 2:
        raise UserError(f"{a.name} and {b.name} share the pictures of fewer than two prompts; nothing can be told from that")
    return pairs


def mean_verdict(key: str, a: Tensor, b: Tensor, prompts: Sequence[str]) -> Verdict:
    """Of a score that is the mean of values [N], paired: b minus a."""
    difference = b.double() - a.double()
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.double)
    low, high = torch.quantile(resampled_means(difference, prompts), ends).tolist()
    middle = difference.mean().item()
    return Verdict(key, reading(key).label, a.mean().item(), b.mean().item(), middle, low, high, sign_flip(difference, prompts))


def sign_flip(difference: Tensor, prompts: Sequence[str], *, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p value that paired differences [N] have mean 0: how often flipped signs of whole prompts give as much."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([place[prompt] for prompt in prompts])
    sums = torch.zeros(len(place), dtype=torch.double).index_add_(0, group, difference.double())
    observed = sums.sum().abs() * (1 - 1e-12)
    if 2 ** len(sums) <= flips:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(sums))), dtype=torch.double)
        return ((signs @ sums).abs() >= observed).double().mean().item()
    generator = torch.Generator().manual_seed(seed)
    found = 0
    for _ in range(0, flips, 100):  # a hundred at a time: there may be many prompts
        signs = torch.randint(0, 2, (100, len(sums)), generator=generator).double() * 2 - 1
        found += int(((signs @ sums).abs() >= observed).sum())
    return (1 + found) / (1 + flips)


def frechet_verdict(a: Subject, b: Subject) -> Verdict | None:
    """Of the Fréchet distance, where both have kept their features and those of one reference; None otherwise."""
    if a.features is None or b.features is None or a.reference is None or b.reference is None:
        return None
    if (a.prompts, a.seeds) != (b.prompts, b.seeds) or not torch.equal(a.reference.moments.mean, b.reference.moments.mean):
        return None
    goal = FrechetTo(a.reference.moments)
    values, influences = [], []
    for side in (a.features, b.features):
        found = goal.compare(side.moments)
        values.append(found.value)
        influences.append(found.influence(side.rows["fid"], side.moments.mean))
    moved = influences[1] - influences[0]
    error = standard_error(moved, a.features.moments.count, a.prompts[: len(moved)])
    difference = values[1] - values[0]
    if error is None:
        return None
    normal = torch.distributions.Normal(0.0, 1.0)
    width = normal.icdf(torch.tensor((1 + LEVEL) / 2)).item() * error
    p = 2 * (1 - normal.cdf(torch.tensor(abs(difference) / error, dtype=torch.double)).item()) if error > 0 else 1.0
    return Verdict("fd", reading("fd").label, values[0], values[1], difference, difference - width, difference + width, p)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected by Holm's step-down procedure, in the order given."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected


def _told(verdicts: Sequence[Verdict], images: int) -> list[Verdict]:
    made = []
    for verdict, corrected in zip(verdicts, holm([each.p for each in verdicts]), strict=True):
        whole = Verdict(**{**vars(verdict), "corrected": corrected})
        made.append(Verdict(**{**vars(whole), "sentence": _sentence(whole, images)}))
    return made


def _sentence(verdict: Verdict, images: int) -> str:
    name, low, high = verdict.label, *sorted((verdict.low, verdict.high))
    if verdict.seen:
        up = verdict.difference > 0
        better = "better" if (reading(verdict.key).best == "high") == up else "worse"
        ends = (low, high) if up else (-high, -low)
        size = f"{number(abs(verdict.difference))} (95 %: {number(ends[0])} to {number(ends[1])})"
        return f"B's {name} is {'higher' if up else 'lower'} by {size}: B is {better}."
    if verdict.difference == 0 and low == high:
        return f"{name} is the same for both in every image."
    if verdict.p < SIGNIFICANT:
        return f"{name} may differ by chance: p is {verdict.p:.2g}, but {verdict.corrected:.2g} with all scores looked at."
    bound = number((high - low) / 2)
    return f"No difference in {name} can be seen at {images} images: it would have had to be larger than {bound}."
