"""The plan of one run: its own loading, set-up and update, on tensors that have shapes but no values.

Nothing here knows a method or a pipeline. The trainer moves every player once, and a ledger of live tensors says what was held
before, what was saved for the backward pass, and the greatest sum. Gradient checkpointing, micro-batches, adapters on a shared
base, several graphs at once: each counts as what it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError

from fastgen.config import RunConfig
from fastgen.data.encoding import free_text_encoders
from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.method import Batch, Method
from fastgen.pipelines.base import Pipeline, feature_layers, network_name
from fastgen.pipelines.loading import built_by
from fastgen.pipelines.offloading import offloaded_components
from fastgen.plan.folding import Unfoldable, fold
from fastgen.plan.hollow import build, guess, stow
from fastgen.plan.ledger import Hollow, Ledger, converting, empty
from fastgen.plan.record import Plan
from fastgen.plan.rows import Table, adapter_sizes, is_adapter, largest_block, reducible
from fastgen.plan.turns import checkpointed_units, moments
from fastgen.samplers import FewStep
from fastgen.training.grids import Grids
from fastgen.training.loop import Trainer
from fastgen.training.run import GRID_PROMPTS, open_pipeline, teacher_guidance

__all__ = ["estimate"]


def estimate(config: RunConfig, *, offline: bool = False, device: str = "cuda") -> Plan:
    """What the run that `config` describes needs on a `device` ("cpu" draws more samples at once). Reads no weights.

    Raises UserError where the run could not begin either, and for a network whose shapes depend on values.
    """
    try:
        return planned(config, offline, device, folded=True)
    except (Unfoldable, CheckpointError):  # A method that now and then looks into blocks that are computed again.
        return planned(config, offline, device, folded=False)


def planned(config: RunConfig, offline: bool, device: str, *, folded: bool) -> Plan:
    """`estimate`, with blocks alike `folded` or each of them computed. Raises Unfoldable where they have to be."""
    # What is merged into the teacher weighs nothing.
    config = replace(copy.deepcopy(config), teacher_weights="", teacher_loras=[])
    ledger = Ledger(Hollow())
    undo: list[Callable[[], None]] = []

    def builder(folder: Path, dtype: torch.dtype) -> Any:
        loaded = build(folder, dtype, ledger)
        if folded:
            network = getattr(loaded, network_name(loaded))
            fold(network, ledger, feature_layers(network))
        undo.append(guess(loaded))
        return loaded

    try:
        with built_by(builder):
            pipeline = open_pipeline(config, offline=offline)
        for restore in undo:
            restore()
        place(pipeline, config, ledger, device)
        with ledger, converting():
            return observe(config, pipeline, ledger, device)
    except (NotImplementedError, torch._subclasses.fake_tensor.DynamicOutputShapeException) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{config.pipeline} cannot be planned, since its shapes depend on values: {reason}") from problem


def place(pipeline: Pipeline, config: RunConfig, ledger: Ledger, device: str) -> None:
    """Count what the pipeline's loading left: layers in reduced form, and offloaded components not at all."""
    for buffer in pipeline.network.buffers():
        ledger.enter(buffer)
    if device == "cpu":
        return
    if config.offload != "none":
        for component in offloaded_components(pipeline.diffusers, pipeline.network).values():
            stow(component, ledger)
    ledger.restart()  # Loading goes through the CPU's memory.


def observe(config: RunConfig, pipeline: Pipeline, ledger: Ledger, device: str) -> Plan:
    """Set the method up, and watch every player move in each of its stages."""
    method, train, roles = config.method, config.train, Roles(pipeline)
    pipeline.partial_passes, pipeline.batched_guidance = config.speed.partial_passes, config.speed.batched_guidance
    method.setup(pipeline)
    for module in [role for _, role in roles.made] + [player.weights for player in method.players()]:
        assert ledger.hollow is not None
        empty(module, ledger.hollow)
    data = Blank(pipeline, method)
    prompts = train.sample_prompts or ["a"] * GRID_PROMPTS
    size = 16 if device == "cpu" else train.batch // max(1, train.micro_batches)
    trainer = Trainer(method, data, train, device="cpu")  # type: ignore[arg-type]
    grids = Grids(pipeline, Path(), prompts, at_once=size, autocast=trainer.accelerator.autocast)
    stowed = config.offload if device != "cpu" else "none"
    preparing, rows = ledger.peak, Table(trainer, roles.made, pipeline, stowed)
    free_text_encoders(pipeline)
    units = checkpointed_units([pipeline.network, *(role.network for _, role in roles.made)])
    seen = [(moment, rows.now()) for moment in moments(trainer, ledger, units)]
    worst, told = max(seen, key=lambda each: each[0].peak)
    # Grids are drawn at any time, also when the most is held.
    samples = drawn(grids, config, pipeline, trainer, ledger) + max(each.held for each, _ in seen) - seen[-1][0].held
    trained = [module for _, module in roles.made if not is_adapter(module)]
    return Plan(
        pipeline=config.pipeline,
        network=type(pipeline.network).__name__,
        method=config.method_name,
        batch=train.batch,
        micro_batch=train.batch // max(1, train.micro_batches),
        latent_shape=tuple(pipeline.latent_shape),
        precision=train.precision,
        update=worst.update,
        looked_at=len(seen),
        rows=told,
        turns=worst.turns,
        preparing=preparing,
        held=worst.held,
        samples=samples,
        block=max((largest_block(module) for module in trained), default=0),
        per_rank=4 * sum(adapter_sizes(pipeline)),
        reducible=sum(layer.in_features * layer.out_features for layer in reducible(pipeline.network)),
        shardable=sum(row.kept for row in told if row.name in {name for name, _ in roles.made}),
    )


class Roles:
    """Notes the denoisers that a method asks its pipeline for, under the roles it names."""

    def __init__(self, pipeline: Pipeline):
        self.made: list[tuple[str, Denoiser]] = []
        make = pipeline.trainable

        def noted(role: str, **options: Any) -> Denoiser:
            made = make(role, **options)
            self.made.append((role, made))
            return made

        pipeline.trainable = noted  # type: ignore[method-assign]


class Blank:
    """Training batches of the right shapes."""

    def __init__(self, pipeline: Pipeline, method: Method):
        self.condition: Condition = pipeline.encode_prompts(["a"])
        self.shape, self.needs = tuple(pipeline.latent_shape), method.needs

    def batch(self, size: int) -> Batch:
        shape = (size, *self.shape)
        images, pairs = "images" in self.needs, "pairs" in self.needs
        return Batch(
            self.condition[[0] * size],
            shape,
            latents=torch.randn(shape) if images else None,
            noise=torch.randn(shape) if pairs else None,
            target=torch.randn(shape) if pairs else None,
            prompts=("a",) * size,
        )


def drawn(grids: Grids, config: RunConfig, pipeline: Pipeline, trainer: Trainer, ledger: Ledger) -> int:
    """The peak of drawing samples of teacher and student; a single step weighs what several do."""
    ledger.restart()
    student, ema = config.method.trained, trainer.ema
    with torch.no_grad(), grids.autocast():
        grids.sample(pipeline.frozen(), FewStep((1.0,), guidance=teacher_guidance(config, pipeline)))
        with ema.applied(student) if ema is not None else nullcontext():
            grids.sample(student, FewStep((1.0,)))
    return ledger.peak
