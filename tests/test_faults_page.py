"""docs/faults.md says what was recorded, and what the code says."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from fastgen.training import checkpoint, faults
from fastgen.training.faults import SKIP_LIMIT, why_skipped
from fastgen.training.launch import Interrupted


def benchmark() -> Any:
    return importlib.import_module("benchmarks.faults")


def test_the_page_of_faults_is_what_was_recorded_of_all_of_them() -> None:
    module = benchmark()
    record = json.loads(module.RECORD.read_text())
    assert list(record) == [fault.name for fault in module.FAULTS]
    assert module.PAGE.read_text() == module.page(record), "run python -m benchmarks.faults --pages"
    assert [record[fault.name]["injected"] for fault in module.FAULTS] == [fault.injected for fault in module.FAULTS]
    for fault in module.FAULTS:
        found = record[fault.name]
        assert found["said"] or -signal.SIGKILL in found["status"], fault.name
        assert found.get("again", 0) == 0 and found["kept"] <= found["reached"], "the same command goes on"
        assert set(found["status"]) <= {0, 2, 130, 143, -signal.SIGKILL}


def test_sentences_on_the_page_are_those_of_the_code() -> None:
    record = json.loads(benchmark().RECORD.read_text())
    for fault, place in (("data", "latents"), ("loss", "loss"), ("gradient", "")):
        counts = dict.fromkeys(faults.PLACES, 0) | ({place: SKIP_LIMIT} if place else {})
        terms = {"student/consistency": torch.tensor(torch.nan)}
        wanted = why_skipped("student", SKIP_LIMIT, counts, terms, lr=1e-3, precision="fp32")
        assert record[f"{fault} not finite"]["said"].startswith(f"error: {wanted}; the run stops after update")
    at, full = benchmark().AT, os.strerror(errno.ENOSPC)
    for fault, number in (("told to end", signal.SIGTERM), ("interrupted", signal.SIGINT)):
        interrupted = Interrupted(number, at)
        assert record[fault]["said"].startswith(str(interrupted)) and record[fault]["status"] == [interrupted.status]
    unwritable = str(checkpoint.unwritable(Path("RUN/checkpoints"), OSError(errno.ENOSPC, full)))
    assert all(unwritable in record[fault]["said"] for fault in ("disk full for a while", "disk stays full"))


def test_what_costs_nothing_to_do_again_says_what_the_page_says(tmp_path: Path) -> None:
    module = benchmark()
    record = json.loads(module.RECORD.read_text())
    for fault in module.FAULTS:
        if fault.name in ("directory cannot be written", "foreign code"):
            folder = tmp_path / fault.name.replace(" ", "-")
            folder.mkdir()
            found = module.measure(fault, tmp_path, folder)
            known = record[fault.name]
            assert found["said"].split("; there are")[0] == known["said"].split("; there are")[0]  # the list of options grows
            assert found["status"] == known["status"]
