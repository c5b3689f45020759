"""Runs of several processes of which one dies, is told to end or cannot write: the others hear of it, and it goes on later."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.training import checkpoint, faults
from fastgen.training.launch import Interrupted, processes, rank
from tests.process_worlds import free_port, learnt, train
from tests.test_faults import OPTIONS, Lines, full, trainer


def in_world(rank: int, processes: int, port: int, folder: Path, task: Callable[[Path], None]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        task(folder)
    except (UserError, Interrupted) as error:
        (folder / f"sentence-{rank}").write_text(str(error))
        os._exit(error.status if isinstance(error, Interrupted) else 2)
    os._exit(0)


def world(processes: int, folder: Path, task: Callable[[Path], None]) -> Any:
    """So many processes over gloo; what ends one in words is written to sentence-RANK."""
    arguments = (processes, free_port(), folder, task)
    return mp.start_processes(in_world, arguments, nprocs=processes, start_method="fork", join=False).processes


class Slow(Lines):
    def advance(self, step: int, losses: Any = None) -> None:
        time.sleep(0.02)


def long_run(folder: Path) -> None:
    trainer(folder, replace(OPTIONS, steps=100_000, checkpoint_every=5), reporter=Slow()).fit()


def ends(found: Any, seconds: float = 60) -> list[int]:
    for process in found:
        process.join(seconds)
    codes = [process.exitcode for process in found]
    for process in found:
        process.kill()
    return codes


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("dying", [0, 1])
def test_the_others_end_in_words_when_a_process_is_killed(dying: int, tmp_path: Path) -> None:
    found = world(2, tmp_path, long_run)
    wait_for(lambda: len(checkpoint.find(tmp_path)) > 1)
    found[dying].kill()
    codes = ends(found)
    assert codes[dying] == -signal.SIGKILL and codes[1 - dying] == 2
    sentence = (tmp_path / f"sentence-{1 - dying}").read_text()
    assert re.match(
        r"another process of this run has ended or does not answer, after update \d+; the last checkpoint is", sentence
    )
    assert re.search(r"\(Connection \w+( by peer)?\)$", sentence)
    path = checkpoint.latest_good(tmp_path)
    assert path is not None and str(path.parent) in sentence


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_ends_all_with_one_checkpoint(told: int, tmp_path: Path) -> None:
    found = world(2, tmp_path, long_run)
    wait_for(lambda: len(checkpoint.find(tmp_path)) > 0)
    os.kill(found[told].pid, signal.SIGTERM)
    assert ends(found) == [143, 143]
    sentences = {(tmp_path / f"sentence-{i}").read_text() for i in range(2)}
    step = checkpoint.step_of(checkpoint.choose(tmp_path) or tmp_path)
    assert sentences == {f"SIGTERM after update {step}; a checkpoint was saved"}


DISTILLED = TrainConfig(steps=500, batch=4, lr=1e-3, log_every=5, checkpoint_every=5, ema=0.9)
DMD2 = {"steps": 2, "student_every": 2, "gan_weight": 0.1}


def distilled(folder: Path, steps: int = 500, sharding: str = "fsdp") -> None:
    """DMD2 on a joint batch of eight, from the beginning or from where it was left."""
    start = checkpoint.choose(folder)
    options = replace(DISTILLED, steps=steps, sharding=sharding, batch=8 // processes())
    loop = train("dmd2", DMD2, False, options, folder, start)
    assert all(weight.isfinite().all() for weight in learnt(loop).values())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_run_of_two_of_which_one_was_killed_goes_on_in_any_number(sharding: str, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    found = world(2, folder, partial(distilled, sharding=sharding))
    wait_for(lambda: len(checkpoint.find(folder)) > 1)
    found[1].kill()
    assert ends(found) == [2, -signal.SIGKILL]
    kept = checkpoint.latest_good(folder)
    assert kept is not None
    steps = checkpoint.step_of(kept) + 5
    ended = {}
    for count, how in ((1, "none"), (2, sharding), (4, "none"), (4, "fsdp")):
        goes_on = tmp_path / f"{count}-{how}"
        shutil.copytree(folder, goes_on)
        assert ends(world(count, goes_on, partial(distilled, steps=steps, sharding=how))) == [0] * count
        last = checkpoint.find(goes_on)[-1]
        assert checkpoint.step_of(last) == steps
        ended[count, how] = checkpoint.read(last, "player-student")
    for weights_ in ended.values():  # the same joint batches, whatever the number of processes
        for key, weight in ended[1, "none"].items():
            torch.testing.assert_close(weights_[key], weight, atol=1e-5, rtol=0)


def full_disk_of_one(folder: Path) -> None:
    """A run whose process 1 cannot write its part."""
    if rank() == 1:
        checkpoint.save_file = full  # type: ignore[assignment]
    trainer(folder, replace(OPTIONS, steps=2)).fit()


def test_all_processes_hear_that_one_could_not_write(tmp_path: Path) -> None:
    assert ends(world(2, tmp_path, full_disk_of_one)) == [2, 2]
    assert "cannot be written by process 1" in (tmp_path / "sentence-0").read_text()
    assert "No space left" in (tmp_path / "sentence-1").read_text()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="shapes"), faults.losses_of_processes_told(str):
        nn.Linear(2, 2)(torch.ones(1, 3))
