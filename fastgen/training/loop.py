"""The training loop, the same for every method: its players take turns.

A turn: only the mover's weights require a gradient, its loss is computed on micro-batches, gradients are averaged over the
processes, clipped, and applied. Networks stay unwrapped (no DDP), since losses call them as often as they like, in one
another's graphs. accelerate gives the processes, the device, mixed precision and trackers; accumulation is done here, because
several optimisers alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgen.config import TrainConfig
from fastgen.data.source import Source
from fastgen.errors import UserError
from fastgen.losses.readings import listen
from fastgen.method import Method, Player
from fastgen.training import best, checkpoint, optimizers, saving
from fastgen.training.calls import Calls
from fastgen.training.ema import EMA, course_of_decay
from fastgen.training.faults import SKIP_LIMIT, Blame, disk_refused, losses_of_processes_told, why_skipped
from fastgen.training.grids import Grids
from fastgen.training.health import Health, moved_and_size, sampled, with_update_sizes
from fastgen.training.launch import Interrupted, Interrupts, make_accelerator, processes, rank
from fastgen.training.metrics import Averages, MetricsFile
from fastgen.training.micro_batches import within_memory
from fastgen.training.posthoc import Tracked
from fastgen.training.progress import Reporter
from fastgen.training.quality import Quality
from fastgen.training.random_state import random_state, set_random_state
from fastgen.training.report import write_report
from fastgen.training.schedules import pace
from fastgen.training.sharding import Sharding, gradient_norm, hand_over, own_parts
from fastgen.training.trackers import Trackers

__all__ = ["Interrupted", "Trainer", "average_gradients"]

BUCKET = 2**26
HALF = (
    "player '{name}' trains weights of {dtype}, which would round small updates away; load the pipeline in float32: "
    'train.precision = "bf16" computes in half precision, and keeps the weights whole'
)


@dataclass
class Turn:
    """A player with its trainable weights, optimiser and own settings, and how many of its steps were skipped (in all, and in
    a row).
    """

    player: Player
    weights: list[nn.Parameter]
    parts: list[nn.Parameter]  # of the weights, what this process moves: all, where they are not sharded
    optimizer: torch.optim.Optimizer
    options: TrainConfig
    skipped: Tensor
    in_a_row: Tensor
    blame: Blame  # for those in a row
    scaler: torch.amp.GradScaler  # of losses in fp16; else it does nothing

    @property
    def has_own_lr(self) -> bool:
        own = self.options.players.get(self.player.name)
        return own is not None and own.lr is not None

    @property
    def lr(self) -> float:
        """The learning rate before the schedule; one that is the player's own is not scaled."""
        return self.options.lr * (1 if self.has_own_lr else self.player.lr_scale)


