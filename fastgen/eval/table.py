"""The rows of a sweep as text: in order, as curves, as a table for Markdown and for the terminal, and in sentences."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastgen.eval.features import shown_label
from fastgen.eval.registry import Reading, readings
from fastgen.eval.results import Row

COLUMNS = (
    *("fd", "fd_teacher", "patch_fd", "kd", "cmmd", "inception_score", "precision", "recall", "clip_score"),
    *("hps", "pick_score", "image_reward", "aesthetic", "geneval_compatible"),
    *("accuracy", "diversity_ratio", "diversity_teacher_ratio", "teacher_distance"),
)
"""The scores that tables show, where there are any; everything else is in the JSON."""

SHORT = {
    **{"fd": "FD ↓", "fd_teacher": "FD-T ↓", "patch_fd": "pFD ↓", "kd": "KD ↓", "cmmd": "CMMD ↓", "inception_score": "IS ↑"},
    **{"precision": "Prec ↑", "recall": "Rec ↑", "clip_score": "CLIP ↑", "hps": "HPS ↑", "pick_score": "Pick ↑"},
    **{"image_reward": "IR ↑", "aesthetic": "Aes ↑", "geneval_compatible": "GenEval ↑", "accuracy": "Right ↑"},
    **{
        "accuracy_two": "2 obj ↑",
        "diversity_ratio": "Div ↑",
        "diversity_teacher_ratio": "Div/T ↑",
        "teacher_distance": "Dist-T ↓",
    },
}
NARROW = ("fd", "precision", "clip_score", "accuracy", "diversity_ratio")
"""Scores for a narrow terminal."""
USUAL = (*NARROW, "fd_teacher", "kd", "recall", "diversity_teacher_ratio", "hps", "pick_score", "image_reward")
"""Scores for a terminal of ordinary width."""

Cost = Literal["steps", "calls", "seconds"]


@dataclass(frozen=True)
class Series:
    """One curve: the rows of one name and guidance, by rising cost."""

    label: str
    role: Literal["teacher", "student"]
    rows: tuple[Row, ...]


def curves(rows: Iterable[Row]) -> list[Series]:
    """Teachers, then students; a name that was tried at several guidance scales is several curves."""
    measured = sorted((row for row in rows if row.role != "real"), key=lambda row: row.role != "teacher")
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in measured:
        several = any(
            a.guidance != b.guidance for a in measured for b in measured if a.name == b.name == row.name and a.steps == b.steps
        )
        found.setdefault((row.name, row.guidance if several else None), []).append(row)
    made = []
    for (name, guidance), group in found.items():
        label = name if guidance is None else f"{name}, guidance {guidance:g}"
        group.sort(key=lambda row: (row.calls, row.steps))
        made.append(Series(label, "teacher" if group[0].role == "teacher" else "student", tuple(group)))
    return made


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Teachers before students, most steps first, the floor at the end."""
    return [row for curve in curves(rows) for row in reversed(curve.rows)] + [row for row in rows if row.role == "real"]


def floor(rows: Iterable[Row]) -> Row | None:
    """The row of real images against real ones, if it was measured."""
    return next((row for row in rows if row.role == "real"), None)


def reading(key: str) -> Reading:
    """How to show a score."""
    return readings().get(key, Reading(key, "none"))


def title(key: str, rows: Iterable[Row]) -> str:
    """What a score of these rows is called."""
    return shown_label(reading(key).label, next((row.features for row in rows if row.features), ""))


def columns(rows: Iterable[Row]) -> list[str]:
    """Which of `COLUMNS` the rows have."""
    present = {key for row in rows for key in row.scores}
    return [key for key in COLUMNS if key in present]


def best(rows: Iterable[Row], key: str) -> Row | None:
    """The row with the best score of all that are not real."""
    candidates = [row for row in rows if row.role != "real" and key in row.scores]
    way = reading(key).best
    if not candidates or way == "none":
        return None
    return (min if way == "low" else max)(candidates, key=lambda row: row.scores[key])


def front(rows: Iterable[Row], cost: Cost, key: str) -> list[Row]:
    """The Pareto front: rows than which none is both as cheap and better, cheapest first."""
    sign = 1 if reading(key).best == "low" else -1
    scored = [row for row in rows if row.role != "real" and key in row.scores]
    chosen: list[Row] = []
    for row in sorted(scored, key=lambda row: (getattr(row, cost), sign * row.scores[key])):
        if not chosen or sign * row.scores[key] < sign * chosen[-1].scores[key]:
            chosen.append(row)
    return chosen


def number(value: float) -> str:
    """Three or four digits, never an exponent."""
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"


def scored(row: Row, key: str) -> str:
    """A score with half the width of its 95 % interval, where that is known; nothing where the row has none."""
    if key not in row.scores:
        return ""
    low, high = row.intervals.get(key, (0.0, 0.0))
    told = number(row.scores[key])
    decimals = len(told.partition(".")[2])
    return f"{told} ± {(high - low) / 2:.{decimals}f}" if high > low else told


