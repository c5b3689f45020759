"""Sweeps: rows are complete, nothing is made twice, protocols never mix, and the report holds all of it by itself."""

from __future__ import annotations

import base64
import inspect
import io
import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from transformers import CLIPTextConfig, CLIPTextModel

from fastgen.data.toy.scenes import sample_scenes
from fastgen.data.toy.teacher import build_scheduler
from fastgen.data.toy.tokenizer import MAX_LENGTH, toy_tokenizer
from fastgen.errors import UserError
from fastgen.eval import TOY
from fastgen.eval.evaluation import real_images
from fastgen.eval.figure import DARK, LIGHT, example_rows, panel_svg, write_figure
from fastgen.eval.generate import generate
from fastgen.eval.images import write_images
from fastgen.eval.paste import latex
from fastgen.eval.report import html, write_report
from fastgen.eval.results import REAL, Results, Row, load_results
from fastgen.eval.sweep import Candidate, Setting, student, sweep, teacher
from fastgen.eval.table import curves, front, number, ordered, print_table, scored, summary, table
from fastgen.samplers import SchedulerSpec
from tests.tiny_models import toy

IMAGES = 12
METRICS = ("fidelity", "accuracy", "diversity")
OPTIONS: dict[str, Any] = {"images": IMAGES, "metrics": METRICS, "batch": 6}


def tiny(seed: int = 0) -> StableDiffusionPipeline:
    """An untrained pipeline of the shipped teacher's kind that knows the toy world's words."""
    pipeline, tokenizer = toy(seed), toy_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval(), scheduler=build_scheduler())
    return pipeline


def export(folder: Path, steps: int = 2, call: dict[str, Any] | None = None) -> Path:
    """A folder as `fastgen export` writes them."""
    tiny(1).save_pretrained(folder)
    call = call or {"num_inference_steps": steps, "guidance_scale": 1.0}
    (folder / "fastgen.json").write_text(json.dumps({"sampler": {"class": "FewStep", "steps": steps}, "call": call}))
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Results:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("swept")
    candidates = [
        teacher(tiny(), steps=(3, 2, 1), guidance=2.0),
        student(export(folder / "student"), steps=(2, 1), name="student"),
    ]
    sweep(candidates, folder / "sweep", **OPTIONS)
    return load_results(folder / "sweep")


