"""Curves of a report as SVG that takes its colours from the page, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["Points", "curves", "spark", "thinned"]

Points = Sequence[tuple[float, float]]
"""Updates and values; a value that is not finite is a gap."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 52, 22, 8
MOST = 240
"""Points of a curve; more are averaged."""


def thinned(points: Points, most: int = MOST) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours; what is not finite is left out."""
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if len(finite) <= most:
        return finite
    size = len(finite) / most
    groups = [finite[int(i * size) : int((i + 1) * size)] for i in range(most)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups if group]


def curves(series: Mapping[str, Points], *, about: str, zero: bool = False) -> str:
    """A panel of one or more curves over the updates, named below; logarithmic where positive values span decades.

    `about` is told to who cannot see it. Empty where there is nothing to draw.
    """
    drawn = {name: thinned(points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    values = [y for points in drawn.values() for _, y in points]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 30
    if zero and not logarithmic:
        low = min(low, 0.0)
    if high - low < 1e-12 * max(abs(high), 1e-30):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    first, last = min(points[0][0] for points in drawn.values()), max(points[-1][0] for points in drawn.values())

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        part = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - part)

    marks = []
    for value in ticks(low, high, logarithmic):
        marks.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - 8}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{short(value)}</text>')
    marks.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{short(first)}</text>')
    marks.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">{short(last)}</text>')
    lines, names = [], []
    for i, (name, points) in enumerate(drawn.items()):
        lines.append(line([(across(x), up(y)) for x, y in points], f"s{i % 8}"))
        names.append(f'<span class="s{i % 8}">{escape(name)} <b>{short(points[-1][1])}</b></span>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about, quote=True)}">'
    return f'{picture}{"".join(marks)}{"".join(lines)}</svg><figcaption class="names">{"".join(names)}</figcaption>'


def line(points: Sequence[tuple[float, float]], look: str) -> str:
    if len(points) == 1:
        return f'<circle class="{look}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>'
    return f'<polyline class="{look}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def spark(points: Points, colours: Sequence[str]) -> str:
    """A small curve with a strip of colours below it: what a reading was, and how it was judged, in each of its lines."""
    kept = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    shown = thinned(kept, 80)
    if not shown:
        return ""
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    first, last = shown[0][0], shown[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        return 2 + 156 * ((x - first) / (last - first) if last > first else 0.5), 3 + 28 * (
            1 - (y - low) / (high - low) if high > low else 0.5
        )

    order = ("green", "amber", "red")
    cells = min(len(colours), 40)
    worst = [
        max(
            colours[i * len(colours) // cells : max(i * len(colours) // cells + 1, (i + 1) * len(colours) // cells)],
            key=order.index,
        )
        for i in range(cells)
    ]
    wide = 160 / max(cells, 1)
    strip = "".join(
        f'<rect class="{colour}" x="{i * wide:.2f}" y="37" width="{wide:.2f}" height="4"/>' for i, colour in enumerate(worst)
    )
    path = line([place(x, y) for x, y in shown], "plain")
    return f'<svg class="spark" viewBox="0 0 160 42" aria-hidden="true">{path}{strip}</svg>'


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Three to six round values between two."""
    if logarithmic:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        stride = max(1, math.ceil((last - first) / 5))
        decades = [10.0**power for power in range(first, last + 1, stride)]
        return decades if len(decades) > 1 else [low, *decades, high]
    step = 10 ** math.floor(math.log10(high - low))
    for part in (0.2, 0.25, 0.5, 1, 2):
        if (high - low) / (step * part) <= 5:
            step *= part
            break
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in a few letters."""
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    text = f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")
