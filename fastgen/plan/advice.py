"""What to change so that a run fits. Changes are chosen by scaling the plan there is, and what they come to is planned anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastgen.config import RunConfig
from fastgen.errors import UserError
from fastgen.plan.estimate import estimate
from fastgen.plan.record import Plan, Turn

__all__ = ["Advice", "advise", "scaled"]

LEAST_RANK = 8
WORTH = 0.99
"""A change is kept where it leaves at most this part of the peak."""
HALVED = 0.55
"""Part of float32's activations that is left in bf16; norms and losses stay in float32."""
BYTES = {"int8": 1 + 4 / 128, "nf4": 0.5 + 4 / 64}
"""A weight's, with its share of the scales."""


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
    """The changes that bring the run of `plan` under `memory` bytes, those that cost nothing in quality first.

    The run is planned anew once the changes seem to be enough or there are no more of them; where they are not enough after
    all, the search goes on from that plan. Of two plans that differ by the micro-batch alone it learns what does not shrink
    with it, so that no further size is planned in vain.
    """
    known, base, peak, changes = plan, config, plan.peak, list[str]()
    fixed: dict[str, float] = {}
    for override, changed in candidates(config):
        if peak <= memory:
            break
        try:
            attempt = changed(copy.deepcopy(config))
        except UserError:  # What this change asks for was not worth changing.
            continue
        expected = scaled(known, base, attempt, fixed)
        if expected >= WORTH * peak:
            continue
        config, peak = attempt, expected
        changes = [each for each in changes if each.partition("=")[0] != override.partition("=")[0]] + [override]
        if peak <= memory:
            before, known = known, estimate(config, offline=offline, device=device)
            if with_parts(config.train.micro_batches)(base) == config:
                fixed = unshrinking(before, known)
            base, peak = config, known.peak
    if base is not config:
        peak = estimate(config, offline=offline, device=device).peak
    return Advice(memory, tuple(changes), peak, peak <= memory)


Change = Callable[[RunConfig], RunConfig]


def candidates(config: RunConfig) -> Iterator[tuple[str, Change]]:
    """Changes that are not made yet, as an override and what it does to a config. It may raise UserError."""
    train = config.train
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true", lambda c: replace(c, train=replace(c.train, gradient_checkpointing=True))
    for parts in range(2 * max(1, train.micro_batches), train.batch + 1):
        if train.batch % parts == 0 and (parts & (parts - 1) == 0 or parts == train.batch):
            yield f"train.micro_batches={parts}", with_parts(parts)
    if config.offload == "none":
        yield 'offload="encoders"', lambda c: replace(c, offload="encoders")
    if train.precision != "bf16":
        yield 'train.precision="bf16"', lambda c: replace(c, train=replace(c.train, precision="bf16"))
    for role in [role for role, how in config.roles.items() if how == "full"]:
        yield f'roles.{role}="lora"', with_adapter(role)
    if config.quantize == "none":
        yield 'quantize="int8"', lambda c: replace(c, quantize="int8")
    if config.quantize != "nf4":
        yield 'quantize="nf4"', lambda c: replace(c, quantize="nf4")
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


# -- scaling --------------------------------------------------------------------------------------


