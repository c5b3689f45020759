"""One self-contained HTML file of a sweep: what it says, curves, pictures side by side, every number, the protocol.

The file asks nothing of the network: style, curves (SVG) and pictures (PNG, or JPEG when large) are inside it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.errors import UserError
from fastgen.eval.figure import DARK, LEGEND, LIGHT, example_indices, example_rows, panel_svg, right_key
from fastgen.eval.images import to_pillow
from fastgen.eval.paste import csv_text, latex
from fastgen.eval.results import Results, Row, load_results
from fastgen.eval.table import COLUMNS, Cost, best, cells, columns, curves, header, number, summary, table, title

PROMPTS = 12
SMALL = 64
"""Pictures up to this size are kept to the pixel and enlarged without smoothing."""
THUMBNAIL = 256
DIVERSITY = ("diversity_ratio", "diversity_teacher_ratio", "diversity")
"""What the panel of diversity shows: the first of these that there is."""

EVERY_ROW = (
    "↓ lower is better, ↑ higher is better; the best of each column is underlined; ± is half the width of a 95 % interval. "
    "Ratios are shares of what real images, or the teacher's at its most steps from the same noise, have."
)

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f8; --card: #ffffff; --text: #1d1d22; --muted: #60606b; --line: #e2e2e8;
  --right: #17713a; --wrong: #b3261e; --mark: #eef3ff; }
@media (prefers-color-scheme: dark) { :root { --page: #0e0e11; --card: #17171b; --text: #ececf1; --muted: #a2a2ae;
  --line: #2e2e36; --right: #6fd695; --wrong: #ff8f86; --mark: #1d2436; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; max-width: 75ch; }
.lead { font-size: 1.15rem; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
.panels figure { margin: 0; }
.panels img { width: 100%; height: auto; display: block; }
.prompt { margin: 0 0 1rem; }
.prompt h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(7.6rem, 21%), 1fr)); gap: .6rem; }
@media (min-width: 56rem) { .tiles { grid-template-columns: repeat(var(--columns), 1fr); } }
.tiles figure { margin: 0; }
.tiles img { width: 100%; height: auto; display: block; border-radius: 6px; }
.tiles img.small { image-rendering: pixelated; }
.tiles figcaption { overflow-wrap: anywhere; font-size: .8rem; line-height: 1.3; margin-top: .3rem; }
.name { font-weight: 600; }
.right { color: var(--right); font-weight: 600; }
.wrong { color: var(--wrong); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .4rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; color: var(--muted); font-weight: 600; font-size: .8rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tr.student td, tr.student th { background: var(--mark); }
tr.real td, tr.real th { color: var(--muted); font-style: italic; }
tbody th { font-weight: 600; }
td small { display: block; color: var(--muted); font-size: .75rem; font-weight: 400; }
td.best span { font-weight: 700; text-decoration: underline; text-underline-offset: 3px; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; background: var(--page); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; }
pre.paste { max-height: 24rem; user-select: all; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; font-size: .9rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { h1 { font-size: 1.5rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""


def write_report(results: Results | Path | str, path: Path | str | None = None, *, prompts: int = PROMPTS) -> Path:
    """Write the report of a sweep (read from its folder where a path is given) to `path`, by default `report.html` in there.

    Raises UserError where the sweep has no rows or the file cannot be written.
    """
    results = results if isinstance(results, Results) else load_results(results)
    path = results.folder / "report.html" if path is None else Path(path)
    content = html(results, prompts=prompts)
    return write_page(path, content)


def write_page(path: Path, content: str) -> Path:
    """Write a page by way of a temporary name. Raises UserError where that cannot be done."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"the report {path} cannot be written: {error.strerror}") from error
    return path


def html(results: Results, *, prompts: int = PROMPTS) -> str:
    """The report as text. Raises UserError where the sweep has no rows."""
    rows = results.rows
    if not curves(rows):
        raise UserError(f"the sweep in {results.folder} has no rows yet; there is nothing to report")
    names = ", ".join(dict.fromkeys(row.name for row in rows if row.role != "real"))
    first, *others = summary(rows)
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in others)
    body = [
        f'<header><h1>Quality against steps: {escape(names)}</h1><p class="lead">{escape(first)}</p>{told}</header>',
        section(
            "Trade-off", _panels(rows), f"{LEGEND} Circles are students, squares teachers; a guided step is two network calls."
        ),
        section("Side by side", _pictures(results, prompts), _about_pictures(results, prompts)),
        section("Every row", _numbers(rows), EVERY_ROW),
        section("How it was measured", _protocol(results), ""),
    ]
    return document(f"Quality against steps: {names}", body)


