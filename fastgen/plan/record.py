"""What a plan says: bytes by role and by turn, and the peak."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Plan", "Row", "Turn"]


@dataclass(frozen=True)
class Row:
    """What one role, or one component of the pipeline, keeps in memory, in bytes; `parameters` and `trainable` are counts."""

    name: str
    parameters: int
    trainable: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0

    @property
    def kept(self) -> int:
        """Bytes between updates; gradients live only within their player's turn."""
        return self.weights + self.optimizer + self.ema


@dataclass(frozen=True)
class Turn:
    """One player's move, in bytes: saved for its backward pass by one micro-batch, and the greatest sum of all live tensors.

    `gradients` are those of all its weights. Of what is saved, gradient checkpointing would let go of `spare` and need `block`.
    """

    player: str
    saved: int
    peak: int
    gradients: int
    spare: int
    block: int


@dataclass(frozen=True)
class Plan:
    """The memory of a run, in bytes. `preparing` is the peak before training begins, `held` lives from then on, and `samples`
    is the peak while sample grids are drawn.

    A method in stages is told of as it is in the `update` (from 0) with the greatest peak, of as many as `looked_at`.

    `block` is the largest part of a trained network that sharding gathers at once. `per_rank` are the bytes of an adapter of
    rank 1, `reducible` counts the weights of the base that `quantize` reduces.
    """

    pipeline: str
    network: str
    method: str
    batch: int
    micro_batch: int
    latent_shape: tuple[int, ...]
    precision: str
    update: int
    looked_at: int
    rows: tuple[Row, ...]
    turns: tuple[Turn, ...]
    preparing: int
    held: int
    samples: int
    block: int
    per_rank: int
    reducible: int
    shardable: int = field(repr=False)

    @property
    def peak(self) -> int:
        """The most that is live at once on one GPU."""
        return max(self.preparing, self.samples, *(turn.peak for turn in self.turns))

    def sharded(self, gpus: int) -> int:
        """A bound for each of `gpus` when weights, gradients, optimiser and averages of trained networks are sharded.

        Each keeps its share and gathers two blocks of weights (one in use, one on its way) and the gradients of one.
        """
        if gpus == 1:
            return self.peak
        gradients = max((row.gradients for row in self.rows), default=0)
        return self.peak - round((self.shardable + gradients) * (1 - 1 / gpus)) + 3 * self.block

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}
