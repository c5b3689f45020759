"""A trainer's state as a checkpoint, and back: what `checkpoint` writes and reads as files.

player-NAME     the weights that a player trains, and their buffers
optimizer-NAME  its moments
ema, method     the average, and the tensors that a method keeps
random-RANK     the random generators of every process
state.json      counts and positions
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.training import checkpoint
from fastgen.training.launch import processes, rank, wait
from fastgen.training.random_state import random_state, set_random_state
from fastgen.training.sharding import cut, joined

if TYPE_CHECKING:
    from fastgen.training.loop import Trainer

__all__ = ["load", "save"]


def save(trainer: Trainer, folder: Path) -> Path:
    """Write a checkpoint of everything a resumed run needs into `folder`; all processes do so together."""
    main = rank() == 0
    partial = checkpoint.begin(folder, trainer.step) if main else folder / f".step-{trainer.step:08d}.partial"
    wait()
    checkpoint.write(partial, f"random-{rank():05d}", random_state(trainer.device))
    wait()
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
            "skipped": {turn.player.name: [int(turn.skipped), int(turn.in_a_row)] for turn in trainer.turns},
        }
        tensors: dict[str, Tensor] = {}
        state["method"] = checkpoint.split(trainer.method.state(), "method", tensors)
        put(partial, "method", tensors)
        optimizers = state["optimizers"] = {}
        for turn in trainer.turns:
            name, tensors = turn.player.name, {}
            optimizers[name] = checkpoint.pack_optimizer(turn.optimizer, tensors)
            put(partial, f"optimizer-{name}", joined(turn.weights, tensors))
            put(partial, f"player-{name}", checkpoint.weights_of(turn.player.weights))
        if trainer.ema is not None:
            put(partial, "ema", trainer.ema.tensors())
        if main:
            checkpoint.finish(partial, state, trainer.texts, keep=trainer.options.keep_checkpoints)
    wait()
    return folder / f"step-{trainer.step:08d}"


def put(partial: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    if rank() == 0 or checkpoint.is_sharded(tensors):
        checkpoint.write(partial, name, tensors)


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
    trainer.ema = trainer.start_ema()
    if trainer.ema is not None and state["ema"] is not None:
        checkpoint.restore(trainer.ema.average, path, "ema")
        trainer.ema.updates = int(state["ema"])
    trainer.averages.load_state(state["averages"])
    trainer.health.load_state(state.get("health", {}), trainer.device)
    if (path / f"random-{rank():05d}.safetensors").is_file():
        set_random_state(checkpoint.read(path, f"random-{rank():05d}"), trainer.device)
    if trainer.metrics is not None:
        trainer.metrics.cut(trainer.step)
        trainer.health.recall(trainer.metrics.path)
    trainer.best.recall(None if trainer.metrics is None else trainer.metrics.path)
