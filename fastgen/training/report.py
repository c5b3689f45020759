"""`report.html` of a run: how it is going, from what the run directory holds. Written anew whenever there is more.

The file asks nothing of the network: curves (SVG), pictures and style are inside it. Long runs are thinned and old grids left
out, so that it stays small and quick to write.
"""

from __future__ import annotations

import base64
import io
import json
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.errors import UserError
from fastgen.training.curves import curves, short, spark
from fastgen.training.gauges import GAUGES, Gauge
from fastgen.training.health import PREFIX

__all__ = ["write_report"]

LINES = 4000
"""Lines of the metrics that are read; of more, every so many, and all that say something of health or quality."""
TOLD = ('"health"', '"quality"', f'"{PREFIX}saturation')
GRIDS, WIDE = 10, 1200
"""Sample grids that are shown, the newest among them, and the most pixels of their width."""
ORDER = ("green", "amber", "red")

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f8; --card: #fff; --text: #1d1d22; --muted: #60606b; --line: #e2e2e8;
  --green: #1b7f43; --amber: #b26a00; --red: #c0271b; --s0: #2457d6; --s1: #b4530a; --s2: #0b7a6f; --s3: #8b2fc9;
  --s4: #b3195e; --s5: #5c6b00; --s6: #00718f; --s7: #7a3b1d; }