def calls_of(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts pipeline calls by number of steps."""
    counted: Counter[int] = Counter()
    original = StableDiffusionPipeline.__call__

    def counting(self: StableDiffusionPipeline, *args: Any, **named: Any) -> Any:
        counted[named.get("num_inference_steps", 0)] += 1
        return original(self, *args, **named)

    counting.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counting)
    return counted


def made_up(scores: dict[str, tuple[float, float]]) -> list[Row]:
    """Rows from name -> (calls, distance); "student 2" is the student at two steps."""
    rows = []
    for label, (calls, distance) in scores.items():
        name, steps = label.split()
        role = "student" if name == "student" else "teacher"
        rows.append(
            Row(name, role, int(steps), None, calls, calls / 100, {"fd": distance, "accuracy": 1 / distance}, "", label)
        )
    return rows


def test_rows_are_complete(swept: Results) -> None:
    rows = {row.key: row for row in swept.rows}
    assert list(rows) == [
        REAL, "teacher, 3 steps, guidance 2", "teacher, 2 steps, guidance 2", "teacher, 1 step, guidance 2",
        "student, 2 steps, guidance 1", "student, 1 step, guidance 1",
    ]  # fmt: skip
    for row in rows.values():
        assert {"fd", "kd", "precision", "recall", "accuracy", "diversity", "diversity_ratio"} <= row.scores.keys()
        assert swept.images(row).shape == (IMAGES, 3, 32, 32) and len(swept.right(row)) == IMAGES
        assert swept.right(row).float().mean().item() == pytest.approx(row.scores["accuracy"])
    assert rows[REAL].scores["fd"] == pytest.approx(rows["student, 1 step, guidance 1"].scores["fd_floor"])
    assert rows[REAL].scores["fd"] < min(row.scores["fd"] for row in rows.values() if row.role != "real")
    assert all(row.seconds > 0 for row in rows.values() if row.role != "real")


def test_network_calls_are_counted(swept: Results) -> None:
    calls = {(row.role, row.steps): row.calls for row in swept.rows if row.role != "real"}
    assert calls == {("teacher", 3): 6, ("teacher", 2): 4, ("teacher", 1): 2, ("student", 2): 2, ("student", 1): 1}


def test_the_protocol_says_what_could_change_a_row(swept: Results) -> None:
    record = json.loads((swept.folder / "results.json").read_text())
    protocol = record["protocol"]
    for section, key in (
        *(("images", "count"), ("seeds", "sha256"), ("prompts", "sha256"), ("reference", "sha256"), ("features", "sha256")),
        *(("features", "resize"), ("versions", "torch-fidelity"), ("metrics", "fidelity"), ("computation", "precision")),
        *(("computation", "device"), ("computation", "batch"), ("machine", "device")),
    ):
        assert protocol[section][key] is not None, key
    row = record["rows"][1]
    assert row["protocol"]["attention"] == "native" and row["protocol"]["model"]["fingerprint"]
    assert row["protocol"]["sampler"]["guidance"] == 2.0
    scheduler = row["sampler"]["scheduler"]
    assert scheduler["class"] == "DDIMScheduler" and scheduler["config"]["timestep_spacing"] == "trailing"
    assert len(swept.prompts) == len(swept.seeds) == IMAGES and swept.prompts[0] == swept.prompts[1]


def test_an_image_is_what_the_stock_pipeline_draws(swept: Results) -> None:
    row = next(row for row in swept.rows if row.role == "teacher" and row.steps == 2)
    drawn = generate(tiny(), swept.prompts[:6], swept.seeds[:6], steps=2, guidance=2.0)
    assert torch.equal(drawn, swept.images(row)[:6])


def test_resuming_makes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(tmp_path / "student")
    counted = calls_of(monkeypatch)
    candidates = [student(folder, steps=(2, 1))]
    told: list[tuple[str, int, int]] = []

    def stop(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if what == "student, 1 step: scores":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(candidates, tmp_path / "out", progress=stop, **OPTIONS)
    assert counted == {2: 2, 1: 2}
    assert [row.label for row in load_results(tmp_path / "out").rows] == [REAL, "student, 2 steps"]
    rows = sweep(candidates, tmp_path / "out", **OPTIONS)
    assert counted == {2: 2, 1: 2}, "the images were there already"
    assert [row.label for row in rows] == [REAL, "student, 2 steps", "student, 1 step"]
    assert rows[2].calls == 1 and rows[2].seconds > 0
    assert all(0 <= done <= total == 3 * IMAGES for _, done, total in told)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_changed_weights_are_measured_anew(tmp_path: Path) -> None:
    pipeline = tiny()
    before = sweep([teacher(pipeline, steps=[1], guidance=1.0)], tmp_path, **OPTIONS)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.add_(0.5)
    after = sweep([teacher(pipeline, steps=[1], guidance=1.0)], tmp_path, **OPTIONS)
    assert len(after) == 2 and after[1].scores["fd"] != before[1].scores["fd"]
    assert [row.fingerprint for row in load_results(tmp_path).rows] == [row.fingerprint for row in after]


def test_a_setting_can_bring_its_own_scheduler(tmp_path: Path) -> None:
    spec = SchedulerSpec("EulerDiscreteScheduler", {"timestep_spacing": "leading", "prediction_type": "v_prediction"})
    pipeline = tiny()
    own = pipeline.scheduler
    candidate = Candidate("student", pipeline, "student", (Setting(2, 1.0, scheduler=spec), Setting(1, 1.0, {"eta": 0.0})))
    rows = sweep([candidate], tmp_path, **OPTIONS)
    assert [row.sampler["scheduler"]["class"] for row in rows[1:]] == ["EulerDiscreteScheduler", "DDIMScheduler"]
    assert rows[2].sampler["call"] == {"eta": 0.0}
    assert pipeline.scheduler is own


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"images": 8}, "images.count"),
        ({"seed": 1}, "prompts.sha256"),
        ({"metrics": ["accuracy"]}, "metrics.diversity.version"),
        ({"batch": 4}, "computation.batch"),
    ],
)
def test_protocols_do_not_mix(swept: Results, change: dict[str, Any], field: str) -> None:
    before = (swept.folder / "results.json").read_bytes()
    with pytest.raises(UserError, match=f"another protocol: {field} was"):
        sweep([teacher(tiny(), steps=[1])], swept.folder, **{**OPTIONS, **change})
    assert (swept.folder / "results.json").read_bytes() == before


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    prompts = ["a small red circle on a black background", "a large blue ring on a white background"]
    scenes = sample_scenes(2 * IMAGES, torch.Generator().manual_seed(0))
    write_images(real_images(scenes, 5), tmp_path / "real")
    options = {**OPTIONS, "metrics": ["fidelity", "diversity"], "prompts": prompts, "world": TOY}
    rows = sweep([teacher(tiny(), steps=[1])], tmp_path / "out", reference=tmp_path / "real", **options)
    results = load_results(tmp_path / "out")
    assert [row.label for row in rows] == [REAL, "teacher, 1 step"]
    assert rows[1].guidance == 7.5, "the pipeline's own"
    assert results.prompts == [prompts[i // 2 % 2] for i in range(IMAGES)]
    assert len(set(zip(results.prompts, results.seeds, strict=True))) == IMAGES
    assert results.right(rows[1]) is None and "accuracy" not in rows[1].scores


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to sweep"):
        sweep([], tmp_path / "out")
    with pytest.raises(UserError, match="at least 4 images"):
        sweep([teacher(tiny())], tmp_path / "out", images=3)
    with pytest.raises(UserError, match="teacher: steps must be at least 1, not -2"):
        sweep([teacher(tiny(), steps=[-2])], tmp_path / "out")
    with pytest.raises(UserError, match="two candidates are called 'teacher, 1 step'"):
        sweep([teacher(tiny(), steps=[1]), teacher(tiny(1), steps=[1])], tmp_path / "out")
    with pytest.raises(UserError, match="no metric is called 'fid'"):
        sweep([teacher(tiny())], tmp_path / "out", metrics=["fid"])
    with pytest.raises(UserError, match="list of prompts is empty"):
        sweep([teacher(tiny())], tmp_path / "out", prompts=[])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        sweep([teacher(tmp_path)], tmp_path / "out", **OPTIONS)
    with pytest.raises(UserError, match="is not an export"):
        student(tmp_path)
    folder = export(tmp_path / "listed", call={"timesteps": [999, 400], "guidance_scale": 1.0})
    with pytest.raises(UserError, match="lists timesteps for 2 steps alone; export the student again for 4"):
        student(folder, steps=[2, 4])
    assert student(folder).settings == (Setting(2, 1.0, {"timesteps": [999, 400]}),)


def test_damaged_sweeps_are_named(tmp_path: Path, swept: Results) -> None:
    with pytest.raises(UserError, match=r"is not a sweep: .*results\.json cannot be read"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 2}')
    (tmp_path / "prompts.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json or prompts\.json is damaged"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 7}')
    with pytest.raises(UserError, match="has format 7, but this fastgen reads 2"):
        load_results(tmp_path)
    with pytest.raises(UserError, match="the images of real images are not in the sweep any more"):
        replace(swept, folder=tmp_path).images(swept.rows[0])
    (tmp_path / "values").mkdir()
    (tmp_path / "values" / "real.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="delete it to have its row measured again"):
        replace(swept, folder=tmp_path).values(swept.rows[0])


VOID = {"meta", "img", "br", "source"}


class Page(HTMLParser):
    """Collects what a page holds and checks that its elements are nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def decoded(uri: str) -> tuple[str, bytes]:
    kind, _, data = uri.removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data, validate=True)


