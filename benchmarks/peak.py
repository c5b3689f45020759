"""The most memory that something takes: in a process of its own, or on a GPU."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forked(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `what` gives, computed in a process forked from this one."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(what(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()  # nobody else would
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("a forked process failed")
    found: dict[str, Any] = json.loads(text)
    return found


def beyond(run: Callable[[], object], device: str = "cpu") -> dict[str, Any]:
    """The most bytes resident (VmHWM) while `run` goes on, beyond those before it, in a forked process; on a GPU, allocated."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"peak": torch.cuda.max_memory_allocated() - before}

    def measure() -> dict[str, Any]:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM begins anew.
        before = resident("VmRSS")
        run()
        return {"peak": resident("VmHWM") - before}

    return forked(measure)
