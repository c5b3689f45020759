"""torchrun, accelerate launch and plain fastgen start the same run: real commands, two processes on a CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgen.training import checkpoint

ROOT = Path(__file__).parents[1]
RUN = [
    *("distill", str(ROOT / "configs" / "toy" / "lcm.toml"), "train.batch=2", "train.checkpoint_every=2", "train.log_every=1"),
    *("train.sample_every=0", "train.teacher_steps=1", "train.threads=1", "data.pool=8", "data.cache=none", "--device", "cpu"),
]


def launcher(name: str) -> list[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "fastgen"]
    # With --cpu accelerate starts one process unless there is mpirun; --multi_gpu is torchrun, with or without GPUs.
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *options, f"--main_process_port={port}"]
    return [*accelerate, "--module", "fastgen"]


def launch(name: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher(name), *RUN, *options, "--output", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_a_launcher_starts_a_run_of_two_processes(name: str, sharding: str, tmp_path: Path) -> None:
    process = launch(name, tmp_path / "run", "train.steps=4", f'train.sharding="{sharding}"')
    text, _ = process.communicate(timeout=500)
    assert process.returncode == 0, text
    assert text.count("done: ") == 1, "one of them speaks"
    last = checkpoint.choose(tmp_path / "run")
    assert last is not None and checkpoint.step_of(last) == 4
    assert checkpoint.read_state(last)["processes"] == 2
    assert {path.name for path in last.glob("random-*")} == {"random-00000.safetensors", "random-00001.safetensors"}
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_before_all_end(number: signal.Signals, tmp_path: Path) -> None:
    process = launch("torchrun", tmp_path / "run", "train.steps=10000", "train.checkpoint_every=0")
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (lines.exists() and lines.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    saved = checkpoint.choose(tmp_path / "run")
    assert saved is not None and checkpoint.step_of(saved) > 2, text
    assert f"{number.name} after update {checkpoint.step_of(saved)}; a checkpoint was saved" in text
