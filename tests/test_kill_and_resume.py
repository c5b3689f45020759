"""Runs killed with SIGKILL again and again, in the middle of writing a checkpoint too, end with every bit of one that was not.

The runs are real processes, forked so that imports are paid for once. Each tells through a pipe whenever an update is done or
a file of a checkpoint is written. It is killed right after so many such events, or a random fraction of a second later.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import TrainConfig
from fastgen.training import checkpoint
from fastgen.training.loop import Trainer
from fastgen.training.random_state import seed_everything
from tests.process_worlds import build, source

STEPS, SAVES, PAUSE = 40, 20, 0.005
OPTIONS = TrainConfig(
    steps=STEPS,
    batch=4,
    micro_batches=2,
    lr=1e-3,
    ema=0.9,
    ema_posthoc=True,
    warmup=10,
    log_every=3,
    checkpoint_every=STEPS // SAVES,
    keep_checkpoints=2,
    threads=1,
)
METHODS: dict[str, dict[str, Any]] = {
    "progressive": {"start_steps": 8, "stop_steps": 2},
    "lcm": {},
    "dmd2": {"steps": 2, "student_every": 2, "gan_weight": 0.1},
    "sid": {"steps": 1},
    "ladd": {"steps": 4, "early_updates": 2},
}


def go(name: str, folder: Path) -> None:
    """The run that is killed and started again: from its newest checkpoint, else from the beginning."""
    method, pipeline = build(name, METHODS[name], lora=False)
    seed_everything(5)
    loop = Trainer(method, source(pipeline), OPTIONS, run_directory=folder, device="cpu")
    start = checkpoint.choose(folder)
    if start is None and loop.metrics is not None:
        loop.metrics.cut(0)
    if start is not None:
        loop.load(start)
    loop.fit()


def tell(pipe: int, stop_at: int) -> None:
    """Let this process write a byte at every event, and stand still after the event `stop_at`."""
    events = itertools.count(1)
    update, write, finish = Trainer.update, checkpoint.write, checkpoint.finish

    def told(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            os.write(pipe, b".")
            if next(events) == stop_at:
                signal.pause()
            return result

        return call

    Trainer.update, checkpoint.write, checkpoint.finish = told(update), told(write), told(finish)  # type: ignore[method-assign]


def start(name: str, folder: Path, stop_at: int = 0) -> tuple[int, int]:
    """A run in a process of its own: its id, and the pipe that it tells its events through."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        torch.set_num_threads(1)
        tell(writing, stop_at)
        go(name, folder)
        status = 0
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(name: str, folder: Path) -> int:
    """Start or go on with a run, to its end; how many events that were."""
    pid, pipe = start(name, folder)
    events = 0
    while told := os.read(pipe, 4096):
        events += len(told)
    os.close(pipe)
    assert ended(pid) == 0
    return events


def kill(name: str, folder: Path, events: int, pause: float) -> None:
    """Start or go on with a run, and kill it after so many events and seconds; with no second to wait, exactly then."""
    pid, pipe = start(name, folder, 0 if pause else events)
    while events > 0:
        assert select.select([pipe], [], [], 120)[0], "the run stands still"
        told = os.read(pipe, events)
        assert told, "the run ended before it could be killed"
        events -= len(told)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    os.close(pipe)
    assert ended(pid) == -signal.SIGKILL


def everything(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict[str, float]]]:
    """All that a run leaves: the tensors and the state of its last checkpoint, and its metrics."""
    path = folder / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint.verify(path)
    tensors = {f"{file.stem}/{key}": value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tensors, checkpoint.read_state(path), [{key: line[key] for key in line if key != "time"} for line in lines]


def check(name: str, folder: Path, kills: int) -> None:
    straight, killed, chance = folder / "straight", folder / "killed", random.Random(name)
    for each in (straight, killed):
        each.mkdir()
    # At half the way on the average, less what is lost at every kill: the run does not come to its end before the last.
    events, halves = finish(name, straight) // kills, 0
    for i in range(kills):
        kill(name, killed, chance.randint(1, events), chance.uniform(0, PAUSE) if i % 2 else 0)
        halves += bool(list((killed / "checkpoints").glob(".step-*")))
    finish(name, killed)
    assert halves, "none was killed while it wrote a checkpoint"
    assert not list((killed / "checkpoints").glob(".step-*")), "what was left half written is gone"
    (tensors, state, lines), (found, found_state, found_lines) = everything(straight), everything(killed)
    assert {key.split("/")[0] for key in tensors} >= {"ema", "averages", "player-student", "optimizer-student", "random-00000"}
    assert tensors.keys() == found.keys()
    assert [key for key, value in tensors.items() if not torch.equal(value, found[key])] == []
    assert state == found_state and lines == found_lines
    assert state["step"] == STEPS and state["data"] != {} and len(lines) == STEPS // 3 + 1


def test_killed_three_times(tmp_path: Path) -> None:
    check("progressive", tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_killed_twenty_times(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, 20)
