"""The report of a run, the measure of quality with the best kept, early stopping, and trackers that fail."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.samplers import FewStep, even_times
from fastgen.training import checkpoint
from fastgen.training.best import Best, find_best, keep
from fastgen.training.curves import curves, spark, thinned, ticks
from fastgen.training.gauges import gauge
from fastgen.training.grids import Grids
from fastgen.training.launch import make_accelerator
from fastgen.training.loop import Trainer
from fastgen.training.progress import Reporter, shown
from fastgen.training.quality import Quality, features, frechet
from fastgen.training.report import GRIDS, LINES, page, read_lines, write_report
from fastgen.training.trackers import Trackers
from tests.test_eval_report import BROWSER, BROWSERS, browse
from tests.training_fakes import PROMPTS, Duel, FakePipeline, fake_source

OPTIONS = TrainConfig(steps=6, batch=4, lr=1e-3, log_every=2, checkpoint_every=0, sample_every=2, quality_every=2)
TEACHER = FewStep(even_times(4))


def trained(folder: Path, values: list[float] | None = None, method: Duel | None = None, **options: Any) -> Trainer:
    """A run of the fakes with everything that is shown; `values` are put in the place of its measurements of quality."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    pipeline: Any = FakePipeline()
    method = method or Duel()
    method.setup(pipeline)
    grids = Grids(pipeline, folder / "samples", PROMPTS[:2], teacher=TEACHER)
    quality = Quality(pipeline, folder / "samples", PROMPTS, teacher=TEACHER, samples=8)
    if values is not None:
        given = iter(values)
        quality.measure = lambda *args: {"quality": next(given)}  # type: ignore[method-assign]
    console = Console(file=io.StringIO(), width=400)
    loop = Trainer(
        *(method, fake_source(pipeline), replace(OPTIONS, **options)),
        **{"run_directory": folder, "device": "cpu", "grids": grids, "quality": quality},
        reporter=Reporter(console=console),
        texts={"config.toml": 'pipeline = "toy"\n'},
    )
    (folder / "config.toml").write_text('pipeline = "toy <b>"\n[method]\nname = "duel"\n[train]\nsteps = 6\n')
    (folder / "environment.json").write_text(json.dumps({"python": "3", "packages": {"torch": "2"}}))
    return loop


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "run"
    trained(folder).fit()
    return folder


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- the report ---------------------------------------------------------------------------------------


def test_a_run_leaves_a_report_that_asks_nothing_of_the_network(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text and "<script" not in text
    for title in ("Health", "Quality", "Pictures", "Losses", "Gradients and learning rate", "Configuration", "Environment"):
        assert f"<h2>{title}</h2>" in text
    assert "toy &lt;b&gt;" in text and "<b>toy" not in text and "6 of 6 updates" in text
    for each in ("student", "critic", "follow", "doubt", "fit"):
        assert each in text
    assert text.count("<img ") == 3 and "prefers-color-scheme: dark" in text
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed")
@pytest.mark.slow
def test_a_browser_shows_it(run: Path, tmp_path: Path) -> None:
    found, messages = browse(run / "report.html", tmp_path)
    assert messages == [] and found["images"] == 3 and found["broken"] == 0 and not found["wide"]


def test_readings_that_are_not_green_come_first_with_what_to_try(tmp_path: Path) -> None:
    line = {"step": 3, "reading/pull": 0.5, "reading/contrast": 2.0, "reading/fake_score_error": 1.2,
            "reading/fake_score_error/t0.125": 1.2, "health": {"contrast": "red"}, "lr": 1e-4}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "lo')
    text = page(tmp_path)
    advice = gauge("contrast").high
    assert advice is not None and advice.remedy in text and text.index("Contrast") < text.index("Pull on the samples")
    assert gauge("pull").high.remedy not in text and "t 0.125: 1.2" in text  # type: ignore[union-attr]
    assert "Environment" not in text and "Pictures" not in text


def test_a_long_run_is_thinned_but_what_was_wrong_is_kept(tmp_path: Path) -> None:
    text = [
        json.dumps({"step": i, "lr": 1.0} | ({"health": {"pull": "red"}} if i == 7777 else {})) for i in range(1, 9 * LINES)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(text))
    steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert len(steps) <= LINES + 2 and 7777 in steps and steps[-1] == 9 * LINES - 1
    (tmp_path / "samples").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"step-{i:08d}.png")
    shown = page(tmp_path)
    assert shown.count("<img ") == GRIDS and "After update 39." in shown and "After update 0." in shown
    assert page(tmp_path / "nothing").count("<section>") == 0