def test_the_report_is_whole_and_asks_nothing_of_the_network(swept: Results) -> None:
    path = write_report(swept.folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == swept.folder / "report.html" and "://" not in text and "@import" not in text
    assert not page.all("script") and not page.all("link")
    assert text.count('<tr class="') == len(swept.rows)
    assert summary(swept.rows)[0] in page.words
    pictures = 0
    for attributes in page.all("img"):
        kind, data = decoded(attributes["src"])
        assert attributes["alt"]
        if kind == "image/png":
            assert Image.open(io.BytesIO(data)).size == (32, 32)
            pictures += 1
        else:
            assert kind == "image/svg+xml" and data.lstrip().startswith(b"<?xml")
    assert pictures == len(set(swept.prompts)) * len(example_rows(swept.rows))
    assert [decoded(each["srcset"])[0] for each in page.all("source")] == ["image/svg+xml"] * 6


def test_pictures_in_the_report_are_the_images_of_the_sweep(swept: Results) -> None:
    page = Page(html(swept, prompts=1))
    row = next(row for row in swept.rows if row.role == "student" and row.steps == 1)
    shown = next(each for each in page.all("img") if each["alt"].startswith("student with 1 step: "))
    picture = Image.open(io.BytesIO(decoded(shown["src"])[1]))
    assert picture.tobytes() == swept.pictures(row, [0])[0].permute(1, 2, 0).contiguous().numpy().tobytes()
    assert swept.prompts[0] in shown["alt"]


def test_names_from_outside_are_escaped(swept: Results) -> None:
    evil = "<script>alert(1)</script>"
    rows = [replace(row, name=evil) if row.role == "student" else row for row in swept.rows]
    text = html(replace(swept, rows=rows, prompts=[evil] * IMAGES), prompts=1)
    assert evil not in text and not Page(text).all("script")


def test_every_row_is_in_the_tables(swept: Results) -> None:
    lines = table(swept.rows).splitlines()
    assert len(lines) == 2 + len(swept.rows) and len({line.count("|") for line in lines}) == 1
    for row, line in zip(ordered(swept.rows), lines[2:], strict=True):
        found = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        assert found[0] == row.name and scored(row, "fd") in found
        low, high = row.intervals["fd"]
        value, half = scored(row, "fd").split(" ± ")
        assert value == number(row.scores["fd"]) and float(half) == pytest.approx((high - low) / 2, abs=0.51)
    for width in (80, 160):
        console = Console(width=width, file=io.StringIO(), record=True)
        print_table(swept.rows, console)
        told = console.export_text()
        assert all(number(row.scores["fd"]) in told for row in swept.rows) and "…" not in told


def test_figures_are_drawn(swept: Results, tmp_path: Path) -> None:
    path = write_figure(swept, tmp_path / "docs" / "figure.png")
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1200
    light, dark = (panel_svg(swept.rows, "calls", "fd", theme) for theme in (LIGHT, DARK))
    assert light != dark and light == panel_svg(swept.rows, "calls", "fd", LIGHT), "the same rows give the same file"
    with pytest.raises(UserError, match="has no scores to draw"):
        write_figure(replace(swept, rows=[]), tmp_path / "none.png")
    with pytest.raises(UserError, match="has no rows yet"):
        html(replace(swept, rows=[]))


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    rows = made_up(
        {"teacher 50": (100, 4), "teacher 2": (4, 47), "student 4": (4, 6), "student 1": (1, 15), "student 2": (2, 20)}
    )
    assert [f"{row.name} {row.steps}" for row in front(rows, "calls", "fd")] == ["student 1", "student 4", "teacher 50"]
    assert front(rows, "calls", "fd") == front(rows, "calls", "accuracy")


def test_the_summary_compares_equal_steps() -> None:
    rows = made_up({"teacher 50": (100, 4), "teacher 1": (2, 60), "student 1": (1, 15), "student 3": (3, 9)})
    sentences = summary(rows)
    assert sentences[0].startswith("At 1 step the Fréchet distance of the student is 0.25x the teacher's (15.0 against 60.0")
    assert (
        "keeps 27% of the strict accuracy that the teacher has at 50 steps, with 1 network call instead of 100" in sentences[1]
    )
    assert summary(rows[:2]) == ["Fréchet distance is best for teacher, 50 steps: 4.00."]


def test_guidance_scales_are_curves_of_their_own() -> None:
    rows = [replace(row, guidance=3.0) for row in made_up({"teacher 50": (100, 2), "teacher 4": (8, 5), "teacher 2": (4, 9)})]
    assert [curve.label for curve in curves(rows)] == ["teacher"]
    rows += [replace(row, guidance=1.0) for row in rows[1:]]
    made = curves([*made_up({"student 4": (4, 6)}), *rows])
    assert [curve.label for curve in made] == ["teacher, guidance 3", "teacher, guidance 1", "student"]
    assert [[row.steps for row in curve.rows] for curve in made] == [[2, 4, 50], [2, 4], [4]]


def test_distances_are_called_fid_where_inception_measured_them() -> None:
    rows = made_up({"teacher 4": (8, 9.0), "student 2": (2, 7.0)})
    assert "Fréchet distance ↓" in table(rows) and "FID" not in table(rows)
    for row in rows:
        row.features = "inception-v3-compat"
    assert "| FID ↓ |" in table(rows) and "FID" in latex(rows) and "Fréchet" not in table(rows)
