"""GenEval without its detector: what its prompts ask for, its rules of right and wrong, and its layout of images on disk.

Ghosh et al. 2023 (arXiv:2310.11513). Its prompts come from a small grammar, so what must be seen is read back from the prompt.
The rules are those of its `evaluate_images.py`: objects above a confidence of 0.3 (0.9 for counting), at most 16 of a class,
the most confident first; colours and positions are asked of the most confident ones only. `write_geneval` writes images so that
the official scorer can be run on them, which alone gives a GenEval score.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.images import Images, to_pillow

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant"),
    *("stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra"),
    *("giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite"),
    *("baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork"),
    *("knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut"),
    *("cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
    *("scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""The classes of COCO in their order, under GenEval's names."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PLURALS = {name + ("es" if name.endswith("s") else "s"): name for name in CLASSES}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
POSITIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST_OBJECTS = 16
POSITION_MARGIN = 0.1
"""Part of both objects' sizes by which their centres must be apart."""


@dataclass(frozen=True)
class Detection:
    """An object seen: its box (left, top, right, bottom) in pixels, the detector's confidence, and its mask, boolean [H, W]."""

    box: tuple[float, float, float, float]
    confidence: float
    mask: Tensor | None = None


Colours = Callable[[Sequence[Detection], str], list[str]]
"""The colour of each of some objects of a class."""


@cache
def _grammar() -> dict[str, re.Pattern[str]]:
    """A pattern for the prompts of each task."""
    name, colour, place, number, plural = ("|".join(words) for words in (CLASSES, COLOURS, POSITIONS, NUMBERS[2:], PLURALS))
    thing, other = f"an? (?P<a>{name})", f"an? (?P<b>{name})"
    coloured, others = f"an? (?P<c>{colour}) (?P<a>{name})", f"an? (?P<d>{colour}) (?P<b>{name})"
    patterns = {
        "single_object": thing,
        "two_object": f"{thing} and {other}",
        "counting": f"(?P<n>{number}) (?P<a>{plural})",
        "colors": coloured,
        "position": f"{thing} (?P<p>{place}) {other}",
        "color_attr": f"{coloured} and {others}",
    }
    return {task: re.compile(f"a photo of {pattern}") for task, pattern in patterns.items()}


def requirements(prompt: str) -> dict[str, Any] | None:
    """What a prompt of GenEval's asks for, as the line of its `evaluation_metadata.jsonl`; None for any other prompt."""
    for task in TASKS:
        if match := _grammar()[task].fullmatch(prompt.strip()):
            break
    else:
        return None
    found = match.groupdict()
    first = {"class": found["a"], "count": 1}
    include, exclude = [first], []
    if task == "counting":
        singular, number = PLURALS[found["a"]], NUMBERS.index(found["n"])
        include, exclude = [{"class": singular, "count": number}], [{"class": singular, "count": number + 1}]
    if task in ("colors", "color_attr"):
        first["color"] = found["c"]
    if task in ("two_object", "color_attr"):
        include.append({"class": found["b"], "count": 1} | ({"color": found["d"]} if task == "color_attr" else {}))
    if task == "position":
        include = [{"class": found["b"], "count": 1}, first | {"position": [found["p"], 0]}]
    return {"tag": task, "include": include} | ({"exclude": exclude} if exclude else {}) | {"prompt": prompt.strip()}