def test_a_report_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(tmp_path / "missing")


def test_curves_thin_their_points_and_choose_their_scale() -> None:
    assert thinned([(i, float(i)) for i in range(1000)], 10)[0] == (99, 49.5)
    assert thinned([(0, 1.0), (1, math.nan), (2, 3.0)]) == [(0, 1.0), (2, 3.0)]
    assert ticks(1e-4, 1e2, True) == pytest.approx([1e-4, 1e-2, 1e0, 1e2])
    assert 3 <= len(ticks(0.0, 0.7, False)) <= 6 and 3 <= len(ticks(-3.0, 11.0, False)) <= 6
    assert curves({"a": [(1, math.nan)]}, about="x") == ""
    drawn = curves({"a<": [(1, 2.0)], "b": [(1, 1.0), (2, 5.0)]}, about='"x"')
    assert drawn.count("<circle") == 1 and drawn.count("<polyline") == 1 and "a&lt;" in drawn and "nan" not in drawn
    strip = spark([(i, 1.0) for i in range(100)], ["green"] * 99 + ["red"])
    assert strip.count('class="red"') == 1 and strip.count("<rect") == 40


# -- quality ------------------------------------------------------------------------------------------


def test_the_distance_is_frechets_and_orders_what_is_farther() -> None:
    torch.manual_seed(0)
    one = torch.randn(4000, 5, dtype=torch.float64)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, 2 * one + 3) == pytest.approx(5 * (9 + 1), rel=0.05)
    assert frechet(one, one * math.nan) == math.inf
    for shape in ((3, 8, 8), (4, 2, 2), (3, 2, 8, 8), (6, 5)):
        x = torch.randn(200, *shape)
        found = [frechet(features(x), features(y)) for y in (torch.randn_like(x), 0.7 * x, 0.7 * x + 0.7)]
        assert features(x).shape[0] == 200 and found == sorted(found), shape
    assert torch.equal(features(x), features(x.clone())), "the weights are fixed"


def test_the_teachers_samples_are_drawn_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = FakePipeline()
    method = Duel()
    method.setup(pipeline)
    state = torch.get_rng_state()
    first = Quality(pipeline, tmp_path, PROMPTS, teacher=TEACHER, samples=8)
    found = first.measure(method)
    assert torch.equal(torch.get_rng_state(), state) and set(found) == {"quality"}
    drawn: list[Any] = []
    again = Quality(pipeline, tmp_path, PROMPTS, teacher=TEACHER, samples=8)
    original = again.draw

    def counted(denoiser: Any, sampler: Any) -> Tensor:
        drawn.append(sampler)
        return original(denoiser, sampler)

    monkeypatch.setattr(again, "draw", counted)
    assert again.measure(method) == found and drawn == [method.sampler()]
    other = Quality(pipeline, tmp_path, PROMPTS[:3], teacher=TEACHER, samples=8)
    assert len(other.condition) == 8 and other.measure(method) != found, "other prompts have other samples"
    grids = Grids(pipeline, tmp_path, PROMPTS[:2], teacher=TEACHER)
    shown = grids.teachers()
    monkeypatch.setattr(Grids, "sample", lambda *args: pytest.fail("drawn again"))
    assert torch.equal(Grids(pipeline, tmp_path, PROMPTS[:2], teacher=TEACHER).teachers(), shown)


def test_the_best_is_kept_apart_and_found_by_name(tmp_path: Path) -> None:
    loop = trained(tmp_path / "run", [3.0, 1.0, 2.0], keep_checkpoints=1)
    loop.fit()
    best = find_best(tmp_path / "run")
    assert best == tmp_path / "run" / "best" / "step-00000004" and loop.best.value == 1.0 and loop.best.waited == 1
    checkpoint.verify(best)
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["step-00000006"]
    assert [line["quality"] for line in written(tmp_path / "run")] == [3, 1, 2]
    with pytest.raises(UserError, match=r"no best checkpoint; it is kept where train\.quality_every is set"):
        find_best(tmp_path)


def test_training_ends_when_quality_does_not_get_better(tmp_path: Path) -> None:
    loop = trained(tmp_path / "run", [2.0, math.inf, 2.0], steps=20, patience=2)
    loop.fit()
    text = loop.reporter.console.file.getvalue()  # type: ignore[attr-defined]
    assert loop.step == 6 and "no better quality in 2 measurements" in text
    assert [path.name for path in checkpoint.find(tmp_path / "run")][-1] == "step-00000006"
    again = trained(tmp_path / "run", [], steps=20, patience=2)
    again.load(tmp_path / "run" / "checkpoints" / "step-00000006")
    again.fit()
    assert again.step == 6 and (again.best.value, again.best.waited) == (2.0, 2), "a run that goes on remembers"


