"""The rows of a sweep as text to paste elsewhere: LaTeX for a paper, CSV for a spreadsheet (Markdown is in `table`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fastgen.eval.results import Row
from fastgen.eval.table import best, cells, columns, ordered, reading, title

SPECIAL = {"\\": r"\textbackslash{}", **{mark: "\\" + mark for mark in "&%$#_{}"}, "~": r"\textasciitilde{}"}
SPECIAL |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "é": r"\'e"}
ARROWS = {"low": r" $\downarrow$", "high": r" $\uparrow$", "none": ""}


def escaped(text: str) -> str:
    """Text as LaTeX writes it."""
    return "".join(SPECIAL.get(mark, mark) for mark in text)


def latex(rows: Sequence[Row]) -> str:
    """A table with booktabs' rules; the best score of each column is bold."""
    keys = columns(rows)
    tops = {key: best(rows, key) for key in keys}
    titles = ["Candidate", "Steps", "Guidance", "Calls", "Time"]
    heads = [*titles, *(escaped(title(key, rows)) + ARROWS[reading(key).best] for key in keys)]
    lines = [r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}", r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
    for row, texts in cells(rows):
        shown = [escaped(text) for text in texts]
        for place, key in enumerate(keys, len(titles)):
            if tops[key] is row:
                shown[place] = rf"\textbf{{{shown[place]}}}"
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """Every number of every row, unrounded, with the ends of its 95 % interval where it is known."""
    keys = list(dict.fromkeys(key for row in rows for key in row.scores))
    known = {key for row in rows for key in row.intervals}
    heads = [column for key in keys for column in ([key, f"{key}_low", f"{key}_high"] if key in known else [key])]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["candidate", "role", "steps", "guidance", "network_calls", "seconds", *heads])
    for row in ordered(rows):
        found: list[float | str] = []
        for key in keys:
            found.append(row.scores.get(key, ""))
            if key in known:
                found += row.intervals.get(key, ("", ""))
        scale = "" if row.guidance is None else row.guidance
        writer.writerow([row.name, row.role, row.steps, scale, row.calls, row.seconds, *found])
    return buffer.getvalue()
