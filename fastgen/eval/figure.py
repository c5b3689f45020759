"""The trade-off figure: quality against cost, drawn by matplotlib, as the PNG of a README and as the panels of a report."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.results import Results, Row
from fastgen.eval.table import Cost, Series, curves, floor, front, number, reading, title

LEGEND = "In the markers: steps. Ringed: nothing cheaper is better (the Pareto front). Bars: 95 % intervals."
Points: TypeAlias = list[tuple[float, float]]
COST_LABELS: dict[Cost, str] = {"steps": "steps", "calls": "network calls per image", "seconds": "seconds per image"}
LOGARITHMIC = ("fd", "fd_teacher", "kd", "seconds", "calls", "steps")
SHARES = ("accuracy", "precision", "recall", "diversity_ratio", "diversity_teacher_ratio")
"""Scores that are shares: shown in per cent, from zero."""


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    background: str
    text: str
    muted: str
    grid: str
    teachers: tuple[str, ...]
    students: tuple[str, ...]

    def colours(self, made: Sequence[Series]) -> dict[str, str]:
        """A colour for each curve."""
        chosen: dict[str, str] = {}
        for role, palette in (("teacher", self.teachers), ("student", self.students)):
            for i, curve in enumerate(each for each in made if each.role == role):
                chosen[curve.label] = palette[i % len(palette)]
        return chosen


LIGHT = Theme(
    *("#ffffff", "#1d1d22", "#6a6a74", "#e6e6ea"),
    teachers=("#b4530a", "#8a6d3b", "#7a3b1d"),
    students=("#2457d6", "#0b7a6f", "#8b2fc9", "#b3195e"),
)
DARK = Theme(
    *("#17171b", "#ececf1", "#a2a2ae", "#33333b"),
    teachers=("#f2a154", "#d9bf8c", "#d98a66"),
    students=("#86a9ff", "#55d3c3", "#c99bff", "#ff85b8"),
)


def example_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows worth a picture: each teacher at its most steps and at the students' steps, then the students."""
    made = curves(rows)
    few = {row.steps for curve in made if curve.role == "student" for row in curve.rows}
    chosen = []
    for curve in made:
        for i, row in enumerate(reversed(curve.rows)):
            if i == 0 or not few or curve.role == "student" or row.steps in few:
                chosen.append(row)
    return chosen


def example_indices(prompts: Sequence[str], count: int) -> list[int]:
    """The first image of each of the first `count` prompts: nobody chose them."""
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt, i)
    return list(first.values())[:count]


