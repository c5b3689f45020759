"""The report in a real browser, and its tables to paste."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgen.eval.paste import csv_text, escaped, latex
from fastgen.eval.report import write_report
from fastgen.eval.results import Results, load_results
from fastgen.eval.sweep import student, sweep, teacher
from fastgen.eval.table import scored
from tests.test_sweep import IMAGES, export, tiny

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
PROBE = """<script>
window.addEventListener("load", () => {  // every picture has been decoded by then, or has failed
  const images = [...document.images];
  const broken = images.filter(image => !image.complete || image.naturalWidth === 0).length;
  const table = [...document.querySelectorAll("table tbody tr")].map(row => row.querySelector("th").textContent);
  const found = {images: images.length, broken, rows: table, wide: document.documentElement.scrollWidth > window.innerWidth};
  const note = document.createElement("pre");
  note.id = "probe"; note.textContent = JSON.stringify(found); document.body.append(note);
});
</script>"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("reported")
    candidates = [teacher(tiny(), steps=(2, 1), guidance=(2.0, 1.0)), student(export(folder / "a_student"), steps=(2, 1))]
    sweep(candidates, folder / "sweep", images=IMAGES, metrics=["fidelity", "accuracy", "diversity"])
    return load_results(folder / "sweep")


def browse(page: Path, folder: Path) -> tuple[dict, list[str]]:
    """What the probe in a page found, and the console's messages."""
    assert BROWSER is not None
    copy = folder / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, copy.as_uri()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert probe is not None, done.stdout[-2000:]
    return json.loads(probe[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(
    BROWSER is None, reason=f"no browser to look at the report with: none of {', '.join(BROWSERS)} is installed"
)
def test_a_browser_shows_the_whole_report(swept: Results, tmp_path: Path) -> None:
    page = write_report(swept.folder)
    found, messages = browse(page, tmp_path)
    assert messages == []
    assert found["images"] > 6 and found["broken"] == 0 and not found["wide"]
    assert sorted(found["rows"]) == sorted(row.name for row in swept.rows)
    damaged = tmp_path / "damaged.html"
    text = page.read_text(encoding="utf-8").replace("data:image/png;base64,iVBOR", "data:image/png;base64,iVBOX", 1)
    damaged.write_text(text.replace("</body>", "<script>console.error('seen')</script></body>"), encoding="utf-8")
    found, messages = browse(damaged, tmp_path)
    assert found["broken"] == 1 and len(messages) == 1 and "seen" in messages[0], "the browser does tell"


def test_latex_has_every_row_and_no_bare_special_character(swept: Results) -> None:
    text = latex(swept.rows)
    lines = text.splitlines()
    assert lines[0].startswith(r"\begin{tabular}{lrr") and lines[-1] == r"\end{tabular}" and r"\midrule" in lines
    body = lines[4:-2]
    assert len(body) == len(swept.rows) and len({line.count(" & ") for line in [lines[2], *body]}) == 1
    assert r"a\_student" in text and "±" not in text and "é" not in text
    for row in swept.rows:
        assert escaped(scored(row, "fd")) in text
    assert text.count(r"\textbf{") >= 3
    assert escaped("a&b_c%d#e{f}~^\\") == r"a\&b\_c\%d\#e\{f\}\textasciitilde{}\textasciicircum{}\textbackslash{}"


def test_csv_has_every_number(swept: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(swept.rows))))
    assert len(rows) == len(swept.rows)
    by = {(row["candidate"], row["steps"], row["guidance"]): row for row in rows}
    for row in swept.rows:
        written = by[row.name, str(row.steps), "" if row.guidance is None else str(row.guidance)]
        for key, value in row.scores.items():
            assert float(written[key]) == value
        for key, (low, high) in row.intervals.items():
            assert (float(written[f"{key}_low"]), float(written[f"{key}_high"])) == (low, high)
    page = write_report(swept.folder).read_text(encoding="utf-8")
    assert "<summary>Markdown</summary>" in page and r"\begin{tabular}" in page and "network_calls,seconds" in page


def test_intervals_and_guidance_scales_are_in_the_report(swept: Results) -> None:
    row = next(row for row in swept.rows if row.role == "student" and row.steps == 1)
    low, high = row.intervals["accuracy"]
    assert row.intervals["fd"][0] < row.scores["fd"] < row.intervals["fd"][1] and low <= row.scores["accuracy"] <= high
    page = write_report(swept.folder).read_text(encoding="utf-8")
    assert scored(row, "fd") in page and " ± " in scored(row, "fd")
    assert "teacher, guidance 2" in page and "teacher, guidance 1" in page
