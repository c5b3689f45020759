"""FSDP2: sharded runs learn what one process learns; weights, averages, grids and checkpoints are cut and joined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.methods.lcm import LCM
from fastgen.training.sharding import Sharding
from tests.method_fakes import PROCESSES, FakePipeline
from tests.process_worlds import together, train
from tests.test_processes import METHODS, OPTIONS, compare, losses, run

SHARDED = replace(OPTIONS, sharding="fsdp")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_two_sharded_processes_learn_what_one_does(name: str, lora: bool, tmp_path: Path) -> None:
    compare(name, lora, 2, tmp_path, SHARDED)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_four_sharded_processes_learn_what_one_does(name: str, lora: bool, tmp_path: Path) -> None:
    compare(name, lora, 4, tmp_path, SHARDED)


def differentiate(tangent: str, options: TrainConfig, folder: str) -> None:
    """One process of a run of sCM."""
    train("scm", {"tangent": tangent, "warmup": 0}, False, options, Path(folder), None)


@pytest.mark.parametrize("tangent", ["exact", "central"])
def test_derivatives_are_taken_in_single_precision_of_weights_that_are_cut(tangent: str, tmp_path: Path) -> None:
    """In mixed precision too, in which a derivative of rounded weights would be noise, and a difference is refused."""
    options = replace(OPTIONS, precision="bf16", steps=3)
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    for folder in (alone, cut):
        folder.mkdir()
    differentiate(tangent, options, str(alone))
    together(2, differentiate, tangent, replace(options, batch=options.batch // 2, sharding="fsdp"), str(cut))
    expected, found = ([line["student/consistency"] for line in losses(folder)] for folder in (alone, cut))
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-2)


# -- checkpoints ------------------------------------------------------------------------------------

KEPT = replace(OPTIONS, checkpoint_every=3, keep_checkpoints=0)


def launch(name: str, lora: bool, processes: int, sharding: str, folder: Path, resume: Path | None = None) -> Path:
    """The last checkpoint of a run of five updates with another after the third."""
    folder.mkdir()
    options = replace(KEPT, batch=KEPT.batch // processes, sharding=sharding)
    if processes == 1:
        run(name, lora, options, str(folder), resume)
    else:
        together(processes, run, name, lora, options, str(folder), resume)
    return folder / "checkpoints" / "step-00000005"


def check_alike(one: Path, other: Path) -> None:
    """Two checkpoints hold the same files, names and shapes, and the same numbers to 1e-5."""
    names = {path.name for path in one.glob("*.safetensors") if not path.name.startswith("random-")}
    assert names == {path.name for path in other.glob("*.safetensors") if not path.name.startswith("random-")}
    assert "ema.safetensors" in names
    for name in names:
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def check_resuming(name: str, lora: bool, goes_on: list[tuple[int, str]], folder: Path) -> None:
    """Saved by two sharded processes, a run is gone on with by others, to where one process gets that is never stopped."""
    whole = launch(name, lora, 1, "none", folder / "whole")
    launch(name, lora, 2, "fsdp", folder / "cut")
    middle = folder / "cut" / "checkpoints" / "step-00000003"
    check_alike(whole.with_name("step-00000003"), middle)
    for processes, sharding in goes_on:
        check_alike(whole, launch(name, lora, processes, sharding, folder / f"{processes}-{sharding}", middle))


@pytest.mark.parametrize(("name", "lora"), [("progressive", False), ("dmd2", False), ("dmd2", True)])
def test_a_sharded_run_goes_on_in_one_process_and_in_two(name: str, lora: bool, tmp_path: Path) -> None:
    check_resuming(name, lora, [(1, "none"), (2, "fsdp")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_run_goes_on_in_four_processes(name: str, lora: bool, tmp_path: Path) -> None:
    check_resuming(name, lora, [(4, "fsdp"), (4, "none")], tmp_path)


def test_a_network_that_is_called_by_lengths_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many calls it takes is each process' own affair, and what is cut is gathered by all of them together."""
    monkeypatch.setattr("fastgen.training.sharding.processes", lambda: 2)
    method = LCM()
    method.setup(FakePipeline(PROCESSES["flow"], (2,)))  # type: ignore[arg-type]
    method.student.groups = lambda condition: []
    with pytest.raises(UserError, match="the same calls in all processes"):
        Sharding(method, TrainConfig(sharding="fsdp"), torch.device("cpu"))
