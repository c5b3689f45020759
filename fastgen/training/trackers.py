"""Trackers (TensorBoard, Weights & Biases, trackio and the others of accelerate), none of which training depends on.

One that fails, at the start or on the way, is told of once and left out from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator

__all__ = ["Trackers"]


class Trackers:
    """The trackers of an accelerator."""

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None] = lambda line: None):
        """`say` tells the user a line."""
        self.accelerator, self.say = accelerator, say

    def start(self, project: str, config: dict[str, Any]) -> None:
        """Open them, `config` being what they show of the run."""
        started = []
        wanted = list(self.accelerator.log_with)
        for each in wanted:
            self.accelerator.log_with = [each]
            try:
                self.accelerator.init_trackers(project, config=config)
            except Exception as error:
                self.tell(str(getattr(each, "value", each)), "could not be started", error)
                continue
            started += self.accelerator.trackers
        self.accelerator.log_with, self.accelerator.trackers = wanted, started

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand on what is finite of `values`."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.each("log", lambda tracker: tracker.log(finite, step=step))

    def finish(self) -> None:
        self.each("finish", lambda tracker: tracker.finish())

    def each(self, what: str, action: Callable[[Any], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                action(tracker)
            except Exception as error:
                self.accelerator.trackers = [other for other in self.accelerator.trackers if other is not tracker]
                self.tell(tracker.name, f"failed to {what}", error)

    def tell(self, name: str, what: str, error: Exception) -> None:
        reason = str(error).strip().splitlines()
        self.say(f"tracker {name!r} {what} ({reason[0] if reason else type(error).__name__}); training goes on without it")
