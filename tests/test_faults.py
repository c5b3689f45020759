"""Whatever goes wrong in a run has an action and a sentence: disks, numbers, processes, files of others."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastgen.config import TrainConfig, load
from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.method import Batch, Player
from fastgen.training import checkpoint, faults
from fastgen.training.faults import SAVE_TRIES, SKIP_LIMIT, Blame, why_skipped
from fastgen.training.launch import Interrupted
from fastgen.training.loop import Trainer
from fastgen.training.progress import Reporter
from tests.training_fakes import Duel, FakePipeline, fake_source, same, weights

OPTIONS = TrainConfig(steps=8, batch=2, lr=1e-2, log_every=1, checkpoint_every=2, keep_checkpoints=2, ema=0.9)


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True))
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def trainer(folder: Path | None = None, options: TrainConfig = OPTIONS, method: Duel | None = None, **rest: Any) -> Trainer:
    torch.manual_seed(0)
    method, pipeline = method or Duel(), FakePipeline()
    method.setup(pipeline)
    rest.setdefault("reporter", Lines())
    return Trainer(method, fake_source(pipeline), options, run_directory=folder, device="cpu", **rest)


def said(loop: Trainer) -> list[str]:
    """What was said of disks."""
    assert isinstance(loop.reporter, Lines)
    return [line for line in loop.reporter.lines if "written" in line]


# -- disks ------------------------------------------------------------------------------------------


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The disk is full, and after so many attempts to write a player's weights there is room again."""
    left, save = [times], checkpoint.save_file

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        if path.name == "player-student.safetensors" and left[0]:
            left[0] -= 1
            path.write_bytes(b"half")
            full()
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_a_full_disk_costs_a_checkpoint_and_the_next_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole", method=made(tmp_path / "whole"))
    whole.fit()
    folder = tmp_path / "run"
    loop = trainer(folder, method=made(folder))
    for _ in range(2):
        loop.update()
    loop.save()
    refuse(monkeypatch, SAVE_TRIES - 1)
    loop.fit()
    steps = [checkpoint.step_of(path) for path in checkpoint.find(folder)]
    assert steps == [2, 8] and len(said(loop)) == 2
    assert all(
        re.search(rf"update {n}; the last.*step-00000002: \S*/checkpoints: cannot.*No space left.*tries again", s)
        for n, s in zip((4, 6), said(loop), strict=True)
    )
    assert not list((folder / "checkpoints").glob(".*")), "what could not be finished does not fill the disk"
    assert same(weights(whole.method.trained), weights(loop.method.trained)), "nothing of it reaches the weights"


def made(folder: Path) -> Duel:
    folder.mkdir()
    return Duel()


def test_a_disk_that_stays_full_ends_the_run_and_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = trainer(tmp_path, replace(OPTIONS, steps=99))
    for _ in range(2):
        loop.update()
    loop.save()
    refuse(monkeypatch, 99)
    with pytest.raises(
        UserError, match=r"no checkpoint could be written after update 8; the last.*step-00000002: .*No space left"
    ):
        loop.fit()
    assert loop.step == 2 + 2 * SAVE_TRIES and len(said(loop)) == SAVE_TRIES - 1
    path = checkpoint.choose(tmp_path)
    assert path is not None and checkpoint.step_of(path) == 2
    with pytest.raises(UserError, match="no checkpoint could be written after update 2; "):
        last = trainer(tmp_path / "last", replace(OPTIONS, steps=2), made(tmp_path / "last"))
        last.fit()


def test_a_full_disk_costs_no_line_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = trainer(tmp_path, replace(OPTIONS, checkpoint_every=0, steps=5))
    sync, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if 2 <= len(calls) <= 3:
            full()
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(4):
        loop.update()
        loop.log()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert [re.sub(r"/\S*/", "", line) for line in said(loop)] == [
        f"update {n}: metrics.jsonl: cannot be written (No space left on device); training goes on" for n in (2, 3)
    ]


