"""`fastgen doctor`: each trouble is seen, in words that say what to do."""

from __future__ import annotations

import json
import socket
import threading
import time
import types
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.cli import doctor, known_trouble, main
from fastgen.cli.known_trouble import Finding, accelerate_config, cuda_trouble, file_system, network, over_network

GIB = 2**30


def only(findings: Iterable[Finding]) -> Finding:
    (found,) = findings
    return found


# -- the command ------------------------------------------------------------------------------------


def test_everything_is_looked_at_and_each_thing_has_a_reading(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = main(["doctor", "--json", "--offline", "--output", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    topics = {each["topic"]: each for each in report["findings"]}
    wanted = {"python", "fastgen", "torch", "cpu", "threads", "memory", "attention", "toy weights", "pictures", "network"}
    assert wanted | {"output", "temporary files", "model cache"} <= set(topics)
    assert {each["status"] for each in report["findings"]} <= {"ok", "note", "warning", "wrong"}
    assert status == (2 if report["wrong"] else 0)
    assert "--offline: not tried" in topics["network"]["detail"] and str(tmp_path) in topics["output"]["detail"]


@pytest.mark.parametrize(
    ("reading", "status", "end"), [("wrong", 2, "1 wrong, 0 warnings"), ("warning", 0, "0 wrong, 1 warnings")]
)
def test_the_exit_status_is_of_what_is_wrong(
    reading: Any, status: int, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("installation", "devices", "processor", "attention", "shipped", "pictures"):
        monkeypatch.setattr(doctor, name, lambda: [])
    monkeypatch.setattr(doctor, "storage", lambda folder: [Finding("thing", reading, "broken; mend it")])
    monkeypatch.setattr(known_trouble, "accelerate_config", lambda: [])
    assert main(["doctor", "--offline"]) == status
    out = capsys.readouterr().out
    assert f"{reading:<7}  thing    broken; mend it" in out and out.rstrip().endswith(end)


# -- packages ---------------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, tuple[str, list[str]]]], None]:
    """Pretend that these are installed: name -> (version, what it requires)."""

    def pretend(known: dict[str, tuple[str, list[str]]]) -> None:
        def version(name: str) -> str:
            if name not in known:
                raise metadata.PackageNotFoundError(name)
            return known[name][0]

        monkeypatch.setattr(known_trouble.metadata, "version", version)
        monkeypatch.setattr(known_trouble.metadata, "requires", lambda name: known[name][1] if name in known else None)

    return pretend


def test_packages_that_do_not_fit_together_are_named(packages: Callable[..., None]) -> None:
    sound = {"torch": ("2.15.0", []), "xformers": ("0.0.36", ["numpy", "torch==2.15.0"]), "numpy": ("2.4", [])}
    packages(sound)
    assert list(known_trouble.conflicts()) == []
    packages({**sound, "torch": ("2.12.1", [])})
    found = only(known_trouble.conflicts())
    assert (found.topic, found.status) == ("xformers 0.0.36", "warning")
    assert found.detail == "needs torch==2.15.0, but 2.12.1 is installed; pip install -U 'xformers' 'torch==2.15.0'"
    packages(
        {"transformers": ("5.0", ["huggingface-hub<2,>=1.0", "tqdm", 'torch>=2.4; extra == "torch"', "not a = requirement"])}
    )
    assert "needs huggingface-hub<2,>=1.0, but it is not installed" in only(known_trouble.conflicts()).detail


def test_packages_known_to_break_others_are_named(packages: Callable[..., None]) -> None:
    packages({"fastgen": ("1", []), "image-reward": ("1.5", []), "open_clip_torch": ("3", []), "hpsv2": ("1.2.0", [])})
    found = {each.topic: each.detail for each in known_trouble.conflicts()}
    assert "pip uninstall it" in found["other fastgen"] and "separate environments" in found["image-reward"]
    assert "protobuf<4" in found["hpsv2"]


def test_an_old_library_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.8", "peft>=0.17", 'datasets>=4; extra == "datasets"', 'pytest>=8; extra == "dev"']
    known = {"fastgen-diffusion": "0.1", "torch": "2.7.1"}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(known_trouble, "conflicts", lambda: [])
    found = {each.topic: (each.status, each.detail) for each in doctor.installation()}
    assert found["torch"] == ("wrong", "2.7.1, but >=2.8 is needed")
    assert found["peft"] == ("wrong", "not installed; pip install 'peft>=0.17'")
    assert found["datasets"] == ("note", "not installed; pip install 'fastgen-diffusion[datasets]'")
    assert "pytest" not in found


# -- devices ----------------------------------------------------------------------------------------


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Path("/dev/nvidia0")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not list(cuda_trouble("13.0", True, nodes)) and not list(cuda_trouble(None, False, []))
    assert "is built without CUDA; pip install torch as https://pytorch.org" in only(cuda_trouble(None, False, nodes)).detail
    assert "the driver may be too old" in only(cuda_trouble("13.0", False, nodes)).detail
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it; unset it" in only(cuda_trouble("13.0", False, nodes)).detail


@pytest.mark.parametrize(
    ("capability", "free", "status", "words"),
    [
        ((9, 0), 78, "ok", "A GPU, 78 of 80 GiB free, bf16"),
        ((8, 9), 78, "ok", "bf16"),
        ((7, 5), 78, "warning", 'no bf16: recipes with it need train.precision="fp16" or "fp32"'),
        ((9, 0), 30, "warning", "30 of 80 GiB free: another program holds the rest"),
        ((6, 1), 78, "wrong", "is of architecture 6.1, which this torch is not built for (75, 80, 90, 100)"),
        ((12, 0), 78, "wrong", "install another torch"),
        ((10, 3), 78, "ok", "bf16"),
    ],
)
def test_what_a_gpu_can_do(
    capability: tuple[int, int], free: int, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = types.SimpleNamespace(name="A GPU", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_100", "compute_75"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * GIB, 80 * GIB))
    found = doctor.gpu(0)
    assert found.status == status and words in found.detail


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_trouble.os, "statvfs", lambda path: types.SimpleNamespace(f_frsize=4096, f_blocks=16384))
    assert only(known_trouble.shared_memory(1)).status == "ok"
    found = only(known_trouble.shared_memory(8))
    assert found.status == "warning" and "0.06 GiB, too little for 8 GPUs: start the container with --shm-size" in found.detail


# -- files and network ------------------------------------------------------------------------------

MOUNTS = (
    "/dev/a / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\nC: /mnt/c 9p rw 0 0\ntmpfs /data/fast\\040disk tmpfs rw 0 0\nbad line\n"
)


def test_the_file_system_of_a_folder() -> None:
    kinds = {"/home/me": "ext4", "/data/runs": "nfs4", "/data": "nfs4", "/database": "ext4", "/mnt/c/x": "9p"}
    assert {path: file_system(Path(path), MOUNTS) for path in kinds} == kinds
    assert file_system(Path("/data/fast disk/x"), MOUNTS) == "tmpfs"
    assert over_network("nfs4") and over_network("9p") and over_network("fuse.sshfs")
    assert not over_network("ext4") and not over_network("overlay") and not over_network("")


def test_folders_over_a_network_and_full_disks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_trouble, "file_system", lambda path: "nfs4")
    disk = types.SimpleNamespace(free=200 * GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: disk)
    found = next(iter(doctor.storage(tmp_path)))
    assert found.status == "note" and "over a network (nfs4)" in found.detail and "data.cache" in found.detail
    disk.free = GIB
    assert next(iter(doctor.storage(tmp_path))).status == "warning"
    (tmp_path / "file").touch()
    found = next(iter(doctor.storage(tmp_path / "file")))
    assert found.status == "warning" and "is a file, not a folder" in found.detail


def test_windows_linux_is_told() -> None:
    assert (
        "keep runs and data in Linux's own folders"
        in only(known_trouble.subsystem("Linux 5.15-microsoft-standard-WSL2")).detail
    )
    assert not list(known_trouble.subsystem("Linux version 6.1"))


@pytest.mark.parametrize(("kind", "status"), [("MULTI_GPU", "ok"), ("FSDP", "warning"), ("'DEEPSPEED'", "warning")])
def test_what_accelerate_is_told_to_do(kind: str, status: str, tmp_path: Path) -> None:
    file = tmp_path / "default_config.yaml"
    assert not list(accelerate_config(file))
    file.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\n")
    assert only(accelerate_config(file)).status == status


def test_the_network_is_asked_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in network(False).detail
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)  # any answer is an answer
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert network(False).status == "ok"
    server.shutdown()
    server.server_close()
    found = network(False)
    assert found.status == "note" and "cannot be reached" in found.detail and "--offline" in found.detail
    with socket.socket() as silent:  # takes the call and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "timed out" in network(False, 0.2).detail
    monkeypatch.setattr(known_trouble, "ask", lambda place, seconds: time.sleep(60) or "")
    assert "no answer within 0.01 s" in network(False, 0.01).detail


def test_the_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_limit", lambda: 2.0)
    found = next(each for each in doctor.processor() if each.topic == "memory")
    assert (
        found.status == "warning"
        and "2 GiB, the limit of this container" in found.detail
        and "give the container more" in found.detail
    )