def kept(objects: Mapping[str, Sequence[Detection]], task: str) -> dict[str, list[Detection]]:
    """The detections by class that count: above the task's confidence, the most confident first, at most 16 of a class."""
    least = COUNTING_CONFIDENCE if task == "counting" else CONFIDENCE
    chosen = {name: [one for one in found if one.confidence > least] for name, found in objects.items()}
    ranked = {name: sorted(found, key=lambda one: -one.confidence)[:MOST_OBJECTS] for name, found in chosen.items()}
    return {name: found for name, found in ranked.items() if found}


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is as seen from `b`: up to two of `POSITIONS`; none where their centres are too near for their sizes."""
    offset, reduced = [], []
    for low in (0, 1):
        ends_a, ends_b = (a.box[low], a.box[low + 2]), (b.box[low], b.box[low + 2])
        apart = (sum(ends_a) - sum(ends_b)) / 2
        margin = POSITION_MARGIN * (abs(ends_a[1] - ends_a[0]) + abs(ends_b[1] - ends_b[0]))
        offset.append(apart)
        reduced.append(max(abs(apart) - margin, 0) * (1 if apart > 0 else -1))
    if max(map(abs, reduced)) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    across, down = (part / length for part in reduced)
    said = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in said.items() if true}


def judge(wanted: Mapping[str, Any], objects: Mapping[str, Sequence[Detection]], colours: Colours) -> tuple[bool, str]:
    """Is everything `wanted` (a line of metadata) among the kept objects of an image, and nothing too much? If not, why."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in wanted["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        wrong = _clause(clause, found, groups, colours)
        groups.append(None if wrong else found)
        reasons += wrong
    for clause in wanted.get("exclude", []):
        seen = len(objects.get(clause["class"], []))
        if seen >= clause["count"]:
            reasons.append(f"fewer than {clause['count']} {clause['class']} expected, {seen} found")
    return not reasons, "; ".join(reasons)


def _clause(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colours: Colours,
) -> list[str]:
    """What is wrong with the objects of one clause; `groups` are those of the clauses before it, None where one failed."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return [f"{count} {name} expected, {len(found)} found"]
    if "color" in clause:
        seen = Counter(colours(found, name))
        if seen[clause["color"]] < count:
            return [f"{count} {clause['color']} {name} expected, found {', '.join(f'{n} {c}' for c, n in seen.items())}"]
    if "position" in clause:
        place, target = clause["position"]
        others = groups[target]
        if others is None:
            return [f"nothing there for {name} to be {place}"]
        for one in found:
            for other in others:
                if place not in (seen_at := relations(one, other)):
                    return [f"{name} expected {place} its target, found {' and '.join(sorted(seen_at)) or 'neither side'}"]
    return []


def write_geneval(
    images: Images, prompts: Sequence[str], folder: Path | str, *, records: Sequence[Mapping[str, Any]] | None = None
) -> int:
    """Write images as GenEval's own generation script does: `00000/metadata.jsonl`, `00000/samples/00000.png`, ...

    `prompts` [N] names the prompt of each image; its images become the samples of one folder. `records` are the lines of
    `evaluation_metadata.jsonl`, whose order numbers the folders (of a prompt set read from it: `extra | {"prompt": ...}`);
    without them the prompts are read (`requirements`) and numbered as they come. Returns the number of folders.

    Then the official scorer: `python evaluation/evaluate_images.py FOLDER --outfile results.jsonl --model-path MODELS`, and
    `python evaluation/summary_scores.py results.jsonl`.

    Raises UserError for a folder that holds something already, and for prompts that are not in the records or not GenEval's.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already, which the scorer would count; name a new folder")
    if len(prompts) != len(images):
        raise UserError(f"there are {len(prompts)} prompts for {len(images)} images; give one for each")
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    if records is None:
        read = {prompt: requirements(prompt) for prompt in rows}
        known = {prompt: (i, record) for i, (prompt, record) in enumerate(read.items()) if record is not None}
    else:
        known = {record["prompt"]: (i, dict(record)) for i, record in enumerate(records)}
    if strangers := [prompt for prompt in rows if prompt not in known]:
        raise UserError(f"{len(strangers)} prompts are not GenEval's, the first is {strangers[0]!r}")
    for prompt, chosen in rows.items():
        number, record = known[prompt]
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        for sample, row in enumerate(chosen):
            path = samples / f"{sample:05d}.png"
            to_pillow(images[row : row + 1])[0].save(path.with_suffix(".tmp"), format="PNG")
            path.with_suffix(".tmp").replace(path)
        temporary = samples.parent / "metadata.tmp"
        temporary.write_text(json.dumps(record))
        temporary.replace(samples.parent / "metadata.jsonl")
    return len(rows)