def test_best_counts_what_it_waits_for() -> None:
    best = Best(patience=2)
    assert [best.add(value) for value in (3.0, 3.0, 2.0, math.nan, 2.5)] == [True, False, True, False, False]
    assert best.exhausted and not Best().exhausted


def test_files_of_the_best_survive_the_checkpoint_they_came_from(tmp_path: Path) -> None:
    source = tmp_path / "checkpoints" / "step-00000002"
    source.mkdir(parents=True)
    (source / "state.json").write_text("{}")
    kept = keep(source, tmp_path)
    shutil.rmtree(source)
    assert (kept / "state.json").read_text() == "{}"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        keep(tmp_path / "nowhere", tmp_path)


# -- trackers -----------------------------------------------------------------------------------------


class Broken:
    """A tracker whose connection is lost after some lines."""

    name = "broken"

    def __init__(self, lasts: int):
        self.lasts, self.lines = lasts, []  # type: ignore[var-annotated]

    def log(self, values: dict[str, float], step: int) -> None:
        if len(self.lines) >= self.lasts:
            raise ConnectionError("the service is gone\nand more")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.lines.append("finished")


class Fake:
    def __init__(self, *trackers: Any):
        self.trackers, self.log_with = list(trackers), []  # type: ignore[var-annotated]


def test_a_tracker_that_fails_is_told_of_once_and_left_out(tmp_path: Path) -> None:
    loop = trained(tmp_path / "run", quality_every=0)
    lost, sound = Broken(1), Broken(10)
    loop.trackers.accelerator = Fake(lost, sound)  # type: ignore[assignment]
    loop.fit()
    loop.trackers.finish()
    assert loop.step == 6 and len(lost.lines) == 1 and [line[0] for line in sound.lines[:-1]] == [2, 4, 6]
    assert sound.lines[-1] == "finished" and all(isinstance(v, float | int) for v in sound.lines[0][1].values())
    text = loop.reporter.console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("tracker 'broken' failed to log (the service is gone); training goes on without it") == 1


def test_a_tracker_that_does_not_start_is_left_out() -> None:
    class Accelerator(Fake):
        def init_trackers(self, project: str, config: dict[str, Any]) -> None:
            (only,) = self.log_with
            if only == "bad":
                raise RuntimeError("no network")
            self.trackers = [only]

    said: list[str] = []
    accelerator = Accelerator()
    accelerator.log_with = ["one", "bad", "two"]
    Trackers(accelerator, said.append).start("fastgen", {"a": 1})  # type: ignore[arg-type]
    assert accelerator.trackers == ["one", "two"] and accelerator.log_with == ["one", "bad", "two"]
    assert said == ["tracker 'bad' could not be started (no network); training goes on without it"]


def test_patience_without_measurements_is_refused() -> None:
    with pytest.raises(UserError, match=r"patience = 3 needs measurements of quality"):
        TrainConfig(patience=3)


def test_a_tracker_that_is_missing_is_told_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    for name, extra in (
        ("wandb", r"pip install 'fastgen-diffusion\[trackers\]', or wandb alone"),
        ("comet_ml", "pip install comet_ml"),
    ):
        with pytest.raises(UserError, match=f"tracker '{name}' is not installed: {extra}; or leave it out"):
            make_accelerator("fp32", "cpu", trackers=[name])


def test_progress_shows_a_loss_of_every_player_speed_and_memory() -> None:
    values = {
        "a/x": 1.0,
        "a/y": 2.0,
        "a/z": 3.0,
        "a/gradient_norm": 9.0,
        "b/x": 4.0,
        "b/lr": 1.0,
        "reading/pull": 1.0,
        "lr": 1.0,
    }
    assert shown(values) == ["a/x", "a/y", "a/z", "b/x"] and shown(values | {"c/x": 1.0}) == ["a/x", "a/y", "b/x", "c/x"]
    console = Console(file=io.StringIO(), width=400)
    reporter = Reporter(console=console, images=12)
    reporter.start(0, 2)
    reporter.advance(2, values)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "images/s" in text and "GiB" in text and "b/x 4" in text and "gradient_norm" not in text