def draw_panel(axes: Any, rows: Sequence[Row], cost: Cost, key: str, theme: Theme) -> None:
    """One curve for each candidate, the number of steps in its markers, the floor as a line, the Pareto front ringed."""
    made = [curve for curve in curves(rows) if any(key in row.scores for row in curve.rows)]
    colours, best, real = theme.colours(curves(rows)), front(rows, cost, key), floor(rows)
    _style(axes, cost, key, theme)
    axes.set_title(title(key, rows), loc="left", color=theme.text, fontsize=11.5, fontweight="bold", pad=20)
    for curve in made:
        points = [row for row in curve.rows if key in row.scores]
        x, y = [getattr(row, cost) for row in points], [row.scores[key] for row in points]
        axes.plot(x, y, color=colours[curve.label], linewidth=2, alpha=0.75, zorder=2, solid_capstyle="round")
        for row, a, b in zip(points, x, y, strict=True):
            on_front = row in best
            edge, width = (theme.text, 1.5) if on_front else (theme.background, 1.0)
            shape = "s" if curve.role == "teacher" else "o"
            axes.plot(
                *([a], [b]), shape, markersize=13 if shape == "s" else 14.5, color=colours[curve.label],
                markeredgecolor=edge, markeredgewidth=width, zorder=4,
            )  # fmt: skip
            middle = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "fontweight": "bold"}
            if key in row.intervals:
                axes.vlines(a, *row.intervals[key], color=colours[curve.label], linewidth=1.6, alpha=0.6, zorder=3)
            axes.text(a, b, str(row.steps), color=theme.background, zorder=5, clip_on=True, **middle)
    if real is not None and _can_show(real, key):
        axes.axhline(real.scores[key], color=theme.muted, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    _limits(axes, made, cost, key, real)
    _name_curves(axes, made, cost, key, colours, real, theme)


def _style(axes: Any, cost: Cost, key: str, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    axes.set_facecolor(theme.background)
    axes.set_xscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    steps = LogLocator(subs=(1, 2, 5), numticks=12)
    for axis, name in ((axes.xaxis, cost), (axes.yaxis, key)):
        if name in LOGARITHMIC:
            axes.set_yscale("log") if axis is axes.yaxis else None
            axis.set_major_locator(steps if axis is axes.xaxis else LogLocator(subs=(1, 2, 5), numticks=12))
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(NullFormatter())
    if key in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color=theme.grid, linewidth=0.8, zorder=0)
    axes.tick_params(colors=theme.muted, length=0, labelsize=9, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(COST_LABELS[cost], color=theme.muted, fontsize=9.5)
    way = {"low": "lower is better", "high": "higher is better", "none": ""}[reading(key).best]
    axes.text(0, 1.0, way, transform=axes.transAxes, color=theme.muted, fontsize=9.5, va="bottom")


def _limits(axes: Any, made: Sequence[Series], cost: Cost, key: str, real: Row | None) -> None:
    """Room for markers and labels around the points."""
    rows = [row for curve in made for row in curve.rows if key in row.scores]
    x = np.array([getattr(row, cost) for row in rows], dtype=float)
    ends = [end for row in rows for end in row.intervals.get(key, ()) if key not in LOGARITHMIC or end > 0]
    y = np.array([row.scores[key] for row in rows] + ends + ([real.scores[key]] if real and key in real.scores else []))
    if len(x) and (x > 0).all():
        axes.set_xlim(x.min() / 1.45, x.max() * 1.45)
    if key in SHARES:
        axes.set_ylim(-0.06, 1.13 * max(1.0, y.max()))
    elif key in LOGARITHMIC and (y > 0).all():
        axes.set_ylim(y.min() / 1.5, y.max() * 1.6)
    elif key in LOGARITHMIC:
        axes.set_yscale("linear")
    else:
        axes.margins(y=0.15)


def _name_curves(
    axes: Any, made: Sequence[Series], cost: Cost, key: str, colours: dict[str, str], real: Row | None, theme: Theme
) -> None:
    """Write each curve's name where it is farthest from everything else, and the floor's at its right end."""
    axes.figure.canvas.draw()
    points = [[(getattr(row, cost), row.scores[key]) for row in curve.rows if key in row.scores] for curve in made]
    paths = [_path(axes.transData.transform(each)) for each in points]
    taken = [point for path in paths for point in path]
    box, pixel = axes.get_window_extent(), axes.figure.dpi / 72
    if real is not None and _can_show(real, key):
        height = axes.transData.transform((1, real.scores[key]))[1]
        value = f"{real.scores[key]:.0%}" if key in SHARES else number(real.scores[key])
        words = axes.text(0, 0, f"real images {value}", color=theme.muted, fontsize=8.5, transform=axes.transAxes)
        line = [(float(x), height) for x in np.linspace(box.x1, box.x0, 40)]
        _put(words, line, taken, axes, near=3 * pixel, enough=14 * pixel, level=True)
        taken += line
    for curve, path in zip(made, paths, strict=True):
        look = {"color": colours[curve.label], "fontsize": 10.5, "fontweight": "bold", "zorder": 6}
        words = axes.text(0, 0, curve.label, transform=axes.transAxes, **look)
        _put(words, path, taken, axes, near=15 * pixel, enough=9 * pixel)


def _put(words: Any, path: Points, taken: Points, axes: Any, *, near: float, enough: float, level: bool = False) -> None:
    """Move a text to the first place beside the path that is `enough` pixels from all that is `taken`, or else the freest.

    Beside a `level` path is above or below it.
    """
    box, extent = axes.get_window_extent(), words.get_window_extent()
    width, height = extent.width, extent.height
    beside = [(a, b) for a in (near, -width / 2, -near - width) for b in (near, -height / 2, -near - height)]
    corners = [(x + a, y + b) for x, y in path for a, b in beside if b != -height / 2 or (a != -width / 2 and not level)]
    inside = [(x, y) for x, y in corners if box.x0 + 4 <= x <= box.x1 - width and box.y0 <= y <= box.y1 - height]

    def gap(corner: tuple[float, float]) -> float:
        x, y = corner
        return min(max(x - a, a - x - width, y - b, b - y - height, 0.0) for a, b in taken)

    if inside:
        roomiest = max(gap(corner) for corner in inside)
        left, bottom = next(corner for corner in inside if gap(corner) >= min(roomiest, enough))
        words.set_position(((left - box.x0) / box.width, (bottom - box.y0) / box.height))
    final = words.get_window_extent()
    columns = np.linspace(final.x0, final.x1, 12)
    taken += [(float(x), y) for x in columns for y in (final.y0, (final.y0 + final.y1) / 2, final.y1)]


def _can_show(row: Row, key: str) -> bool:
    return key in row.scores and (key not in LOGARITHMIC or row.scores[key] > 0)


def _path(points: Any) -> Points:
    """Points along a broken line, close together."""
    made = [(float(points[0][0]), float(points[0][1]))]
    for start, end in itertools.pairwise(points):
        steps = (start + (end - start) * share for share in np.linspace(0, 1, 25)[1:])
        made += [(float(x), float(y)) for x, y in steps]
    return made


def panel_svg(rows: Sequence[Row], cost: Cost, key: str, theme: Theme, *, size: tuple[float, float] = (4.7, 3.5)) -> str:
    """One panel as a standalone SVG; letters are outlines, so that it looks the same everywhere."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fastgen", "font.family": "DejaVu Sans", "svg.fonttype": "path"}):
        figure = Figure(figsize=size, facecolor=theme.background, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw_panel(axes, rows, cost, key, theme)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor=theme.background, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def right_key(rows: Sequence[Row]) -> str | None:
    """What the right panel shows: strict accuracy, or else CLIP score, precision."""
    return next((key for key in ("accuracy", "clip_score", "precision") if any(key in row.scores for row in rows)), None)


def write_figure(results: Results, path: Path | str, *, prompts: int = 2, theme: Theme = LIGHT) -> Path:
    """Fréchet distance and strict accuracy (or CLIP score) against network calls, and pictures of `prompts` prompts, as a PNG.

    Raises UserError where there is nothing to draw or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, path = results.rows, Path(path)
    keys = [key for key in ("fd", right_key(rows)) if key is not None and any(key in row.scores for row in rows)]
    if not keys or not curves(rows):
        raise UserError(f"{results.folder} has no scores to draw; sweep at least one candidate first")
    shown, indices = example_rows(rows), example_indices(results.prompts, prompts)
    tile = 10.0 / len(shown)
    strip = len(indices) * (tile + 0.28) + 0.55
    with rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10.4, 4.2 + strip), facecolor=theme.background)
        FigureCanvasAgg(figure)
        tall = 4.2 + strip
        for i, key in enumerate(keys):
            width = 0.42 if len(keys) == 2 else 0.9
            axes = figure.add_axes((0.065 + i * 0.5, (strip + 0.75) / tall, width, 2.85 / tall))
            draw_panel(axes, rows, "calls", key, theme)
        figure.text(0.5, (strip + 0.06) / tall, LEGEND, color=theme.muted, fontsize=8.5, ha="center", va="bottom")
        _strip(figure, results, shown, indices, tile, tall, theme)
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, format="png", dpi=160, facecolor=theme.background, metadata={"Software": None})
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"the figure {path} cannot be written: {error.strerror}") from error
    return path