def _cells(row: Row, keys: Sequence[str], *, bare: bool = False) -> list[str]:
    scores = [scored(row, key).split(" ± ")[0] if bare else scored(row, key) for key in keys]
    if row.role == "real":
        return [row.name, "", "", "", "", *scores]
    guidance = "" if row.guidance is None else "off" if row.guidance == 1 else f"{row.guidance:g}"
    return [row.name, str(row.steps), guidance, f"{row.calls:g}", duration(row.seconds), *scores]


def header(rows: Sequence[Row]) -> list[str]:
    """The column titles of `cells`; an arrow says which way is better."""
    arrows = {"low": " ↓", "high": " ↑", "none": ""}
    scores = [title(key, rows) + arrows[reading(key).best] for key in columns(rows)]
    return ["Candidate", "Steps", "Guidance", "Network calls", "Time per image", *scores]


def cells(rows: Sequence[Row]) -> list[tuple[Row, list[str]]]:
    """Every row with its cells, in order; scores with half the width of their intervals."""
    keys = columns(rows)
    return [(row, _cells(row, keys)) for row in ordered(rows)]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of every row; the best score of each column is bold."""
    keys, titles = columns(rows), header(rows)
    tops = {key: best(rows, key) for key in keys}
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join([" --- ", *[" ---: "] * (len(titles) - 1)]) + "|"]
    for row, texts in cells(rows):
        plain, scores = texts[: -len(keys) or None], texts[-len(keys) :] if keys else []
        shown = [f"**{text}**" if tops[key] is row else text for key, text in zip(keys, scores, strict=True)]
        lines.append("| " + " | ".join([each.replace("|", "\\|") for each in plain] + shown) + " |")
    return "\n".join(lines) + "\n"


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Every row in the terminal, with as many of the scores as fit."""
    console = console or Console()
    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    wide = console.width >= 110
    keys = [key for key in columns(rows) if key in (USUAL if wide else NARROW)]
    labels = {id(row): curve.label for curve in curves(rows) for row in curve.rows}
    for i, title in enumerate(["Candidate", "Steps", "Guidance", "Calls", "Time", *(SHORT[key] for key in keys)]):
        if wide or title != "Guidance":
            shown.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in ordered(rows):
        texts = _cells(row, keys, bare=True)
        shown.add_row(
            *(texts if wide else [labels.get(id(row), row.name), texts[1], *texts[3:]]),
            style={"student": "bold", "real": "dim"}.get(row.role, ""),
        )
    console.print(shown)


def terminal(rows: Sequence[Row]) -> str:
    """`print_table` as text, as wide as the terminal is."""
    console = Console(file=io.StringIO(), width=max(80, shutil.get_terminal_size((120, 40)).columns))
    print_table(rows, console)
    return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def summary(rows: Sequence[Row]) -> list[str]:
    """What the rows say, in sentences, the most telling one first; of several students their cheapest rows alone."""
    made = curves(rows)
    teachers = [curve for curve in made if curve.role == "teacher"]
    students = [curve for curve in made if curve.role == "student"]
    sentences: list[str] = []
    for curve in students:
        for row in curve.rows if len(students) == 1 else curve.rows[:1]:
            sentences += _against_teacher(row, teachers, floor(rows))
    for curve in students:
        sentences += _against_best_teacher(curve.rows[0], teachers)
    if not sentences and (top := best(rows, "fd") or best(rows, "accuracy")):
        key = "fd" if "fd" in top.scores else "accuracy"
        sentences.append(f"{title(key, [top])} is best for {top.label}: {number(top.scores[key])}.")
    return sentences or [f"{len(rows)} rows were measured."]


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number != 1)}"


def _called(row: Row) -> str:
    return f"the {row.name}" if row.name == row.role else row.name


def _against_teacher(row: Row, teachers: Sequence[Series], real: Row | None) -> list[str]:
    """The Fréchet distance at the same number of steps."""
    same = [other for curve in teachers for other in curve.rows if other.steps == row.steps and "fd" in other.scores]
    if not same or "fd" not in row.scores:
        return []
    theirs, ours = min(other.scores["fd"] for other in same), row.scores["fd"]
    ground = f"; real against real {number(real.scores['fd'])}" if real is not None and "fd" in real.scores else ""
    values = f"{number(ours)} against {number(theirs)}{ground}"
    what = title("fd", [row])
    return [f"At {_steps(row.steps)} the {what} of {_called(row)} is {ours / theirs:.2f}x the teacher's ({values})."]


def _against_best_teacher(row: Row, teachers: Sequence[Series]) -> list[str]:
    """Accuracy (or CLIP score) and cost of the cheapest row, next to the teacher at its most steps."""
    top = max((other for curve in teachers for other in curve.rows), key=lambda other: other.steps, default=None)
    if top is None:
        return []
    cost = f"with {row.calls:g} network call{'s' * (row.calls != 1)} instead of {top.calls:g}"
    if row.seconds and top.seconds:
        cost += f" and {duration(row.seconds)} instead of {duration(top.seconds)} an image"
    for key, words in (("accuracy", "strict accuracy"), ("clip_score", "CLIP score")):
        if top.scores.get(key) and key in row.scores:
            share = row.scores[key] / top.scores[key]
            name = _called(row)
            name = name[0].upper() + name[1:] if row.name == row.role else name
            return [f"{name} keeps {share:.0%} of the {words} that the teacher has at {_steps(top.steps)}, {cost}."]
    return []