@media (prefers-color-scheme: dark) { :root { --page: #0e0e11; --card: #17171b; --text: #ececf1; --muted: #a2a2ae;
  --line: #2e2e36; --green: #58c98a; --amber: #f0ad4e; --red: #ff7b70; --s0: #86a9ff; --s1: #f2a154; --s2: #55d3c3;
  --s3: #c99bff; --s4: #ff85b8; --s5: #c3d65a; --s6: #6fd0ee; --s7: #d98a66; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; } p { margin: .3rem 0; max-width: 75ch; }
.muted, figcaption { color: var(--muted); font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 1rem; }
.gauges { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: .8rem; }
.gauge { border-left: 5px solid var(--green); } .gauge.amber { border-left-color: var(--amber); grid-column: span 2; }
.gauge.red { border-left-color: var(--red); grid-column: span 2; }
.value { font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.badge { font-size: .8rem; font-weight: 650; padding: .1rem .5rem; border-radius: 9px; border: 1px solid currentColor; }
.badge.green { color: var(--green); } .badge.amber { color: var(--amber); } .badge.red { color: var(--red); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--muted); font-size: 12px; }
svg.spark { max-width: 260px; margin-top: .4rem; } .rule { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } polyline.plain { stroke: var(--muted); stroke-width: 1.5; }
circle.plain { fill: var(--muted); } rect.green { fill: var(--green); } rect.amber { fill: var(--amber); }
rect.red { fill: var(--red); } .names b { color: var(--text); }
.names span { margin-right: 1rem; white-space: nowrap; display: inline-block; }
@media (max-width: 40rem) { .gauge.amber, .gauge.red { grid-column: auto; } }
SERIES
.grid { margin: 0 0 1rem; } .grid img { max-width: 100%; height: auto; display: block; border-radius: 6px; }
.scroll { overflow-x: auto; } details { margin-top: .8rem; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; margin: .5rem 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
""".replace(
    "SERIES",
    "\n".join(
        f"polyline.s{i} {{ stroke: var(--s{i}); }} circle.s{i} {{ fill: var(--s{i}); }} .names .s{i}::before "
        f'{{ content: "\\25CF "; color: var(--s{i}); }}'
        for i in range(8)
    ),
)

Line = dict[str, Any]


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's directory. Raises UserError where that cannot be done."""
    path = run / "report.html"
    partial = run / ".report.html.partial"
    try:
        partial.write_text(page(run), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def page(run: Path) -> str:
    """The report as text."""
    lines, config, environment = read_lines(run / "metrics.jsonl"), read_config(run), read_json(run / "environment.json")
    readings = collect(lines)
    method = config.get("method", {}).get("name", run.resolve().name)
    total = config.get("train", {}).get("steps")
    body = [
        header(str(method), config, lines, readings, total),
        section(
            "Health",
            gauges(readings),
            "A coloured strip under each curve is how it was judged, line by line. See docs/health.md.",
        ),
        section(
            "Quality",
            quality(lines),
            "Distance of the student's samples from the teacher's in fixed random features; lower is better.",
        ),
        section(
            "Pictures",
            grids(run / "samples"),
            "Each row is a prompt: the teacher's at the left, the student's at the right, from the same noise.",
        ),
        section("Losses", losses(lines), ""),
        section("Gradients and learning rate", gradients(lines), ""),
        section("Configuration", text_of(run / "config.toml"), ""),
        section("Environment", facts(environment), ""),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(str(method))}: training</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str, about: str) -> str:
    """A part under a heading; nothing where there is nothing to show."""
    told = f'<p class="muted">{escape(about)}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{told}\n{content}</section>" if content else ""


# -- what the run directory holds -------------------------------------------------------------------


def read_lines(path: Path) -> list[Line]:
    """The lines of the metrics, thinned where there are many; what was cut off is left out."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    stride = -(-len(texts) // LINES) or 1
    chosen = [
        text for i, text in enumerate(texts) if i % stride == 0 or i == len(texts) - 1 or any(word in text for word in TOLD)
    ]
    found = []
    for text in chosen:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def read_config(run: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class Course:
    """A reading over the run: updates, values and colours."""

    name: str
    gauge: Gauge
    points: list[tuple[float, float]]
    colours: list[str]
    levels: list[tuple[str, float]]

    @property
    def colour(self) -> str:
        return self.colours[-1]


def collect(lines: Sequence[Line]) -> list[Course]:
    """The readings of the lines, in the order of the gauges."""
    known = {gauge.name: gauge for gauge in GAUGES}
    found: dict[str, Course] = {}
    for line in lines:
        for key, value in line.items():
            name = key.removeprefix(PREFIX)
            first, _, rest = name.partition("/")
            if name == key or first not in known or rest.startswith("t0"):
                continue
            course = found.setdefault(name, Course(name, known[first], [], [], []))
            course.points.append((line["step"], float("nan") if value is None else value))
            course.colours.append(line.get("health", {}).get(name, "green"))
            levels = [(each.rpartition("/t")[2], level) for each, level in line.items() if each.startswith(f"{key}/t0")]
            course.levels = [(at, level) for at, level in levels if level is not None]
    order = list(known)
    return sorted(found.values(), key=lambda course: (order.index(course.gauge.name), course.name))


# -- parts of the page -------------------------------------------------------------------------------


def header(method: str, config: dict[str, Any], lines: Sequence[Line], readings: Sequence[Course], total: int | None) -> str:
    colour = max((course.colour for course in readings), key=ORDER.index, default="green")
    done = lines[-1]["step"] if lines else 0
    wrong = [course.gauge.title.lower() for course in readings if course.colour != "green"]
    state = "all readings green" if not wrong else ", ".join(dict.fromkeys(wrong))
    told = f"{done} of {total} updates" if total else f"{done} updates"
    teacher = config.get("pipeline")
    about = f"{told}{f', teacher {teacher}' if teacher else ''}, written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    badge = f'<span class="badge {colour}">{colour}</span>' if readings else ""
    words = f"<p>{badge} {escape(state)}</p>" if readings else ""
    return f'<header><h1>{escape(method)}</h1><p class="muted">{escape(about)}</p>{words}</header>'


def gauges(readings: Sequence[Course]) -> str:
    cards = []
    for course in sorted(readings, key=lambda each: -ORDER.index(each.colour)):
        value = course.points[-1][1]
        _, _, player = course.name.partition("/")
        title = course.gauge.title + (f" of {player}" if player else "")
        told = ""
        if course.colour != "green":
            gauge = course.gauge
            advice = gauge.low if gauge.low and (gauge.high is None or value < gauge.amber[0]) else gauge.high
            if advice is not None:
                told = f"<p>{escape(sentence(advice.means))}</p><p><b>Try:</b> {escape(advice.remedy)}.</p>"
        levels = "; ".join(f"t {at}: {short(level)}" for at, level in course.levels)
        by_level = f'<p class="muted">by noise level: {escape(levels)}</p>' if levels else ""
        shown = short(value) if value == value else "not a number"
        cards.append(
            f'<article class="card gauge {course.colour}"><h3>{escape(title)} <span class="badge {course.colour}">'
            f'{course.colour}</span></h3><div class="value">{shown}</div><p class="muted">{escape(course.gauge.about)}</p>'
            f"{told}{by_level}{spark(course.points, course.colours)}</article>"
        )
    return f'<div class="gauges">{"".join(cards)}</div>' if cards else ""


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def figure(title: str, drawn: str) -> str:
    return f'<figure class="card"><h3>{escape(title)}</h3>{drawn}</figure>' if drawn else ""


def points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def quality(lines: Sequence[Line]) -> str:
    found = points(lines, "quality")
    if not found:
        return ""
    step, least = min(found, key=lambda each: each[1])
    told = f"<p>Best: {short(least)} after update {int(step)}.</p>"
    return told + panels([figure("Distance from the teacher", curves({"distance": found}, about="quality over updates"))])


def losses(lines: Sequence[Line]) -> str:
    """A panel a player, a curve a term."""
    terms: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        player, slash, term = key.partition("/")
        if slash and not key.startswith(PREFIX) and term not in ("gradient_norm", "update_size", "skipped", "lr"):
            terms.setdefault(player, []).append(term)
    drawn = []
    for player, names in terms.items():
        series = {name: points(lines, f"{player}/{name}") for name in names}
        drawn.append(figure(player, curves(series, about=f"losses of {player} over updates")))
    return panels(drawn)


def gradients(lines: Sequence[Line]) -> str:
    keys = list(dict.fromkeys(key for line in lines for key in line))

    def all_of(what: str) -> dict[str, list[tuple[float, float]]]:
        return {key.partition("/")[0]: points(lines, key) for key in keys if key.endswith(f"/{what}")}

    rates = {"all players": points(lines, "lr"), **all_of("lr")}
    return panels(
        [
            figure("Gradient norms before clipping", curves(all_of("gradient_norm"), about="gradient norms over updates")),
            figure("Size of an update, of the weights' own", curves(all_of("update_size"), about="update sizes over updates")),
            figure("Learning rate", curves(rates, about="learning rate over updates", zero=True)),
            figure("Skipped updates", curves(all_of("skipped"), about="skipped updates", zero=True)),
        ]
    )


def panels(figures: Sequence[str]) -> str:
    shown = "".join(figures)
    return f'<div class="panels">{shown}</div>' if shown else ""


def grids(folder: Path) -> str:
    """The newest grid, and some of those before it evenly chosen."""
    paths = sorted(folder.glob("step-*.png")) if folder.is_dir() else []
    if not paths:
        return ""
    count = min(len(paths), GRIDS)
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count - 1)] + [paths[-1]]
    shown = [grid(path) for path in reversed(list(dict.fromkeys(chosen)))]
    older = f"<details><summary>Earlier grids</summary>{''.join(shown[1:])}</details>" if shown[1:] else ""
    left = f'<p class="muted">{len(paths)} grids are in samples/.</p>' if len(paths) > len(shown) else ""
    return shown[0] + older + left


def grid(path: Path) -> str:
    about = read_json(path.with_suffix(".json"))
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return ""
    buffer = io.BytesIO()
    small = max(picture.size) <= 640
    picture.thumbnail((WIDE, 4 * WIDE), Image.Resampling.LANCZOS)
    picture.save(buffer, "PNG") if small else picture.save(buffer, "JPEG", quality=88)
    source = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    step, prompts = about.get("step", int(path.stem.removeprefix("step-"))), about.get("prompts", [])
    student, teacher = about.get("student", {}), about.get("teacher", {})
    sides = (
        f", teacher in {teacher['steps']} steps, student in {student['steps']}"
        if "steps" in student and "steps" in teacher
        else ""
    )
    words = f"After update {step}{sides}. Rows: {'; '.join(str(each) for each in prompts)}"
    alt = escape(f"samples after update {step}", quote=True)
    return (
        f'<figure class="grid card"><div class="scroll"><img src="{source}" alt="{alt}" width="{picture.width}" '
        f'height="{picture.height}"></div><figcaption>{escape(words)}</figcaption></figure>'
    )


def text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    return f'<details class="card"><summary>As resolved</summary><pre>{escape(text)}</pre></details>'


def facts(environment: dict[str, Any]) -> str:
    rows = []
    for key, value in environment.items():
        shown = ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else str(value)
        rows.append(f"<dt>{escape(key)}</dt><dd>{escape(shown)}</dd>")
    return f'<dl class="card">{"".join(rows)}</dl>' if rows else ""