def test_a_fault_of_ours_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def wrong() -> None:
        raise UserError("not the disk")

    with pytest.raises(UserError, match="not the disk"):
        faults.disk_refused(wrong)
    with pytest.raises(ZeroDivisionError):
        faults.disk_refused(lambda: 1 // 0)
    assert "No space left" in str(faults.disk_refused(full)) and faults.disk_refused(lambda: None) is None


def test_a_signal_on_a_full_disk_says_that_nothing_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Signalled(Lines):
        def advance(self, step: int, losses: Any = None) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    refuse(monkeypatch, 99)
    loop = trainer(tmp_path, replace(OPTIONS, checkpoint_every=0), reporter=Signalled())
    with pytest.raises(UserError, match=r"no checkpoint could be written after update 3; nothing was saved: .*No space left"):
        loop.fit()


# -- signals ----------------------------------------------------------------------------------------


def test_a_second_signal_stops_what_ignored_it_before(tmp_path: Path) -> None:
    class Twice(Lines):
        def advance(self, step: int, losses: Any = None) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a script starts in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, reporter=Twice()).fit()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "it is ignored again"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once(tmp_path: Path, number: int, status: int) -> None:
    class Twice(Lines):
        def advance(self, step: int, losses: Any = None) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # two at the same moment may count as one
            os.kill(os.getpid(), number)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)

    before = signal.signal(number, stop)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            trainer(tmp_path, reporter=Twice()).fit()
    finally:
        signal.signal(number, before)
    assert caught.type is (KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    assert checkpoint.find(tmp_path) == [] and Interrupted(number, 1).status == status


# -- numbers that are not finite --------------------------------------------------------------------


def test_a_bad_number_in_the_data_is_named_and_never_reaches_weights(tmp_path: Path) -> None:
    loop = trainer(tmp_path, replace(OPTIONS, steps=99))
    for _ in range(2):
        loop.update()
    loop.save()
    before = [weights(turn.player.weights) for turn in loop.turns]
    loop.data.latents = torch.full_like(loop.data.latents, torch.nan)  # type: ignore[arg-type]
    sentence = rf"'student' was not finite {SKIP_LIMIT} times in a row: the data.*`latents`.*after update 21.*step-00000020"
    with pytest.raises(UserError, match=sentence):
        loop.fit()
    assert all(same(kept, weights(turn.player.weights)) for kept, turn in zip(before, loop.turns, strict=True))
    assert all(value.isfinite().all() for value in checkpoint.read(checkpoint.find(tmp_path)[-1], "ema").values())


def test_one_bad_sample_costs_the_updates_that_meet_it() -> None:
    loop = trainer(options=replace(OPTIONS, steps=11))  # two epochs of eleven samples, two a turn, two turns an update
    assert loop.data.latents is not None
    loop.data.latents[4] = torch.inf
    loop.fit()
    student, critic = loop.turns
    assert int(student.skipped) + int(critic.skipped) == 4
    assert all(weight.isfinite().all() for turn in loop.turns for weight in turn.weights)


def test_the_place_of_the_first_bad_number_is_told_apart() -> None:
    blame, one, bad = Blame(torch.device("cpu")), torch.ones(()), torch.ones(2) * torch.nan

    def batch(**bad: Tensor) -> Batch:
        text = bad.pop("text", torch.ones(2))
        return Batch(Condition({"text": text, "mask": torch.ones(2, dtype=torch.long)}), (2,), **bad)

    def turn(batch: Batch, loss: Tensor, skipped: float = 1.0) -> dict[str, int]:
        blame.look(batch, loss)
        blame.end_turn(torch.tensor(skipped))
        return {name: count for name, count in blame.counts().items() if count}

    assert turn(batch(text=bad), one) == {"condition": 1}
    assert turn(batch(noise=bad), one * torch.inf) == {"condition": 1, "noise": 1, "loss": 1}
    assert turn(batch(), one * torch.nan) == {"condition": 1, "noise": 1, "loss": 2}
    assert turn(batch(), one, skipped=0) == {}, "a finite gradient forgets what was before"
    assert turn(batch(latents=torch.ones(2), target=bad), one) == {"target": 1}


@pytest.mark.parametrize(
    ("counts", "precision", "words"),
    [
        ({"target": 3}, "fp32", "the data hold values that are no numbers (`target` of the batch); check the files"),
        ({"loss": 3}, "fp32", "the data are finite but its loss student/x is not; train.lr = 0.5 is probably too high"),
        ({"loss": 3}, "fp16", 'fp16 ends at 65504, so try train.precision = "bf16"'),
        ({}, "bf16", "its loss is finite but the gradient overflows; lower train.lr = 0.5 or a loss weight"),
    ],
)
def test_the_sentence_names_the_likely_cause(counts: dict[str, int], precision: str, words: str) -> None:
    every = dict.fromkeys(faults.PLACES, 0) | counts
    terms = {
        "critic/y": torch.tensor(torch.nan),
        "student/x": torch.tensor(torch.inf),
        "student/gradient_norm": torch.tensor(torch.nan),
    }
    sentence = why_skipped("student", 20, every, terms, lr=0.5, precision=precision)
    assert words in sentence and "critic/y" not in sentence and "gradient_norm" not in sentence


class Sharp(Duel):
    """A loss that is finite, and a gradient that is not."""

    def student_loss(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().student_loss(batch)
        return terms | {"sharp": (terms["follow"] * 0).sqrt()}


def test_a_gradient_that_overflows_under_a_finite_loss_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'student' .* its loss is finite but the gradient overflows.*nothing was saved"):
        trainer(tmp_path, replace(OPTIONS, steps=99, checkpoint_every=0), Sharp()).fit()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_not_trained(dtype: torch.dtype) -> None:
    class Half(Duel):
        def setup(self, pipeline: Any) -> None:
            super().setup(pipeline)
            self.critic.to(dtype)

    with pytest.raises(UserError, match=rf"player 'critic' trains weights of {str(dtype)[6:]}.*float32"):
        trainer(method=Half())


# -- files and options of others --------------------------------------------------------------------


def test_no_name_of_a_player_leads_out_of_the_run_directory(tmp_path: Path) -> None:
    class Outward(Duel):
        def players(self) -> list[Player]:
            return [replace(player, name=f"../../{player.name}") for player in super().players()]

    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"'optimizer-\.\./\.\./student' cannot be the name of a file"):
        trainer(folder, method=(folder.mkdir(), Outward())[1]).save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "key", ["trust_remote_code", "data.trust_remote_code", "train.trust_remote_code", "lora.trust_remote_code"]
)
def test_no_configuration_lets_foreign_code_run(key: str, tmp_path: Path) -> None:
    table, _, name = key.rpartition(".")
    text = f"[{table}]\n{name} = true\n" if table else f"{name} = true\n"
    path = tmp_path / "run.toml"
    path.write_text(f'{text}[method]\nname = "lcm"\n' if table else f'{text}\n[method]\nname = "lcm"\n')
    with pytest.raises(UserError, match="trust_remote_code"):
        load(path)
    path.write_text('[method]\nname = "lcm"\n')
    with pytest.raises(UserError, match="trust_remote_code"):
        load(path, [f"{key}=true"])


def calls() -> list[tuple[Path, ast.Call]]:
    package = Path(checkpoint.__file__).parents[1]
    files = ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(package.rglob("*.py")))
    return [(path, node) for path, tree in files for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_and_no_foreign_code_is_asked_for() -> None:
    unsafe = {"torch.load", "pickle.load", "pickle.loads", "np.load", "numpy.load", "joblib.load", "dill.load", "marshal.loads"}
    found = 0
    for path, call in calls():
        options = {each.arg: getattr(each.value, "value", each.value) for each in call.keywords}
        assert options.get("trust_remote_code", False) is False, f"{path}: foreign code"
        name = ast.unparse(call.func)
        if name in unsafe:
            found += 1
            safe = options.get("weights_only") is True if name == "torch.load" else options.get("allow_pickle") is False
            assert safe and not name.startswith(("pickle", "joblib", "dill", "marshal")), f"{path}: {name}"
    assert found, "the statistics of others are read by numpy and torch"