def document(title: str, body: Sequence[str]) -> str:
    """A page of our look that asks nothing of the network."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str, about: str) -> str:
    """A part of a page under a heading; `about` is told in grey."""
    told = f'<p class="muted">{escape(about)}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{told}\n{content}</section>"


def uri(kind: str, data: bytes) -> str:
    """Data as an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _panels(rows: Sequence[Row]) -> str:
    """Distance against steps, calls and seconds, accuracy against calls and seconds, diversity beside it: what there is."""
    right = right_key(rows)
    diverse = next((key for key in DIVERSITY if any(key in row.scores for row in rows)), None)
    wanted: list[tuple[Cost, str | None]] = [
        *(("steps", "fd"), ("seconds", "fd"), ("calls", "fd"), ("calls", diverse), ("calls", right), ("seconds", right)),
    ]
    made = []
    for cost, key in wanted:
        shown = [row for row in rows if row.role != "real" and key in row.scores and getattr(row, cost) > 0]
        if key is None or not shown:
            continue
        light, dark = (uri("image/svg+xml", panel_svg(rows, cost, key, theme).encode()) for theme in (LIGHT, DARK))
        alt = escape(_describe_panel(shown, cost, key), quote=True)
        made.append(
            f'<figure class="card"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{alt}"></picture></figure>'
        )
    return f'<div class="panels">{"".join(made)}</div>'


def _describe_panel(rows: Sequence[Row], cost: Cost, key: str) -> str:
    words = {"steps": "steps", "calls": "network calls", "seconds": "seconds"}[cost]
    points = (f"{row.label} {number(row.scores[key])} with {number(getattr(row, cost))}" for row in rows)
    return f"{title(key, rows)} against {words} per image: {'; '.join(points)}."


def _about_pictures(results: Results, prompts: int) -> str:
    count = len(example_indices(results.prompts, prompts))
    told = (
        f"The first {count} prompts, the first seed of each: nobody chose them. A prompt's pictures start from the same noise."
    )
    if results.protocol.get("world") == "toy":
        told += " ✓ means that everything in the picture is as the prompt says, ✗ that something is not."
    return told


def _pictures(results: Results, prompts: int) -> str:
    shown, indices = example_rows(results.rows), example_indices(results.prompts, prompts)
    label = {id(row): curve.label for curve in curves(results.rows) for row in curve.rows}
    pictures = {id(row): to_pillow(results.pictures(row, indices)) for row in shown}
    right = {id(row): results.right(row) for row in shown}
    blocks = []
    for position, index in enumerate(indices):
        prompt = results.prompts[index]
        tiles = []
        for row in shown:
            marks = right[id(row)]
            verdict = None if marks is None else bool(marks[index])
            tiles.append(_tile(pictures[id(row)][position], label[id(row)], row, prompt, verdict))
        seed = f'<span class="muted">seed {results.seeds[index]}</span>'
        head = f"<h3>{escape(prompt)} {seed}</h3>"
        grid = f'<div class="tiles" style="--columns: {columns_for(len(shown))}">{"".join(tiles)}</div>'
        blocks.append(f'<article class="prompt card">{head}{grid}</article>')
    return "\n".join(blocks)


