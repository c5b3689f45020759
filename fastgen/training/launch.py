"""Where a run runs: accelerate's processes, device and precision, CPU threads, and the signals that end it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs

from fastgen.errors import UserError

__all__ = ["Interrupted", "Interrupts", "choose_threads", "make_accelerator", "processes", "rank", "wait"]

EXTRA_TRACKERS = ("tensorboard", "trackio", "wandb")
"""What the extra "trackers" installs."""

PATIENCE = timedelta(minutes=30)
"""How long processes wait for one that does not answer, as the others do while the first draws pictures or saves."""


def make_accelerator(
    precision: str = "fp32",
    device: torch.device | str | None = None,
    *,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
) -> Accelerator:
    """accelerate's view of this process. `trackers` are its names ("tensorboard", "wandb"), their files go to `folder`.

    Raises UserError for a precision that the device lacks and a tracker that is not installed.
    """
    options: dict[str, Any] = {
        "cpu": device is not None and torch.device(device).type == "cpu",
        "mixed_precision": "no" if precision == "fp32" else precision,
        # Cached casts would be kept for every network that a loss calls: as much memory again as the weights.
        "kwargs_handlers": [AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs(timeout=PATIENCE)],
        "log_with": list(trackers) or None,
        "project_dir": folder,
    }
    shared = AcceleratorState._shared_state
    if shared and (shared["_mixed_precision"] != options["mixed_precision"] or shared["_cpu"] != options["cpu"]):
        # accelerate's state is global to the process, and another run in the same process may need another.
        AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    try:
        accelerator = Accelerator(**options)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot train with precision {precision!r} and trackers {list(trackers)} here: {error}") from error
    accelerator.scaler = None  # one for all optimisers; the loop has one for each
    accelerator.native_amp |= precision == "fp16"  # which accelerate passes over on a CPU, without a word
    missing = set(trackers) - {str(getattr(each, "value", each)) for each in accelerator.log_with}
    if missing:
        name = sorted(missing)[0]
        extra = f"'fastgen-diffusion[trackers]', or {name} alone" if name in EXTRA_TRACKERS else name
        raise UserError(f"tracker {name!r} is not installed: pip install {extra}; or leave it out")
    return accelerator


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process is here."""
    if processes() > 1:
        dist.barrier()


# -- signals --------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Training ended after SIGINT or SIGTERM; a checkpoint holds all of it."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name} after update {step}; a checkpoint was saved")
        self.number, self.step = number, step

    @property
    def status(self) -> int:
        """The exit status that shells expect: 130 or 143."""
        return 128 + self.number


class Interrupts:
    """Within this block SIGINT and SIGTERM are only noted, the first time; a second one acts as it always does.

    One that is ignored otherwise, as SIGINT is in what a script starts in the background, stops the process the second time.
    """

    def __init__(self) -> None:
        self.caught = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        at_once: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for each, handler in self.before.items():
            signal.signal(each, at_once[signal.Signals(each)] if handler is signal.SIG_IGN else handler)

    def release(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def agreed(self, device: torch.device) -> int:
        """The signal that any process has caught, 0 if none; the same answer in every process."""
        if processes() == 1:
            return self.caught
        flag = torch.tensor(self.caught, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# -- threads --------------------------------------------------------------------------------------


def choose_threads(wanted: int = 0, device: torch.device | str = "cpu") -> int:
    """How many CPU threads torch should use: `wanted`, or the number that works fastest here, now.

    More threads than idle cores make small networks tens of times slower, so on a CPU the choice is measured. Never more than
    the physical cores this process may use, shared among the processes of this machine; OMP_NUM_THREADS, where set, is a limit.
    """
    if wanted:
        return wanted
    limit = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    limit = max(1, min(limit, int(asked) if asked.isdigit() and int(asked) else limit))
    if torch.device(device).type != "cpu":
        return min(limit, 8)
    options = sorted({limit, *(2**i for i in range(10) if 2**i < limit)})
    before = torch.get_num_threads()
    try:
        seconds = {threads: trial(threads) for threads in options} if len(options) > 1 else {limit: 0.0}
    finally:
        torch.set_num_threads(before)
    return min(seconds, key=lambda threads: seconds[threads])


def available_cores() -> int:
    """Physical cores that this process may use, by affinity and by the container's quota."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def trial(threads: int) -> float:
    """Seconds of a small network's work."""
    torch.set_num_threads(threads)
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    x = torch.ones(32, 64, 8, 8)
    started = 0.0
    with torch.inference_mode():
        for i in range(60):
            if i == 10:
                started = time.perf_counter()
            x = torch.nn.functional.silu(convolution(x))
    return time.perf_counter() - started
