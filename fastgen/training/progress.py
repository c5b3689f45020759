"""What a run says while it trains: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Reporter"]

LINE_SECONDS = 10.0
SHOWN = 4
NOT_LOSSES = ("gradient_norm", "update_size", "skipped", "lr")


class Reporter:
    """Shows how far training is, how fast it goes, and the losses. Use as a context manager around the loop."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None, images: int = 0):
        """`console` defaults to standard error, so that standard output stays clean. `images` are those of an update."""
        self.quiet, self.images = quiet, images
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.losses = ""
        self.total = self.first = 0
        self.started = self.last_line = time.monotonic()

    def start(self, step: int, total: int) -> None:
        """Begin at `step` updates done of `total`."""
        self.total, self.first = total, step
        self.started = self.last_line = time.monotonic()
        if not self.quiet and self.console.is_terminal:
            columns = (
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("training", total=total, completed=step, rate="", losses="")
            self.bar.start()

    def advance(self, step: int, losses: Mapping[str, float] | None = None) -> None:
        """`step` updates are done; `losses` are shown where given, else the last ones."""
        if losses is not None:
            self.losses = "  ".join(f"{name} {losses[name]:.4g}" for name in shown(losses))
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, rate=self.rate(step), losses=self.losses)
        elif losses is not None and not self.quiet and (time.monotonic() - self.last_line > LINE_SECONDS or step == self.total):
            self.last_line = time.monotonic()
            self.say(f"update {step} of {self.total}, {self.rate(step)}, {self.left(step)} left: {self.losses}")

    def say(self, text: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = self.task = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def seconds_per_update(self, step: int) -> float:
        return (time.monotonic() - self.started) / max(1, step - self.first)

    def rate(self, step: int) -> str:
        seconds = self.seconds_per_update(step)
        updates = f"{seconds:.2f} s/update" if seconds > 1 else f"{1 / max(seconds, 1e-9):.1f} updates/s"
        images = f", {self.images / max(seconds, 1e-9):.3g} images/s" if self.images else ""
        return f"{updates}{images}, {memory()}"

    def left(self, step: int) -> str:
        minutes, seconds = divmod(round(self.seconds_per_update(step) * (self.total - step)), 60)
        return f"{minutes}:{seconds:02d}"


def shown(values: Mapping[str, float]) -> list[str]:
    """The names of the losses to show, few enough for a line: the first of every player, then others in their order."""
    names = [name for name in values if name.count("/") == 1 and not name.startswith("reading/")]
    losses = [name for name in names if name.partition("/")[2] not in NOT_LOSSES]
    first = list({name.partition("/")[0]: name for name in reversed(losses)}.values())[::-1]
    chosen = [*first, *(name for name in losses if name not in first)][:SHOWN]
    return [name for name in losses if name in chosen]


def memory() -> str:
    """The most that the accelerator has held so far, or what this process holds now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
