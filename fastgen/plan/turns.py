"""The turns of a plan: in every stage of a method each player moves, and what is alive meanwhile is noted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastgen.method import Batch, Loss, Method
from fastgen.plan.ledger import Ledger, tensors_in
from fastgen.plan.record import Turn
from fastgen.plan.rows import size_of
from fastgen.training.loop import Trainer


@dataclass(frozen=True)
class Moment:
    """One update that was looked at: its number from 0, what was held before it, and every player's turn."""

    update: int
    held: int
    turns: tuple[Turn, ...]

    @property
    def peak(self) -> int:
        return max(turn.peak for turn in self.turns)


def moments(trainer: Trainer, ledger: Ledger, units: Iterable[nn.Module]) -> Iterator[Moment]:
    """The first update of each of the method's stages, and the last where the method's own numbers have changed by then.

    A stage lasts until the optimisers start afresh; within one, terms of a loss may come that were not there at first. After
    each moment the trainer is as it is then.
    """
    method, total, begin = trainer.method, trainer.total, 0
    while begin < total:
        end = method.stage_end(begin, total)
        for update in dict.fromkeys((begin, end - 1)):
            before = numbers(method)
            trainer.step = update
            if method.advance(update, total):
                trainer.start_players()
                trainer.ema = trainer.start_ema()
            if update == begin:
                start_optimizers(trainer, ledger)
            elif numbers(method) == before:
                continue
            held = ledger.restart()
            yield Moment(update, held, tuple(watched(trainer, i, ledger, units) for i in range(len(trainer.turns))))
        begin = end


def numbers(method: Method) -> dict[str, Any]:
    """What is whole, yes or no, or a word among a method's attributes; what only fades in or out is a fraction."""
    return {name: value for name, value in vars(method).items() if isinstance(value, int | str)}


def start_optimizers(trainer: Trainer, ledger: Ledger) -> None:
    """Make the optimisers' moments, which torch leaves to the first step, so that a first update weighs what later ones do."""
    assert ledger.hollow is not None
    for turn in trainer.turns:
        for weight in turn.weights:
            weight.grad = ledger.hollow.like(weight.detach())
        turn.optimizer.step()
    trainer.thaw(None)


def watched(trainer: Trainer, number: int, ledger: Ledger, units: Iterable[nn.Module]) -> Turn:
    """One player's move; `units` are what gradient checkpointing computes again."""
    turn = trainer.turns[number]
    player, saved, spare, block = turn.player, 0, 0, 0
    loss, held = player.loss, ledger.restart()

    def noted(batch: Batch) -> Loss:
        nonlocal saved, spare, block
        with Savings(units, ledger) as savings:
            terms = loss(batch)
        saved = max(saved, ledger.live - held)
        spare, block = max(spare, savings.spare), max(block, savings.block)
        return terms

    player.loss = noted
    try:
        trainer.move(turn)
    finally:
        player.loss = loss
    if trainer.ema is not None:
        trainer.ema.update()
    return Turn(player.name, saved, ledger.peak, size_of(turn.weights), spare, block)


class Savings:
    """What calls of `units` leave live beyond their answers: `spare` in all, `block` at most by one."""

    def __init__(self, units: Iterable[nn.Module], ledger: Ledger):
        self.units, self.ledger = units, ledger
        self.spare = self.block = 0
        self.before: list[int] = []

    def __enter__(self) -> Savings:
        self.hooks = [unit.register_forward_pre_hook(self.begins) for unit in self.units]
        self.hooks += [unit.register_forward_hook(self.ends) for unit in self.units]
        return self

    def __exit__(self, *problem: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def begins(self, unit: nn.Module, args: Any) -> None:
        self.before.append(self.ledger.live)

    def ends(self, unit: nn.Module, args: Any, answer: Any) -> None:
        left = self.ledger.live - self.before.pop()
        self.spare += max(0, left - size_of(tensors_in(answer)))
        self.block = max(self.block, left)


def checkpointed_units(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks that diffusers computes again in the backward pass: members of lists whose owner knows checkpointing."""
    found: dict[int, nn.Module] = {}
    for network in networks:
        for owner in network.modules():
            if hasattr(owner, "gradient_checkpointing"):
                lists = (part for part in owner.children() if isinstance(part, nn.ModuleList))
                found |= {id(each): each for part in lists for each in part if not hasattr(each, "gradient_checkpointing")}
    return list(found.values())