def columns_for(count: int) -> int:
    """In how many columns to show so many pictures: lines of at most ten, filled alike."""
    return max(6, -(-count // -(-count // 10)))


def picture_source(picture: Image.Image) -> tuple[str, str]:
    """The address of a picture, scaled down where it is large, and its size as attributes."""
    small = max(picture.size) <= SMALL
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG")
    else:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=90)
    size = f'width="{picture.width}" height="{picture.height}"' + (' class="small"' if small else "")
    return uri("image/png" if small else "image/jpeg", buffer.getvalue()), size


def _tile(picture: Image.Image, label: str, row: Row, prompt: str, verdict: bool | None) -> str:
    source, size = picture_source(picture)
    steps = f"{row.steps} step{'s' * (row.steps != 1)}"
    mark, said = "", ""
    if verdict is not None:
        mark = ' <span class="right">✓</span>' if verdict else ' <span class="wrong">✗</span>'
        said = ", everything right" if verdict else ", something wrong"
    alt = escape(f"{label} with {steps}: {prompt}{said}", quote=True)
    caption = f'<span class="name">{escape(label)}</span><br>{steps}{mark}'
    return f'<figure><img src="{source}" alt="{alt}" {size}><figcaption>{caption}</figcaption></figure>'


def _numbers(rows: Sequence[Row]) -> str:
    keys = columns(rows)
    tops = {key: best(rows, key) for key in keys}
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header(rows))
    lines = []
    for row, texts in cells(rows):
        plain, scores = texts[1 : len(texts) - len(keys)], texts[len(texts) - len(keys) :]
        shown = [f"<td>{escape(text)}</td>" for text in plain]
        for key, text in zip(keys, scores, strict=True):
            value, _, half = text.partition(" ± ")
            told = f"<span>{value}</span>" + (f" <small>± {half}</small>" if half else "")
            shown.append(f'<td class="best">{told}</td>' if tops[key] is row else f"<td>{told}</td>")
        lines.append(f'<tr class="{row.role}"><th scope="row">{escape(texts[0])}</th>{"".join(shown)}</tr>')
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="Every row">{grid}</div>'
    forms = (("Markdown", table(rows)), ("LaTeX", latex(rows)), ("CSV, every score", csv_text(rows)))
    paste = "".join(
        f'<details><summary>{name}</summary><pre class="paste">{escape(text)}</pre></details>' for name, text in forms
    )
    about = '<p class="muted">To paste (a click selects all):</p>'
    return f'<div class="card">{scroll}{_more_scores(rows)}{about}{paste}</div>'


def _more_scores(rows: Sequence[Row]) -> str:
    """The scores that have no column."""
    lines = []
    for row, _ in cells(rows):
        others = {key: value for key, value in row.scores.items() if key not in COLUMNS}
        if others:
            told = "; ".join(f"{escape(title(key, [row]))} {number(value)}" for key, value in others.items())
            lines.append(f"<dt>{escape(row.key)}</dt><dd>{told}</dd>")
    return f"<details><summary>More scores</summary><dl>{''.join(lines)}</dl></details>" if lines else ""


def _protocol(results: Results) -> str:
    protocol, rows = results.protocol, results.rows
    sections = {name: value for name, value in protocol.items() if isinstance(value, Mapping)}
    prompts, reference, networks = (sections.get(name, {}) for name in ("prompts", "reference", "features"))
    clip = sections.get("clip", {})
    facts: dict[str, Any] = {
        "Images per row": sections.get("images", {}).get("count"),
        "Prompts": f"{prompts.get('different')} different, from {prompts.get('from')} (SHA-256 {prompts.get('sha256')})",
        "Seeds": _pairs(sections.get("seeds", {})),
        "Reference": f"{reference.get('count')} images (SHA-256 {reference.get('sha256')})",
        "Features": f"{networks.get('name')} (SHA-256 {networks.get('sha256')}); resized: {networks.get('resize')}",
        "Image and text": f"{clip.get('name')} (SHA-256 {clip.get('sha256')}); resized: {clip.get('resize')}",
        "Metrics": ", ".join(sections.get("metrics", {})),
        "Computation": _pairs(sections.get("computation", {})),
        "Versions": _pairs(sections.get("versions", {})),
        "Machine": _pairs(sections.get("machine", {})),
        "Begun": protocol.get("time"),
        "Intervals": "95 %: the bootstrap over prompts for means over images, the jackknife for distances",
    }
    for row in rows:
        if scheduler := row.sampler.get("scheduler"):
            kernels = row.protocol.get("attention", "unknown")
            facts[row.key] = f"{scheduler['class']}, call {json.dumps(row.sampler.get('call', {}))}, attention {kernels}"
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    record = json.dumps({"protocol": protocol, "rows": {row.key: row.protocol for row in rows}}, indent=2, ensure_ascii=False)
    return (
        f'<div class="card"><dl>{listed}</dl>{told}'
        f"<details><summary>Everything, as JSON</summary><pre>{escape(record)}</pre></details></div>"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