def _strip(
    figure: Any, results: Results, shown: Sequence[Row], indices: Sequence[int], tile: float, tall: float, theme: Theme
) -> None:
    """Pictures of the same prompts and seeds, a column for each row of the sweep."""
    made = curves(results.rows)
    colours = theme.colours(made)
    colour = {id(row): colours[curve.label] for curve in made for row in curve.rows}
    name = {id(row): curve.label for curve in made for row in curve.rows}
    wide, left = figure.get_figwidth(), 0.2
    for column, row in enumerate(shown):
        images: Tensor = results.pictures(row, indices)
        x = (left + column * tile) / wide
        top = len(indices) * (tile + 0.28) + 0.06
        words = f"{name[id(row)]}\n{row.steps} step{'s' * (row.steps != 1)}"
        place = {"ha": "center", "va": "bottom", "linespacing": 1.25}
        figure.text(x + tile / 2 / wide, top / tall, words, color=colour[id(row)], fontsize=8.5, fontweight="bold", **place)
        for line, (index, image) in enumerate(zip(indices, images, strict=True)):
            bottom = top - 0.06 - (line + 1) * (tile + 0.28) + 0.3
            axes = figure.add_axes((x + 0.03 / wide, bottom / tall, (tile - 0.06) / wide, (tile - 0.06) / tall))
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
            if column == 0:
                prompt = {"fontsize": 8, "color": theme.muted, "va": "top", "style": "italic"}
                figure.text((left + 0.03) / wide, (bottom - 0.05) / tall, results.prompts[index], **prompt)
