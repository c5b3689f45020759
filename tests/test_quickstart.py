"""The quickstart: the whole path at its smallest, and the promises it checks itself against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from fastgen.cli import main
from fastgen.cli.quickstart import RECIPE, STUDENT_STEPS, TEACHER_STEPS, recipe, verdicts
from fastgen.config import load
from fastgen.eval.results import Row


def row(role: str, steps: int, fd: float, accuracy: float) -> Row:
    scores = {"fd": fd, "accuracy": accuracy}
    return Row(role, role, steps, None, steps, 0.1, scores, "", f"{role}{steps}")  # type: ignore[arg-type]


def test_the_promises_are_held_to_what_was_measured() -> None:
    rows = [row("teacher", steps, fd, 0.8) for steps, fd in ((50, 1.0), (4, 10.0), (2, 50.0), (1, 100.0))]
    rows += [row("student", 4, 10.1, 0.7), row("student", 2, 40.0, 0.7), row("student", 1, 39.0, 0.71)]
    found = [(check["value"], check["met"]) for check in verdicts(rows)]
    assert found == [(0.39, True), (0.887, False), (0.8, True), (1.01, False)]


def test_the_recipe_gives_a_student_for_every_number_of_steps() -> None:
    config = load(recipe(RECIPE))
    assert config.method.stages == list(STUDENT_STEPS)  # type: ignore[attr-defined]
    ends = config.method.ends(config.train.steps)  # type: ignore[attr-defined]
    assert all(end % config.train.checkpoint_every == 0 for end in ends), "every stage ends in a checkpoint"


def test_the_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["train.steps=6", "train.checkpoint_every=1", "train.batch=2", "train.sample_every=0", "data.pool=64"]
    command = ["quickstart", *small, "--output", str(tmp_path / "out"), "--number", "20", "--quiet", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["role"], r["steps"]) for r in result["rows"][1:]] == [
        *(("teacher", steps) for steps in TEACHER_STEPS),
        *(("student", steps) for steps in STUDENT_STEPS),
    ]
    assert [r["calls"] for r in result["rows"][1:]] == [100, 8, 4, 2, 4, 2, 1], "the student needs no guidance pass"
    for name in ("report.html", "tradeoff.png", "quickstart.json", "run/checkpoints"):
        assert (tmp_path / "out" / name).exists()
    for steps in STUDENT_STEPS:
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / f"student-{steps}")
        images = pipeline("a small red ring", num_inference_steps=steps, guidance_scale=1.0, output_type="np").images
        assert images.shape == (1, 32, 32, 3)
    assert main(command) == 0, "a finished quickstart can be run again"
    again = json.loads(capsys.readouterr().out)
    assert [r["scores"] for r in again["rows"]] == [r["scores"] for r in result["rows"]]


def test_too_few_pictures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--number", "3"]) == 2
    assert "at least 20 pictures" in capsys.readouterr().err