class Trainer:
    """Trains the players of a method that has been set up."""

    def __init__(
        self,
        method: Method,
        data: Source,
        options: TrainConfig,
        *,
        run_directory: Path | None = None,
        device: torch.device | str | None = None,
        accelerator: Accelerator | None = None,
        grids: Grids | None = None,
        quality: Quality | None = None,
        reporter: Reporter | None = None,
        texts: Mapping[str, str] | None = None,
    ):
        """`run_directory` is where metrics and checkpoints go; without one nothing is written. `texts` (file name to content)
        are put into every checkpoint. `device` is accelerate's choice by default. `reporter` says nothing by default.
        `quality` is measured every `options.quality_every` updates.
        """
        self.method, self.data, self.options, self.run_directory = method, data, options, run_directory
        self.accelerator = accelerator or make_accelerator(options.precision, device)
        self.device = torch.device(device) if device else self.accelerator.device
        self.grids, self.reporter, self.texts = grids, reporter or Reporter(quiet=True), dict(texts or {})
        self.quality, self.calls, self.best = quality, Calls(), best.Best(options.patience, self.device)
        self.health = Health(self.reporter.say)
        self.trackers = Trackers(self.accelerator, self.reporter.say)
        self.step, self.total, self.started = 0, options.steps, 0
        self.micro_batches = options.micro_batches or 1
        self.unsaved = 0  # checkpoints in a row that could not be written
        self.averages = Averages()
        self.metrics = MetricsFile(run_directory / "metrics.jsonl") if run_directory and rank() == 0 else None
        optimizers.check_options(options, method)
        self.share_weights()
        self.sharding = Sharding(method, options, self.device)
        self.start_players()
        self.ema, self.tracked = self.start_ema(), self.start_tracked()

    # -- players ----------------------------------------------------------------------------------

    def start_players(self) -> None:
        """Fresh optimisers for the method's players. What is trainable now is what moves from here on."""
        self.started = self.step
        self.turns: list[Turn] = []
        for player in self.method.players():
            weights = [weight for weight in player.weights.parameters() if weight.requires_grad]
            if not weights:
                raise ValueError(f"player {player.name!r} has no trainable weights")
            for weight in weights:
                if weight.dtype in (torch.float16, torch.bfloat16):
                    raise UserError(HALF.format(name=player.name, dtype=str(weight.dtype).removeprefix("torch.")))
            options, device = self.options.of(player.name), weights[0].device
            parts = own_parts(weights)
            optimizer = optimizers.make_optimizer(parts, options, options.lr)
            skipped, in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
            scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
            self.turns.append(Turn(player, weights, parts, optimizer, options, skipped, in_a_row, Blame(device), scaler))
        if self.quality is not None:
            self.calls.follow(self.method.trained, getattr(self.method.sampler(), "times", ()))

    def start_ema(self) -> EMA | None:
        decay = course_of_decay(self.options, self.options.batch * processes())
        return None if decay is None else EMA(self.method.trained, decay)

    def start_tracked(self) -> Tracked | None:
        return Tracked(self.method.trained, self.step) if self.options.ema_posthoc else None

    def share_weights(self) -> None:
        """Every process starts from the weights of the first."""
        if processes() > 1:
            for player in self.method.players():
                for value in checkpoint.weights_of(player.weights).values():
                    if not isinstance(value, DTensor):
                        dist.broadcast(value.detach(), 0)

    # -- the loop ---------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the update that is due to the last, with metrics, grids and checkpoints on the way.

        Raises Interrupted after SIGINT or SIGTERM, once a checkpoint is written, and UserError when training has broken down.
        """
        self.reporter.start(self.step, self.total)
        with self.reporter, Interrupts() as interrupts, losses_of_processes_told(self.whereabouts):
            while self.step < self.total and not self.best.exhausted:
                self.update()
                seen, options = self.look(), self.options
                shown, due = self.is_due(options.sample_every), self.is_due(options.checkpoint_every)
                losses = self.log(seen) if shown or self.measures or self.is_due(options.log_every) else None
                self.reporter.advance(self.step, losses)
                better = self.measures and self.best.add(seen.get("quality", 0.0))
                better = better and options.keep_best
                caught = interrupts.agreed(self.device)
                if caught or due or better or self.best.exhausted:
                    saved = saving.try_to_save(self, bool(caught) or self.best.exhausted or self.step == self.total)
                    if saved is not None and better and rank() == 0:
                        self.tolerant(partial(best.keep, saved, saved.parents[1]))
                if self.run_directory is not None and rank() == 0 and (shown or self.measures or due):
                    self.tolerant(partial(write_report, self.run_directory))
                if caught:
                    raise Interrupted(caught, self.step)
                if self.best.exhausted:
                    self.reporter.say(
                        f"update {self.step}: no better quality in {self.best.waited} measurements (train.patience)"
                    )

    def look(self) -> dict[str, float]:
        """What pictures and samples say, where they are due: grids are drawn, quality is measured."""
        seen: dict[str, float] = {}
        if self.grids is not None and self.is_due(self.options.sample_every):
            self.sharding.reshard()
            self.tolerant(partial(self.grids.draw, self.method, self.step, self.ema))
            seen |= self.grids.seen
        if self.quality is not None and self.measures:
            self.sharding.reshard()
            seen |= self.quality.measure(self.method, self.ema, self.calls)
        return seen

    def tolerant(self, write: Callable[[], object]) -> None:
        """Do what writes what a run can do without; a disk that refuses it is told of."""
        if problem := disk_refused(write):
            self.reporter.say(f"update {self.step}: {problem}; training goes on")

    def whereabouts(self) -> str:
        """How far the run is and what is left of it if it ends now."""
        last = checkpoint.latest_good(self.run_directory) if self.run_directory else None
        return f"after update {self.step}; " + (f"the last checkpoint is {last}" if last else "nothing was saved")

    @property
    def measures(self) -> bool:
        """Whether quality is measured after this update."""
        there = self.quality is not None or rank() > 0  # Others than the first process only hear of it.
        return there and self.options.quality_every > 0 and self.is_due(self.options.quality_every)

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many updates, and at the end, happens now."""
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def update(self) -> None:
        """One update: every player whose turn it is moves once."""
        self.sharding.reshard()
        if self.method.advance(self.step, self.total):
            self.start_players()
            self.share_weights()  # those of a player that comes with the stage are drawn by every process for itself
            self.ema, self.tracked = self.start_ema(), self.start_tracked()
        movers = [turn for turn in self.turns if (self.step + 1) % turn.player.every == 0]
        for turn in movers:
            self.move(turn)
        self.sharding.reshard()
        for average in (self.ema, self.tracked):
            if average is not None and any(average.follows(turn.weights) for turn in movers):
                average.update()
        self.step += 1

    def move(self, turn: Turn) -> None:
        """One optimiser step of one player."""
        self.sharding.reshard()
        self.thaw(turn)
        if self.options.micro_batches:
            self.accumulate(turn, self.micro_batches)
        else:
            self.search(turn)
        average_gradients([weight for weight in turn.weights if not isinstance(weight, DTensor)])
        hand_over(turn.weights, turn.parts)
        self.apply(turn)
        self.thaw(None)

    def accumulate(self, turn: Turn, parts: int) -> None:
        """The gradient of the player's loss on a batch, computed in so many parts."""
        player, measured = turn.player, []
        for _ in range(parts):
            batch = self.data.batch(self.options.batch // parts)
            with self.accelerator.autocast(), listen(self.health.readings):
                terms = player.loss(batch)
            loss = sum(terms.values(), torch.zeros((), device=self.device)) / parts
            turn.blame.look(batch, loss)
            self.accelerator.backward(turn.scaler.scale(loss))
            measured += [(f"{player.name}/{name}", term.detach()) for name, term in terms.items()]
        for name, term in measured:
            self.averages.add(name, term)

    def search(self, turn: Turn) -> None:
        """`accumulate` in as few parts as memory allows, found by trying; later turns begin with the number found."""
        data, random = self.data.state(), random_state(self.device)

        def undo() -> None:
            self.thaw(turn)
            self.data.load_state(data)
            set_random_state(random, self.device)

        parts = within_memory(lambda parts: self.accumulate(turn, parts), undo, self.micro_batches, self.options.batch)
        if parts > self.micro_batches:
            self.micro_batches = parts
            self.reporter.say(
                f"update {self.step + 1}, player '{turn.player.name}': out of memory; a batch of {self.options.batch} is now "
                f"computed in {parts} parts (train.micro_batches = {parts})"
            )

    def thaw(self, mover: Turn | None) -> None:
        """Let gradients reach only the mover's weights; None: every player's, as before training. No gradient outlives this."""
        for turn in self.turns:
            for weight in turn.weights:
                weight.requires_grad_(mover is None or turn is mover)
                weight.grad = None
            for part in turn.parts:
                part.grad = None

    def apply(self, turn: Turn) -> None:
        """Clip and step; a gradient that is not finite moves nothing and is counted, on the device, without waiting for it."""
        options = turn.options
        turn.scaler.unscale_(turn.optimizer)
        norm = gradient_norm(turn.weights, turn.parts).to(turn.skipped.device)
        for group in turn.optimizer.param_groups:
            group["lr"] = turn.lr * self.pace(self.step)
        logged = (self.step + 1) % options.log_every == 0
        before = sampled(turn.parts) if logged else []
        bad = optimizers.step(turn.optimizer, norm, options.max_grad_norm)
        if logged:
            copies = [1 if isinstance(weight, DTensor) else processes() for weight in turn.weights]
            for name, value in moved_and_size(before, turn.parts, norm, copies).items():
                self.averages.add(f"{turn.player.name}/{name}", value)
        turn.scaler.update()
        turn.skipped += bad
        turn.in_a_row = (turn.in_a_row + 1) * bad
        turn.blame.end_turn(bad)
        self.averages.add(f"{turn.player.name}/gradient_norm", norm)
        if self.device.type == "cpu" or logged:
            self.check(turn)

    def check(self, turn: Turn) -> None:
        """Raise UserError, with the likely cause, where too many steps in a row were skipped."""
        if turn.in_a_row >= SKIP_LIMIT:
            options, counts = turn.options, turn.blame.counts()
            known: dict[str, Any] = {"lr": options.lr, "precision": options.precision}
            why = why_skipped(turn.player.name, int(turn.in_a_row), counts, self.averages.sums, **known)
            raise UserError(f"{why}; the run stops {self.whereabouts()}")

    def pace(self, step: int) -> float:
        """What the learning rates are multiplied by in update `step`: a rise, then a fall over the method's present stage."""
        options, done = self.options, step - self.started
        length = self.method.stage_end(step, self.total) - self.started
        return pace(options.schedule, done, length, warmup=options.warmup, cooldown=options.cooldown)

    def log(self, seen: Mapping[str, float] | None = None) -> dict[str, float]:
        """The means since the last line and the readings, also of what was `seen`, written to the metrics and the trackers."""
        seen = seen or {}
        for turn in self.turns:
            self.check(turn)
        moved = {turn.player.name: self.averages.count(f"{turn.player.name}/gradient_norm") for turn in self.turns}
        values = with_update_sizes(over_processes(self.averages.take(), self.device))
        for turn in self.turns:
            if skipped := int(turn.skipped):
                values[f"{turn.player.name}/skipped"] = skipped
        values["lr"] = self.options.lr * self.pace(self.step - 1)
        values |= {f"{turn.player.name}/lr": turn.lr * self.pace(self.step - 1) for turn in self.turns if turn.has_own_lr}
        readings, colours = self.health.line(self.step, values, seen, moved, joint_sum if processes() > 1 else None)
        values |= readings | ({"quality": seen["quality"]} if "quality" in seen else {})
        if self.metrics is not None:
            line = {**values, "time": round(time.time(), 2)}
            self.tolerant(partial(self.metrics.write, self.step, line, colours))
        self.trackers.log(values, self.step)
        return values

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of everything a resumed run needs, under the run directory; None where there is none."""
        return None if self.run_directory is None else saving.save(self, self.run_directory / "checkpoints")

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, bit by bit where the device and the number of threads and processes are the same.

        Raises UserError where it is broken, naming the file, or was written by other players.
        """
        saving.load(self, path)


def joint_sum(values: Tensor) -> Tensor:
    """The sum over the processes."""
    dist.all_reduce(values)
    return values


def over_processes(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Means over the processes of what each has measured on its part of the batch."""
    if processes() == 1 or not values:
        return values
    joint = torch.tensor(list(values.values()), device=device)
    dist.all_reduce(joint)
    return dict(zip(values, (joint / processes()).tolist(), strict=True))


@torch.no_grad()
def average_gradients(weights: list[nn.Parameter]) -> None:
    """Average gradients over the processes, in flat buckets; a weight that has one in some process counts as zero elsewhere."""
    if processes() == 1 or not weights:
        return
    present = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.float32, device=weights[0].device)
    dist.all_reduce(present)
    moved = [weight for weight, count in zip(weights, present.tolist(), strict=True) if count]
    for weight in moved:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    bucket: list[Tensor] = []
    for i, weight in enumerate(moved):
        assert weight.grad is not None
        bucket.append(weight.grad)
        following = moved[i + 1].grad if i + 1 < len(moved) else None
        if following is None or following.dtype != weight.grad.dtype or sum(grad.numel() for grad in bucket) > BUCKET:
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat)
            flat /= processes()
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
            bucket = []