def scaled(plan: Plan, was: RunConfig, now: RunConfig, fixed: Mapping[str, float] | None = None) -> int:
    """About what the peak of the run `was`, which `plan` is of, becomes in the run `now`, from the plan's parts alone.

    `fixed` are the bytes of each player's turn that do not shrink with the micro-batch, as far as they are known.
    """
    held = plan.held + base_weights(plan, now) - base_weights(plan, was)
    grown = {row.name: grown_role(plan, row.name, was, now) for row in plan.rows if row.optimizer}
    held += sum(after.kept - row.kept for row in plan.rows if (after := grown.get(row.name)) is not None)
    stowed = was.offload == "none" != now.offload
    frozen = [row for row in plan.rows if not row.optimizer and not row.name.startswith("teacher")]
    encoders = sum(row.weights for row in frozen if "freed" in row.name) * (1 - width(now) / width(was))
    if stowed:
        held -= sum(row.weights for row in frozen if "freed" not in row.name)
        encoders = sum(row.weights for row in frozen if "freed" in row.name)
    fewer = (max(1, was.train.micro_batches) * now.train.batch) / (max(1, now.train.micro_batches) * was.train.batch)
    half = HALVED if now.train.precision != was.train.precision else 1.0
    peaks = [held + moved(turn, plan, grown, was, now, fewer, half * (fixed or {}).get(turn.player, 0)) for turn in plan.turns]
    preparing = plan.preparing + held - plan.held - encoders
    return round(max(*peaks, preparing, held + (plan.samples - plan.held) * fewer * half))


def unshrinking(one: Plan, other: Plan) -> dict[str, float]:
    """What of each player's turn is there at any micro-batch, in bytes, from the plans of two sizes of it.

    Nothing is known where the plans are of different updates, since those may be of different stages.
    """
    found: dict[str, float] = {}
    if one.update != other.update:
        return found
    for a, b in zip(one.turns, other.turns, strict=True):
        most, least = (turn.peak - plan.held - turn.gradients for turn, plan in ((a, one), (b, other)))
        slope = (most - least) / (one.micro_batch - other.micro_batch)
        found[a.player] = min(max(0.0, least - slope * other.micro_batch), most, least)
    return found


def moved(turn: Turn, plan: Plan, grown: dict[str, Any], was: RunConfig, now: RunConfig, fewer: float, fixed: float) -> float:
    """What one player's move adds to what is held; all but `fixed` bytes of its activations become `fewer` times as many."""
    before = {row.name: row for row in plan.rows}
    mine = [name for name in grown if name == turn.player] or list(grown)
    gradients = turn.gradients + sum(grown[name].gradients - before[name].gradients for name in mine if name == turn.player)
    rest = max(0, turn.peak - plan.held - turn.gradients - turn.saved)
    again = now.train.gradient_checkpointing and not was.train.gradient_checkpointing
    saved = turn.saved - turn.spare + turn.block if again else turn.saved
    # Autocast keeps a bf16 copy of every trained weight that it meets.
    copies = sum(grown[name].weights / 2 for name in mine) if now.train.precision != was.train.precision else 0
    half = HALVED if now.train.precision != was.train.precision else 1.0
    activations = half * (saved + rest)
    return float(gradients + min(activations, fixed) + max(0.0, activations - fixed) * fewer + copies)


def grown_role(plan: Plan, name: str, was: RunConfig, now: RunConfig) -> Any:
    """The row of what is trained, after it has become an adapter or its rank has changed."""
    row = next(each for each in plan.rows if each.name == name)
    if ":" in name or now.role(name) != "lora":
        return row
    rank = now.lora.ranks.get(name, now.lora.rank)
    if was.role(name) == "lora":
        part = rank / was.lora.ranks.get(name, was.lora.rank)
    else:
        part = plan.per_rank * rank / max(1, row.weights)
    sizes = ("weights", "gradients", "optimizer", "ema")
    return replace(row, **{size: round(getattr(row, size) * part) for size in sizes})


def base_weights(plan: Plan, config: RunConfig) -> float:
    """Bytes of the frozen base of the run `config`."""
    count = sum(row.parameters for row in plan.rows if row.name.startswith("teacher"))
    packed = 0.0 if config.quantize == "none" else plan.reducible * (width(config) - BYTES[config.quantize])
    return count * width(config) - packed


def width(config: RunConfig) -> int:
    """Bytes of a frozen weight: bf16 where nothing but adapters is trained in bf16 (see `open_pipeline`)."""
    lora = all(config.role(role) == "lora" for role in ("student", "fake_score"))
    return 2 if lora and config.train.precision == "bf16" else 4
