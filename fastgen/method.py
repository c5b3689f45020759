"""What a distillation algorithm declares: its networks, who learns what, and how the student is sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import Sampler

Need = Literal["prompts", "images", "pairs"]


@dataclass
class Batch:
    """One micro-batch, already encoded by the pipeline.

    `shape` is that of the latents, batch first. `latents` [B, ...] are real data (methods that need images). `noise` and
    `target` are teacher pairs. `prompts` are the texts, one a sample, for rewards that read them.
    """

    condition: Condition
    shape: tuple[int, ...]
    latents: Tensor | None = None
    noise: Tensor | None = None
    target: Tensor | None = None
    prompts: tuple[str, ...] = ()


Loss = dict[str, Tensor]
"""Named loss terms; the trainer backpropagates their sum and logs each."""


@dataclass
class Player:
    """Weights, the loss they minimise, and how often they move.

    `weights.parameters()` that require a gradient at setup are what moves. `every`: the player moves in updates whose number
    (counted from 1) is divisible by it. `lr_scale` multiplies the run's learning rate.
    """

    name: str
    weights: nn.Module
    loss: Callable[[Batch], Loss]
    every: int = 1
    lr_scale: float = 1.0


@dataclass
class Method(ABC):
    """A distillation algorithm: hyper-parameters are fields, networks are made in `setup`.

    Subclasses state their paper in the docstring's first line, keep tensors of their own only in the modules of their players
    (anything else that a resumed run needs goes through `state` and `load_state`), and draw randomness from torch's global
    generator, which checkpoints carry.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts"})

    @property
    def why_images(self) -> str:
        """Which of its options makes a method need images, and how to do without; empty where it always does."""
        return ""

    @property
    def teacher_guidance(self) -> float | None:
        """At which scale the teacher is shown and measured beside the student, once `setup` is done; None is its own."""
        return getattr(self, "guidance", None)

    def refuse_idle(self, why: str, *options: str) -> None:
        """Raise UserError for the first of `options` that was set, which `why` ("beside angles = [1.5]") does nothing."""
        usual = {each.name: each.default for each in fields(self)}
        for name in options:
            if (value := getattr(self, name)) != usual[name]:
                raise UserError(f"{name} = {value!r} is without effect {why}; drop it")

    @abstractmethod
    def setup(self, pipeline: Pipeline) -> None:
        """Build the networks. Raises UserError for options that this pipeline cannot serve."""

    @abstractmethod
    def players(self) -> Sequence[Player]:
        """Who learns what, in the order they move within an update."""

    @property
    def trained(self) -> Denoiser:
        """What is sampled, averaged and exported: `student`, as `setup` has made it, unless a method has another."""
        student: Denoiser = self.student  # type: ignore[attr-defined]
        return student

    @abstractmethod
    def sampler(self, steps: int | None = None) -> Sampler:
        """How the student is sampled, with its own number of calls or with `steps`.

        Raises UserError for a number of steps it was not trained for.
        """

    def advance(self, step: int, total: int) -> bool:
        """Called before update `step` (from 0) of `total`; moves curricula on. True starts the optimisers afresh."""
        return False

    def stage_end(self, step: int, total: int) -> int:
        """The update before which `advance` next starts the optimisers afresh, or `total`: when a learning rate has fallen."""
        return total

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the players' weights: tensors in nested dictionaries, and JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most methods have no state of their own
        """Inverse of `state`."""
