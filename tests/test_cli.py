"""The command line as a user meets it: exit status, one-line mistakes, nothing overwritten, JSON where asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastgen.cli
from fastgen.cli import main
from fastgen.config import load
from fastgen.errors import UserError
from tests import tiny_models

ROOT = Path(__file__).parents[1]
CONFIG = """
pipeline = "{teacher}"
[method]
name = "dmd2"
gan_weight = 0.0
steps = 2
[data]
prompts = "{prompts}"
[train]
steps = 2
batch = 2
lr = 1e-4
threads = 1
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_models.toy().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "prompts.txt").write_text("a red cube\na blue ring\n")
    path = folder / "run.toml"
    path.write_text(CONFIG.format(teacher=teacher, prompts=folder / "prompts.txt"))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "deep" / "run"
    assert main(["distill", str(config), "--output", str(output), "train.lr=1e-3", "--quiet", "--device", "cpu"]) == 0
    return output


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a mistake prints: one line on standard error, nothing else, status 2."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# -- what goes well -------------------------------------------------------------------------------


def test_distill_keeps_the_resolved_run_and_goes_on(trained: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = load(trained / "config.toml")
    assert kept.train.lr == 1e-3 and kept.train.steps == 2 and kept.method.gan_weight == 0
    # As written before an option existed: what is not there has its default.
    written = (trained / "config.toml").read_text()
    (trained / "config.toml").write_text("".join(line for line in written.splitlines(True) if not line.startswith("schedule")))
    assert (trained / "config.toml").read_text() != written
    again = ["distill", str(config), "train.steps=3", "--output", str(trained), "train.lr=1e-3", "--quiet", "--json"]
    assert main([*again, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(trained), "method": "dmd2", "steps": 3}
    assert len((trained / "metrics.jsonl").read_text().splitlines()) >= 1


def test_sample_overwrites_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sample", str(trained), "a red cube", "a blue ring", "--number", "2", "--seed", "5", "-o", str(tmp_path / "out")]
    assert main([*argv, "--quiet", "--json", "--device", "cpu"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [(each["prompt"], each["seed"]) for each in made] == [(p, s) for p in ("a red cube", "a blue ring") for s in (5, 6)]
    pictures = [Image.open(each["path"]).tobytes() for each in made]
    assert len(set(pictures)) == 4
    assert main([*argv, "--quiet", "--json", "--device", "cpu"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert not {each["path"] for each in made} & {each["path"] for each in again}
    assert [Image.open(each["path"]).tobytes() for each in again] == pictures, "the same seed gives the same picture"


def test_sample_takes_a_diffusers_folder(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(teacher), "a red cube", "--steps", "2", "-o", str(tmp_path / "out"), "--json", "-q"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    with Image.open(made["path"]) as picture:
        assert picture.size[0] == picture.size[1] and made["path"].endswith("a-red-cube-000.png")


def test_an_export_draws_what_the_run_draws(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "student"
    assert main(["export", str(trained), "--output", str(student), "--json", "-q", "--device", "cpu"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["call"]["num_inference_steps"] == 2 and made["updates"] >= 2
    assert load(trained / "config.toml").to_toml() == json.loads((student / "fastgen.json").read_text())["record"]["config"]
    pictures = []
    for target in (trained, student):
        assert main(["sample", str(target), "a red cube", "--seed", "3", "-o", str(tmp_path / "out"), "--json", "-q"]) == 0
        pictures.append(np.asarray(Image.open(json.loads(capsys.readouterr().out)[0]["path"]), dtype=int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    asked = ("a red cube", "--guidance", "2", "-o", tmp_path / "other")
    assert "was made for guidance_scale = 1.0, not for 2.0" in complaint(capsys, "sample", student, *asked)
    assert "guidance 1, not for" in complaint(capsys, "sample", trained, *asked)
    assert "not for FewStep, 1 step" in complaint(capsys, "sample", trained, "a red cube", "--steps", "1")
    for target, flags in ((trained, ["--steps", "1"]), (student, ["--guidance", "2"])):
        forced = [*flags, "--force", "--output", str(tmp_path / "forced"), "--quiet", "--device", "cpu"]
        assert main(["sample", str(target), "a red cube", *forced]) == 0
    assert len(list((tmp_path / "forced").iterdir())) == 2
    assert "exists already" in complaint(capsys, "export", trained, "--output", student)
    assert main(["export", str(trained), "--output", str(student), "--force", "-q", "--device", "cpu"]) == 0
    assert "roles.student" in complaint(capsys, "export", trained, "-q", "-o", tmp_path / "l", "--format", "diffusers-lora")
    assert "--format zip" in complaint(capsys, "export", trained, "--output", tmp_path / "x", "--format", "zip")


def test_eval_and_sweep_measure_through_plain_diffusers(
    trained: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--number", "8", "--batch", "8", "--json", "-q", "--device", "cpu", "--offline"]
    record = tmp_path / "record.json"
    assert main(["eval", str(trained), "--output", str(record), *few]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured == json.loads(record.read_text())
    assert 0 <= measured["scores"]["accuracy"] <= 1 and measured["settings"]["target"] == str(trained)
    assert "exists already" in complaint(capsys, "eval", trained, "--output", record, "-q")
    assert "did you mean 'accuracy'" in complaint(capsys, "eval", trained, "-q", "--metrics", "acuracy")
    assert "--number must be at least 1" in complaint(capsys, "eval", trained, "-q", "--number", "0")
    sweep = ["sweep", str(trained), "--teacher-steps", "2,1", "--output", str(tmp_path / "sweep"), *few]
    sweep += ["--attention", "native_math"]
    assert main(sweep) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [(row["role"], row["steps"]) for row in result["rows"]]
    assert rows == [("real", 0), ("teacher", 2), ("teacher", 1), ("student", 2)]
    assert {row["protocol"]["attention"] for row in result["rows"][1:]} == {"_native_math"}
    assert "<html" in Path(result["report"]).read_text()
    with Image.open(result["figure"]) as figure:
        assert figure.size[0] > 100
    assert "is neither a run directory nor an export" in complaint(capsys, "sweep", teacher, "-o", tmp_path / "other", "-q")
    assert "whole numbers from 1" in complaint(capsys, "sweep", trained, "--steps", "4,x", "-o", tmp_path / "other")


def test_methods_are_listed_and_one_explained(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"dmd2", "lcm", "progressive"} <= set(listed)
    for name in listed:
        assert main(["methods", name, "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert about["summary"] and all(option["help"] for option in about["options"]), "every option has a line of help"
        start = tmp_path / f"{name}.toml"
        assert main(["methods", name, "--output", str(start)]) == 0
        assert load(start).method_name == name
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in listed)
    assert next(line for line in lines if line.startswith("dmd2 ")).endswith("images, prompts teacher, student, fake_score")


def test_pipelines_tells_what_it_sees(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipelines"]) == 0
    assert "Flux" in capsys.readouterr().out
    assert main(["pipelines", str(teacher), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["class"] == "StableDiffusionPipeline" and seen["latent shape"][1:] == [8, 8] and seen["LoRA targets"]


def test_doctor_looks_at_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) in (0, 2)
    report = json.loads(capsys.readouterr().out)
    topics = {each["topic"]: each["status"] for each in report["findings"]}
    assert {"python", "cpu", "threads", "memory", "attention", "toy weights", "output", "model cache"} <= set(topics)
    assert report["wrong"] == sum(status == "wrong" for status in topics.values())


def test_doctor_says_that_weights_are_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastgen.cli.doctor.Path.rglob", lambda *args: [])
    assert main(["doctor"]) == 2
    assert "wrong    toy weights" in capsys.readouterr().out


# -- mistakes -------------------------------------------------------------------------------------


def test_unknown_words_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no command 'distil'; did you mean 'distill'?" in complaint(capsys, "distil", "x.toml")
    assert "unknown argument '--jsn'; did you mean '--json'?" in complaint(capsys, "methods", "--jsn")
    assert "there is no method 'lcn'; did you mean 'lcm'?" in complaint(capsys, "methods", "lcn")
    assert "--output" in complaint(capsys, "distill", "x.toml")


def test_mistakes_in_distill(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"

    def wrong(*argv: object) -> str:
        message = complaint(capsys, "distill", config, "--output", output, "--quiet", *argv)
        assert not output.exists() or not any(output.iterdir()), "nothing is left behind"
        return message

    assert "there is no such file" in complaint(capsys, "distill", tmp_path / "none.toml", "--output", output)
    assert "did you mean 'steps'?" in wrong("train.stpes=4")
    assert "train.steps must be at least 1, not -4" in wrong("train.steps=-4")
    assert "there is no method 'dmd3'" in wrong("method.name=dmd3")
    assert "seed must be at least 0, not -1" in wrong("--seed", "-1")
    assert "does not exist" in wrong("pipeline=./nowhere")
    assert "is not a diffusers pipeline folder" in wrong(f"pipeline={tmp_path}")
    assert "--device warp" in wrong("--device", "warp")
    assert "none.txt" in wrong("data.prompts=none.txt")
    assert "none.safetensors" in wrong('teacher_loras=["none.safetensors"]')
    (tmp_path / "file").write_text("mine")
    assert "file" in complaint(capsys, "distill", config, "--quiet", "--output", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_mistakes_with_a_run(trained: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {each: each.stat().st_mtime_ns for each in trained.rglob("*") if each.is_file()}
    assert "train.lr" in complaint(capsys, "distill", config, "--quiet", "--output", trained, "train.lr=0.5")
    assert "--resume" in complaint(capsys, "distill", config, "--quiet", "--output", trained, "--resume", "never")
    assert {each: each.stat().st_mtime_ns for each in trained.rglob("*") if each.is_file()} == before
    assert "--steps must be at least 1" in complaint(capsys, "sample", trained, "x", "--steps", "0", "-o", tmp_path / "o")
    assert "--number" in complaint(capsys, "sample", trained, "x", "--number", "0", "-o", tmp_path / "o")
    assert "nowhere" in complaint(capsys, "sample", tmp_path / "nowhere", "x", "-o", tmp_path / "o")
    assert "is not a diffusers pipeline folder" in complaint(capsys, "sample", tmp_path, "x", "-o", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_result_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "exists already" in complaint(capsys, "methods", "--output", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


# -- exit status ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("one\n  sentence"), 2, "error: one sentence\n"),
        (OSError(28, "No space left", "weights.safetensors"), 2, "error: weights.safetensors: No space left\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("ours"), 1, "a fault of fastgen's"),
    ],
)
def test_exit_status(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(fastgen.cli, "dispatch", fail)
    assert main([]) == status
    err = capsys.readouterr().err
    assert words in err and ("Traceback" in err) == (status == 1)


def test_a_signal_stops_a_run_with_a_checkpoint(config: Path, tmp_path: Path) -> None:
    argv = ["distill", str(config), "train.steps=1000000", "train.log_every=1", "--output", str(tmp_path / "run"), "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "fastgen", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not lines(tmp_path / "run" / "metrics.jsonl"):
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_closed_pipe_is_nobodys_fault() -> None:
    script = f"{sys.executable} -m fastgen methods --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
