"""A run that is ended at any moment goes on, bit by bit, as if it had not been. The runs are processes, really killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgen.config import RunConfig, TrainConfig, load
from fastgen.data.source import load_source
from fastgen.training import checkpoint, run
from fastgen.training.progress import Reporter
from tests import tiny_models as tiny
from tests.training_fakes import Duel, FakePipeline

STEPS = 40
FORK = multiprocessing.get_context("fork")


def distil(folder: str, pause: float = 0.0) -> int:
    """The command that is killed and given again."""
    torch.set_num_threads(1)
    run.open_pipeline = lambda config, device, offline: FakePipeline()  # type: ignore
    run.load_source = lambda pipe, data, *args, **rest: load_source(pipe, replace(data, pool=30), *args, **rest)  # type: ignore
    if pause:
        Reporter.advance = lambda self, step, losses=None: time.sleep(pause)  # type: ignore
    train = TrainConfig(
        steps=STEPS, batch=4, micro_batches=2, lr=1e-2, ema=0.9, warmup=20, log_every=3, checkpoint_every=4, threads=1
    )
    method = Duel(critic_every=2, restart_at=22, poison=(7, 8))
    config = RunConfig(method_name="duel", method=method, seed=5, train=train)
    return run.distill(config, Path(folder), device="cpu", quiet=True)


def child(folder: str, pause: float) -> None:
    os._exit(distil(folder, pause))


def start(folder: Path, pause: float = 0.0) -> ForkProcess:
    process = FORK.Process(target=child, args=(str(folder), pause))
    process.start()
    return process


def finish(folder: Path) -> None:
    process = start(folder)
    process.join(120)
    assert process.exitcode == 0


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, moments, average, method, random generators."""
    path = folder / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint.verify(path)
    return {f"{file.stem}/{key}": value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def state(folder: Path) -> dict[str, object]:
    return checkpoint.read_state(folder / "checkpoints" / f"step-{STEPS:08d}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    finish(folder)
    assert [line["step"] for line in metrics(folder)] == [*range(3, STEPS, 3), STEPS]
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys() and {key.split("/")[0] for key in first} >= {"ema", "player-student", "random-00000"}
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []
    assert metrics(one) == metrics(other) and state(one) == state(other)
    pictures = [(folder / "samples" / f"step-{STEPS:08d}.png").read_bytes() for folder in (one, other)]
    assert pictures[0] == pictures[1]


def until(done: Callable[[], bool], process: ForkProcess) -> None:
    deadline = time.monotonic() + 60
    while not done() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.is_alive() and time.monotonic() < deadline, "the run ended before it could be killed"


def test_killed_at_random_again_and_again(tmp_path: Path, straight: Path) -> None:
    folder, chance = tmp_path / "killed", random.Random(os.urandom(8))
    for _ in range(3):
        process = start(folder, pause=0.05)  # 3 x 0.5 s are not enough to get to the end
        until(lambda: (folder / "checkpoints").exists(), process)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(folder)
    assert_same_run(straight, folder)


def test_killed_while_a_checkpoint_is_written(tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "killed"
    process = start(folder, pause=0.02)
    until(lambda: any((folder / "checkpoints").glob(".step-*")) if (folder / "checkpoints").exists() else False, process)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    finish(folder)
    assert not list((folder / "checkpoints").glob(".step-*")), "what was left half written is gone"
    assert_same_run(straight, folder)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_update_save_and_exit(tmp_path: Path, straight: Path, number: int, status: int) -> None:
    folder = tmp_path / "stopped"
    process = start(folder, pause=0.05)
    until(lambda: len(checkpoint.find(folder)) > 0, process)
    time.sleep(0.06)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == status
    saved = checkpoint.choose(folder)
    assert saved is not None and 4 <= checkpoint.step_of(saved) < STEPS
    assert_same_run(straight, finished(folder))


def finished(folder: Path) -> Path:
    finish(folder)
    return folder


REAL_METHODS = {
    "progressive": ["method.start_steps=8", "method.stop_steps=2"],
    "lcm": ['roles.student="lora"', "lora.rank=2"],
    "dmd2": ["method.student_every=2", 'train.precision="bf16"'],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_METHODS)
def test_real_methods_on_a_real_pipeline_go_on_bit_by_bit(tmp_path: Path, name: str) -> None:
    tiny.toy().save_pretrained(tmp_path / "pipeline")
    pictures = torch.Generator().manual_seed(0)
    (tmp_path / "images").mkdir()
    for i in range(5):
        pixels = torch.randint(256, (16, 16, 3), generator=pictures, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    (tmp_path / "run.toml").write_text(
        f'pipeline = "{tmp_path}/pipeline"\n[method]\nname = "{name}"\n'
        f'[data]\nprompts = "{tmp_path}/prompts.txt"\nimages = "{tmp_path}/images"\n'
        f"[train]\nsteps = {STEPS}\nbatch = 2\nlr = 1e-3\nema = 0.9\nlog_every = 1\nthreads = 1\n"
        "checkpoint_every = 15\nkeep_checkpoints = 0\n"
    )
    straight, back = tmp_path / "straight", tmp_path / "back"
    assert run.distill(load(tmp_path / "run.toml", REAL_METHODS[name]), straight, device="cpu", quiet=True) == 0
    shutil.copytree(straight, back)
    first = str(back / "checkpoints" / "step-00000015")  # before progressive distillation's second stage
    assert run.distill(load(tmp_path / "run.toml", REAL_METHODS[name]), back, resume=first, device="cpu", quiet=True) == 0
    assert (back / "checkpoints" / f"set-aside-step-{STEPS:08d}").is_dir()
    assert_same_run(straight, back)
    loaded = run.load_run(back)
    assert loaded.averaged and loaded.method.sampler().steps >= 1


@pytest.mark.slow
def test_a_fresh_interpreter_goes_on_where_another_was_killed(tmp_path: Path, straight: Path) -> None:
    root = str(Path(__file__).parents[1])
    folder = tmp_path / "killed"
    # `tests` is a folder without __init__, which a package of that name elsewhere would hide.
    code = (
        "import sys, types; sys.path.insert(0, sys.argv[2]); tests = types.ModuleType('tests');"
        "tests.__path__ = [sys.argv[2] + '/tests']; sys.modules['tests'] = tests;"
        "from tests.test_resume import distil; sys.exit(distil(sys.argv[1], float(sys.argv[3])))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), root, "0.02"])
    while len(checkpoint.find(folder)) < 2:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    subprocess.run([sys.executable, "-c", code, str(folder), root, "0"], check=True, timeout=300)
    assert_same_run(straight, folder)
