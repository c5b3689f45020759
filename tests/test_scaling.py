"""What docs/scaling.md and examples/cluster promise: scripts that run, commands that are understood, batches cut anew."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgen import config
from fastgen.cli import main, parser
from fastgen.errors import UserError
from fastgen.training import run as running

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster"
SHEBANG = "#!/bin/bash\n"


def understood(argv: list[str]) -> config.RunConfig:
    """What `fastgen distill ...` is to train: the command is parsed and its config loaded as the program itself does."""
    assert argv[0] == "distill"
    args, more = parser("distill").parse_known_args(argv)
    assert not [each for each in more if each.startswith("-")], more
    assert args.output is not None and args.resume == "auto"
    return config.load(ROOT / args.config, [*args.overrides, *more])


def commands(text: str) -> list[list[str]]:
    """The fastgen commands of a script or page, continued lines joined: the words after `fastgen`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if "fastgen distill" in line else []
        if "fastgen" in words:
            found.append(words[words.index("fastgen") + 1 :])
    return found


# -- Slurm ------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A PATH with stand-ins that write down what they are called with, and what Slurm sets for the script."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    both = "SLURM_NTASKS=16 SLURM_NTASKS_PER_NODE=8"
    tasks = f'for i in 0 15; do {both} SLURM_PROCID=$i SLURM_LOCALID=$((i % 8)) "$@" || status=$?; done; exit ${{status:-0}}'
    told = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
    scripts = {
        "srun": f"while [[ $1 == -* ]]; do shift; done\n{tasks}\n",
        "scontrol": f'[[ $1 == show ]] && echo node-7 && exit\necho "$@" >> {tmp_path}/scontrol\n',
        "fastgen": f'printf "%s\\n" "{told}" "$@" >> {tmp_path}/called.$RANK\nexit ${{FASTGEN_STATUS:-0}}\n',
    }
    for name, text in scripts.items():
        (stubs / name).write_text(SHEBANG + text)
        (stubs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
    return {**os.environ, **slurm, "PATH": f"{stubs}:{os.environ['PATH']}"}


def submit(environment: dict[str, str]) -> int:
    return subprocess.run(["bash", CLUSTER / "slurm.sh"], env=environment, cwd=ROOT, capture_output=True, timeout=60).returncode


def test_the_slurm_script_starts_a_process_for_every_gpu(cluster: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)
    assert submit(cluster) == 0
    for rank in (0, 15):
        environment, *argv = (tmp_path / f"called.{rank}").read_text().splitlines()
        number, local, *rest, port = environment.split()
        assert (number, local, rest) == (str(rank), str(rank % 8), ["16", "8", "node-7"])
        assert 1024 < int(port) < 65536
        run = understood(argv)
        assert run.train.sharding == "fsdp" and run.train.batch * 64 == 128, "the recipe's joint batch on 8 nodes of 8"
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (2, False), (1, False)])
def test_the_slurm_script_goes_on_after_a_signal_only(
    status: int, requeued: bool, cluster: dict[str, str], tmp_path: Path
) -> None:
    assert submit({**cluster, "FASTGEN_STATUS": str(status)}) == (0 if requeued else status)
    said = tmp_path / "scontrol"
    assert said.read_text() == "requeue 123456\n" if requeued else not said.exists()


def test_the_slurm_header_asks_for_what_the_script_uses() -> None:
    text = (CLUSTER / "slurm.sh").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8" and options["nodes"] == "8"
    assert options["signal"].startswith("TERM@") and "requeue" in options and options["open-mode"] == "append"


# -- SkyPilot ---------------------------------------------------------------------------------------


def test_the_skypilot_task_is_one(tmp_path: Path) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) <= {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"}
    kind, _, count = task["resources"]["accelerators"].partition(":")
    assert kind and int(count) > 0 and task["num_nodes"] == 1, "the bucket is not one folder of several machines"
    (mount,) = task["file_mounts"].values()
    assert mount["mode"] == "MOUNT_CACHED", "a bucket that is mounted plainly cannot rename"
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    (tmp_path / "torchrun").write_text(f'{SHEBANG}printf "%s\\n" "$@" > {tmp_path}/called\n')
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, **task.get("envs", {}), "SKYPILOT_NUM_GPUS_PER_NODE": count, "PATH": path}
    subprocess.run(["bash", "-c", task["run"]], env=environment, cwd=ROOT, check=True, timeout=60)
    words = (tmp_path / "called").read_text().splitlines()
    from torch.distributed.run import parse_args

    launched = parse_args(words)
    assert (launched.standalone, launched.nproc_per_node) == (True, count)
    assert (launched.module, launched.training_script) == (True, "fastgen")
    run = understood(launched.training_script_args)
    assert run.role("student") == "lora" and run.train.batch * int(count) == 128
    (place,) = task["file_mounts"]
    assert words[words.index("--output") + 1].startswith(place), "what is kept outlives the machines"


# -- the page ---------------------------------------------------------------------------------------


def test_every_command_of_the_page_is_understood() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = commands(text)
    assert len(found) >= 5
    for argv in found:
        understood(argv)
    for key in re.findall(r"`((?:train|data|roles|lora)\.\w+)", text):
        section, _, name = key.partition(".")
        assert section == "roles" or name in config.schema.settings(config.SECTIONS[section]), key


# -- batches cut anew -------------------------------------------------------------------------------


def test_a_run_goes_on_by_other_processes_with_the_same_joint_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(batch: int, micro: int = 1) -> config.RunConfig:
        return config.load(ROOT / "configs" / "toy" / "lcm.toml", [f"train.batch={batch}", f"train.micro_batches={micro}"])

    def same(batch: int, processes: int, micro: int = 1) -> None:
        monkeypatch.setattr(running, "processes", lambda: processes)
        running.check_same(run(batch, micro), run(batch, micro).to_toml(), tmp_path / "config.toml")

    (tmp_path / "config.toml").write_text(run(8).to_toml())
    (tmp_path / "environment.json").write_text(json.dumps({"processes": 4}))
    assert running.joint_batch(tmp_path) == 32
    for batch, processes, micro in ((8, 4, 1), (16, 2, 1), (32, 1, 4), (4, 8, 1), (8, 2, 1)):
        same(batch, processes, micro)
    for batch, processes, micro, key in ((16, 4, 1, "batch"), (8, 4, 2, "micro_batches"), (16, 1, 1, "batch")):
        with pytest.raises(UserError, match=rf"this run has train\.{key} = [81], but the configuration given has"):
            same(batch, processes, micro)
    (tmp_path / "state.json").write_text(json.dumps({"processes": 2}))
    assert running.joint_batch(tmp_path) == 16, "a checkpoint tells for itself"


@pytest.mark.parametrize(("name", "engine"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_engines_of_accelerate_are_refused(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    recipe: Any = str(ROOT / "configs" / "toy" / "lcm.toml")
    assert main(["distill", recipe, "--output", str(tmp_path / "run"), "--quiet", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"accelerate was launched with {engine}, which fastgen does not use" in said and 'train.sharding = "fsdp"' in said
    assert not (tmp_path / "run").exists()
