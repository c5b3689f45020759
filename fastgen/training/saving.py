"""A trainer's state as a checkpoint, and back: what `checkpoint` writes and reads as files.

player-NAME     the weights that a player trains, and their buffers
optimizer-NAME  its moments
ema, method     the average, and the tensors that a method keeps
averages        those of which others are made after training
random-RANK     the random generators of every process
state.json      counts and positions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.errors import UserError
from fastgen.training import checkpoint, posthoc
from fastgen.training.faults import SAVE_TRIES
from fastgen.training.launch import processes, rank
from fastgen.training.random_state import random_state, set_random_state
from fastgen.training.sharding import cut, joined

if TYPE_CHECKING:
    from fastgen.training.loop import Trainer

__all__ = ["load", "save", "try_to_save"]


def save(trainer: Trainer, folder: Path) -> Path:
    """Write a checkpoint of everything a resumed run needs into `folder`; all processes do so together.

    Raises Unwritable in all of them where the disk refuses in one; then nothing is left of it.
    """
    writing = Writing(folder / f".step-{trainer.step:08d}.partial", trainer.device)
    if rank() == 0:
        writing.attempt(lambda: checkpoint.begin(folder, trainer.step))
    writing.agree()
    writing.attempt(lambda: checkpoint.write(writing.partial, f"random-{rank():05d}", random_state(trainer.device)))
    writing.agree()
    write_state(trainer, writing)
    writing.agree()
    return folder / f"step-{trainer.step:08d}"


def try_to_save(trainer: Trainer, needed: bool) -> Path | None:
    """Save; a disk that refuses is told of, and tried again when the next checkpoint is due.

    Raises UserError where it refuses `SAVE_TRIES` times in a row, or once where the checkpoint is `needed`: at the end.
    """
    try:
        saved = trainer.save()
    except checkpoint.Unwritable as problem:
        trainer.unsaved += 1
        text = f"no checkpoint could be written {trainer.whereabouts()}: {problem}"
        if needed or trainer.unsaved >= SAVE_TRIES:
            raise UserError(text) from problem
        trainer.reporter.say(f"{text}; training goes on, and tries again when the next is due")
        return None
    trainer.unsaved = 0
    if saved is not None and rank() == 0:
        trainer.tolerant(lambda: posthoc.keep(saved, saved.parents[1]))
    return saved


class Writing:
    """A checkpoint that all processes write together: what the disk refused to one of them, and that the others hear of it."""

    def __init__(self, partial: Path, device: torch.device):
        self.partial, self.device = partial, device
        self.problem: checkpoint.Unwritable | None = None

    def attempt(self, write: Callable[[], object]) -> None:
        """Do what writes, unless something went wrong before."""
        try:
            if self.problem is None:
                write()
        except checkpoint.Unwritable as problem:
            self.problem = problem

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a part; what is sharded is gathered even if nothing can be written any more, since the others wait for that."""
        if rank() == 0 or checkpoint.is_sharded(tensors):
            try:
                checkpoint.write(self.partial, name, tensors, gather_only=self.problem is not None)
            except checkpoint.Unwritable as problem:
                self.problem = problem

    def agree(self) -> None:
        """Wait for all processes; raise Unwritable in all where one has met a problem, and remove what was written."""
        failed = 0 if self.problem is None else rank() + 1
        if processes() > 1:
            flag = torch.tensor(failed, device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            failed = int(flag)
        if not failed:
            return
        if rank() == 0:
            checkpoint.abandon(self.partial)
        raise self.problem or checkpoint.Unwritable(f"{self.partial.parent}: cannot be written by process {failed - 1}")


def write_state(trainer: Trainer, writing: Writing) -> None:
    """Everything but the random generators."""
    main = rank() == 0
    trainer.sharding.reshard()
    if main or trainer.sharding:  # the parts of sharded weights are gathered by all
        state: dict[str, Any] = {
            "step": trainer.step,
            "total": trainer.total,
            "started": trainer.started,
            "processes": processes(),
            "threads": torch.get_num_threads(),
            "data": trainer.data.state(),
            "averages": trainer.averages.state(),
            "health": trainer.health.state(),
            "ema": None if trainer.ema is None else trainer.ema.updates,
            "scalers": {turn.player.name: turn.scaler.state_dict() for turn in trainer.turns},
            "micro_batches": trainer.micro_batches,
            "skipped": {
                turn.player.name: [int(turn.skipped), int(turn.in_a_row), *turn.blame.turns.tolist()] for turn in trainer.turns
            },
        }
        tensors: dict[str, Tensor] = {}
        state["method"] = checkpoint.split(trainer.method.state(), "method", tensors)
        writing.put("method", tensors)
        optimizers = state["optimizers"] = {}
        for turn in trainer.turns:
            name, tensors = turn.player.name, {}
            optimizers[name] = checkpoint.pack_optimizer(turn.optimizer, tensors)
            writing.put(f"optimizer-{name}", joined(turn.weights, tensors))
            writing.put(f"player-{name}", checkpoint.weights_of(turn.player.weights))
        if trainer.ema is not None:
            writing.put("ema", trainer.ema.tensors())
        if trainer.tracked is not None:
            writing.put("averages", trainer.tracked.tensors())
        if main:
            keep = trainer.options.keep_checkpoints
            writing.attempt(lambda: checkpoint.finish(writing.partial, state, trainer.texts, keep=keep))


def load(trainer: Trainer, path: Path) -> None:
    """Set a fresh trainer to where a checkpoint was written. Raises UserError as `Trainer.load` says."""
    checkpoint.verify(path)
    state = checkpoint.read_state(path)
    trainer.sharding.reshard()
    trainer.step, trainer.started = int(state["step"]), int(state["started"])
    trainer.micro_batches = trainer.options.micro_batches or int(state.get("micro_batches", 1))
    trainer.data.load_state(state["data"])
    trainer.method.load_state(checkpoint.join(state["method"], checkpoint.read(path, "method")))
    trainer.start_players()
    trainer.started = int(state["started"])
    names = [turn.player.name for turn in trainer.turns]
    if sorted(names) != sorted(state["optimizers"]):
        raise UserError(f"{path}: was written by players {sorted(state['optimizers'])}, but this run has {sorted(names)}")
    for turn in trainer.turns:
        name = turn.player.name
        checkpoint.restore(checkpoint.weights_of(turn.player.weights), path, f"player-{name}")
        moments = cut(turn.weights, checkpoint.read(path, f"optimizer-{name}"))
        checkpoint.unpack_optimizer(turn.optimizer, state["optimizers"][name], moments)
        if scaler := state.get("scalers", {}).get(name):
            turn.scaler.load_state_dict(scaler)
        turn.skipped.fill_(state["skipped"][name][0])
        turn.in_a_row.fill_(state["skipped"][name][1])
        if places := state["skipped"][name][2:]:
            turn.blame.turns.copy_(torch.tensor(places))
    trainer.ema = trainer.start_ema()
    if trainer.ema is not None and state["ema"] is not None:
        checkpoint.restore(trainer.ema.average, path, "ema")
        trainer.ema.updates = int(state["ema"])
    trainer.tracked = trainer.start_tracked()
    if trainer.tracked is not None:
        trainer.tracked.load(path)
    trainer.averages.load_state(state["averages"])
    trainer.health.load_state(state.get("health", {}), trainer.device)
    if (path / f"random-{rank():05d}.safetensors").is_file():
        set_random_state(checkpoint.read(path, f"random-{rank():05d}"), trainer.device)
    if trainer.metrics is not None:
        trainer.metrics.cut(trainer.step)
        trainer.health.recall(trainer.metrics.path)
    trainer.best.recall(None if trainer.metrics is None else trainer.metrics.path)
