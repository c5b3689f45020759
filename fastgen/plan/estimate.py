"""The plan of one run: its own loading, set-up and update, on tensors that have shapes but no values.

Nothing here knows a method or a pipeline. The trainer moves every player once, and a ledger of live tensors says what was held
before, what was saved for the backward pass, and the greatest sum. Gradient checkpointing, micro-batches, adapters on a shared
base, several graphs at once: each counts as what it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastgen.config import RunConfig
from fastgen.data.encoding import free_text_encoders
from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.method import Batch, Loss, Method
from fastgen.pipelines.base import Pipeline, feature_layers, network_name
from fastgen.pipelines.loading import built_by
from fastgen.pipelines.offloading import offloaded_components
from fastgen.pipelines.quantization import QuantizedLinear, linear_layers
from fastgen.plan.folding import Unfoldable, fold
from fastgen.plan.hollow import build, guess, stow
from fastgen.plan.ledger import Hollow, Ledger, converting, empty, tensors_in
from fastgen.samplers import FewStep
from fastgen.training.grids import Grids
from fastgen.training.loop import Trainer
from fastgen.training.run import GRID_PROMPTS, open_pipeline, teacher_guidance

__all__ = ["Plan", "Row", "estimate"]

MOMENTS = 2


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
    """Set the method up, and watch every player move once."""
    method, train, roles = config.method, config.train, Roles(pipeline)
    method.setup(pipeline)
    for module in [role for _, role in roles.made] + [player.weights for player in method.players()]:
        assert ledger.hollow is not None
        empty(module, ledger.hollow)
    data = Blank(pipeline, method)
    prompts = train.sample_prompts or ["a"] * GRID_PROMPTS
    size = 16 if device == "cpu" else train.batch // train.micro_batches
    trainer = Trainer(method, data, train, device="cpu")  # type: ignore[arg-type]
    grids = Grids(pipeline, Path(), prompts, at_once=size, autocast=trainer.accelerator.autocast)
    stowed = config.offload if device != "cpu" else "none"
    preparing, rows = ledger.peak, tuple(table(pipeline, method, trainer, roles.made, stowed))
    free_text_encoders(pipeline)
    start_optimizers(trainer, ledger)
    method.advance(0, train.steps)
    held = ledger.restart()
    units = checkpointed_units([pipeline.network, *(role.network for _, role in roles.made)])
    turns = tuple(watched(trainer, i, ledger, units) for i in range(len(trainer.turns)))
    trained = [module for _, module in roles.made if not is_adapter(module)]
    return Plan(
        pipeline=config.pipeline,
        network=type(pipeline.network).__name__,
        method=config.method_name,
        batch=train.batch,
        micro_batch=train.batch // train.micro_batches,
        latent_shape=tuple(pipeline.latent_shape),
        precision=train.precision,
        rows=rows,
        turns=turns,
        preparing=preparing,
        held=held,
        samples=drawn(grids, config, pipeline, trainer, ledger),
        block=max((largest_block(module) for module in trained), default=0),
        per_rank=4 * sum(adapter_sizes(pipeline)),
        reducible=sum(layer.in_features * layer.out_features for layer in reducible(pipeline.network)),
        shardable=sum(row.kept for row in rows if row.name in {name for name, _ in roles.made}),
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


def drawn(grids: Grids, config: RunConfig, pipeline: Pipeline, trainer: Trainer, ledger: Ledger) -> int:
    """The peak of drawing samples of teacher and student; a single step weighs what several do."""
    ledger.restart()
    student, ema = config.method.trained, trainer.ema
    with torch.no_grad(), grids.autocast():
        grids.sample(pipeline.frozen(), FewStep((1.0,), guidance=teacher_guidance(config.method, pipeline)))
        with ema.applied(student) if ema is not None else nullcontext():
            grids.sample(student, FewStep((1.0,)))
    return ledger.peak


# -- the table ------------------------------------------------------------------------------------


def table(
    pipeline: Pipeline, method: Method, trainer: Trainer, roles: list[tuple[str, Denoiser]], offload: str
) -> Iterable[Row]:
    """A row a role, one for what players learn beside (heads of discriminators), one for each frozen component."""
    moving = {id(weight) for turn in trainer.turns for weight in turn.weights}
    averaged = {id(weight) for weight in trainer.ema.weights.values()} if trainer.ema is not None else set()
    told: set[int] = set()

    def row(name: str, module: nn.Module) -> Row:
        weights = list({id(w): w for w in module.parameters() if id(w) not in told}.values())
        told.update(map(id, weights))
        moved = [weight for weight in weights if id(weight) in moving]
        reduced = [each for each in module.modules() if isinstance(each, QuantizedLinear)]
        return Row(
            name,
            parameters=sum(w.numel() for w in weights) + sum(each.in_features * each.out_features for each in reduced),
            trainable=sum(weight.numel() for weight in moved),
            weights=size_of(weights) + sum(size_of(each.buffers()) for each in reduced),
            gradients=size_of(moved),
            optimizer=MOMENTS * size_of(moved),
            ema=sum(w.numel() * max(4, w.element_size()) for w in weights if id(w) in averaged),
        )

    for name, role in roles:
        yield row(name, role)
    for turn in trainer.turns:
        rest = row(f"{turn.player.name}: heads", turn.player.weights)
        if rest.parameters:
            yield rest
    for name, component in pipeline.diffusers.components.items():
        if isinstance(component, nn.Module):
            if component is pipeline.network:
                yield row(f"teacher ({name})", component)
            elif offload != "none":
                yield replace(row(f"{name}, in the CPU's memory", component), weights=0)
            else:
                yield row(f"{name}, freed before training" if name.startswith("text_encoder") else name, component)


def adapter_sizes(pipeline: Pipeline) -> Iterable[int]:
    """The number of weights of an adapter of rank 1, layer by layer."""
    targets = pipeline.lora.targets or pipeline.lora_targets
    for name, layer in pipeline.network.named_modules():
        if ".lora_" in name or not name.removesuffix(".base_layer").endswith(tuple(f".{target}" for target in targets)):
            continue
        if isinstance(layer, nn.Linear):
            yield layer.in_features + layer.out_features
        elif isinstance(layer, nn.Conv2d):
            yield layer.weight[0].numel() + layer.out_channels


def reducible(network: nn.Module) -> Iterable[nn.Linear]:
    """The layers that `quantize` reduces, or has reduced."""
    done = [layer for layer in network.modules() if isinstance(layer, QuantizedLinear)]
    return done or [layer for name, layer in linear_layers(network) if ".lora_" not in name]


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_adapter(role: Denoiser) -> bool:
    return role.own is not role.network


def largest_block(module: nn.Module) -> int:
    """Bytes of the largest member of a network's lists of blocks; of all of it where there are none."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max((size_of(block.parameters()) for part in lists for block in part), default=size_of(module.parameters()))
