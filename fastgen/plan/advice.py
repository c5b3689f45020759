"""What to change so that a run fits, every change tried by planning the run again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastgen.config import RunConfig
from fastgen.plan.estimate import Plan, estimate

__all__ = ["Advice", "advise"]

LEAST_RANK = 8
WORTH = 0.99
"""A change is kept where it leaves at most this part of the peak."""


@dataclass(frozen=True)
class Advice:
    """Overrides, in order, and the peak in bytes of one GPU with all of them; `fits` says whether that is enough."""

    memory: int
    changes: tuple[str, ...]
    peak: int
    fits: bool

    def as_json(self) -> dict[str, Any]:
        return {"fits": self.fits, "changes": list(self.changes), "peak_changed": self.peak}

    def in_words(self) -> str:
        limit, peak = f"{self.memory / 1e9:.3g} GB", f"{self.peak / 1e9:.3g} GB"
        if not self.changes:
            return f"fits in {limit}" if self.fits else f"does not fit in {limit}, and no change known here makes it smaller"
        changes = " ".join(self.changes)
        if self.fits:
            return f"does not fit in {limit}; with these it takes {peak}:\n  {changes}"
        return f"does not fit in {limit}; the least found is {peak}, with\n  {changes}"


def advise(config: RunConfig, plan: Plan, memory: int, *, offline: bool = False, device: str = "cuda") -> Advice:
    """The changes that bring the run of `plan` under `memory` bytes, those that cost nothing in quality first."""
    peak, changes = plan.peak, list[str]()
    for override, changed in candidates(config):
        if peak <= memory:
            break
        attempt = changed(copy.deepcopy(config))
        tried = estimate(attempt, offline=offline, device=device).peak
        if tried < WORTH * peak:
            config, peak = attempt, tried
            changes = [each for each in changes if each.partition("=")[0] != override.partition("=")[0]] + [override]
    return Advice(memory, tuple(changes), peak, peak <= memory)


Change = Callable[[RunConfig], RunConfig]


def candidates(config: RunConfig) -> Iterator[tuple[str, Change]]:
    """Changes that are not made yet, as an override and what it does to a config."""
    train = config.train
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true", lambda c: replace(c, train=replace(c.train, gradient_checkpointing=True))
    for parts in range(2 * train.micro_batches, train.batch + 1):
        if train.batch % parts == 0 and (parts & (parts - 1) == 0 or parts == train.batch):
            yield f"train.micro_batches={parts}", with_parts(parts)
    if train.precision != "bf16":
        yield 'train.precision="bf16"', lambda c: replace(c, train=replace(c.train, precision="bf16"))
    for role in [role for role, how in config.roles.items() if how == "full"]:
        yield f'roles.{role}="lora"', with_adapter(role)
    rank = config.lora.rank // 2
    while rank >= LEAST_RANK:
        yield f"lora.rank={rank}", with_rank(rank)
        rank //= 2


def with_parts(parts: int) -> Change:
    return lambda config: replace(config, train=replace(config.train, micro_batches=parts))


def with_adapter(role: str) -> Change:
    return lambda config: replace(config, roles={**config.roles, role: "lora"})


def with_rank(rank: int) -> Change:
    return lambda config: replace(config, lora=replace(config.lora, rank=rank))
