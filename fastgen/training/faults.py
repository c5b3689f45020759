"""What goes wrong in the middle of a run, and the sentence for it: numbers that are not finite, disks that refuse, processes
that are lost.

A gradient that is not finite moves nothing and is counted; `Blame` keeps where in the player's turn the first number that is
not finite was seen. A disk that refuses costs a line, a picture or a checkpoint, not the run: it goes on, and tries again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.method import Batch
from fastgen.training.launch import processes

__all__ = ["SAVE_TRIES", "SKIP_LIMIT", "Blame", "disk_refused", "losses_of_processes_told", "why_skipped"]

SKIP_LIMIT = 20
"""So many turns of a player in a row without a finite gradient end a run."""
SAVE_TRIES = 3
"""So many checkpoints in a row that cannot be written end a run."""

INPUTS = ("condition", "latents", "noise", "target")
PLACES = (*INPUTS, "loss")
REASON = re.compile(r"connection (closed|reset|refused)( by peer)?|broken pipe|timed? ?out", re.I)
LOST = re.compile(rf"gloo|nccl|process group|remote process|{REASON.pattern}", re.I)


# -- numbers that are not finite --------------------------------------------------------------------


class Blame:
    """Counts, over one player's turns in a row without a finite gradient, where the first such number was seen.

    `turns` [5]: of these turns, those whose condition, latents, noise or target (of the batch) or whose loss was not finite.
    Everything stays on the device, so that nothing waits for it.
    """

    def __init__(self, device: torch.device):
        self.turns, self.now = torch.zeros(len(PLACES), device=device), torch.zeros(len(PLACES), device=device)

    @torch.no_grad()
    def look(self, batch: Batch, loss: Tensor) -> None:
        """Take in a micro-batch and its loss (a scalar)."""
        tensors = {"latents": batch.latents, "noise": batch.noise, "target": batch.target}
        found = [any_broken(numbers(batch.condition), loss)]
        found += [any_broken([] if tensors[name] is None else [tensors[name]], loss) for name in INPUTS[1:]]
        found.append(any_broken([loss], loss))
        self.now = torch.maximum(self.now, torch.stack(found).to(self.now))

    def end_turn(self, bad: Tensor) -> None:
        """The turn is over; `bad` (a scalar) is 1 where its gradient was not finite, else 0, which forgets all before."""
        self.turns = (self.turns + self.now) * bad
        self.now = torch.zeros_like(self.now)

    def counts(self) -> dict[str, int]:
        """The turns by place, of all processes together: all of them have to ask."""
        turns = self.turns.clone()
        if processes() > 1:
            dist.all_reduce(turns)
        return {name: int(count) for name, count in zip(PLACES, turns.tolist(), strict=True)}


def numbers(condition: Condition) -> Iterator[Tensor]:
    """The tensors of a condition that can hold what is not finite."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    condition._map(note, note)
    return (tensor for tensor in found if tensor.is_floating_point())


def any_broken(tensors: Iterator[Tensor] | list[Tensor | None] | list[Tensor], like: Tensor) -> Tensor:
    """1 where any of the tensors has an element that is not finite, else 0; a scalar on the device of `like`."""
    flags = [(~torch.isfinite(tensor)).any().to(like.device) for tensor in tensors if tensor is not None]
    return torch.stack(flags).any().float() if flags else torch.zeros((), device=like.device)


def why_skipped(
    player: str, times: int, counts: Mapping[str, int], terms: Mapping[str, Tensor], *, lr: float, precision: str
) -> str:
    """The likely cause of a player's gradients that were not finite so many times in a row, in one sentence.

    `terms` are the sums of its losses since the last line of metrics.
    """
    text = f"the gradient of player '{player}' was not finite {times} times in a row: "
    broken = [name for name in INPUTS if counts[name]]
    if broken:
        names = " and ".join(f"`{name}`" for name in broken)
        return text + f"the data hold values that are no numbers ({names} of the batch); check the files, or empty data.cache"
    overflow = '; fp16 ends at 65504, so try train.precision = "bf16"' if precision == "fp16" else ""
    named = [name for name, value in terms.items() if name.startswith(f"{player}/") and not bool(torch.isfinite(value))]
    named = [name for name in named if name != f"{player}/gradient_norm"]
    if counts["loss"]:
        loss = f"its loss {named[0]}" if named else "its loss"
        return text + f"the data are finite but {loss} is not; train.lr = {lr:g} is probably too high{overflow}"
    return text + f"its loss is finite but the gradient overflows; lower train.lr = {lr:g} or a loss weight{overflow}"


# -- disks that refuse ------------------------------------------------------------------------------


def disk_refused(write: Callable[[], object]) -> UserError | None:
    """Do what writes; the error where the disk refused it. Any other error is raised."""
    try:
        write()
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return error
    except OSError as error:
        return UserError(f"{error.filename or 'a file'}: cannot be written ({error.strerror or error})")
    return None


# -- processes that are lost ------------------------------------------------------------------------


@contextmanager
def losses_of_processes_told(where: Callable[[], str]) -> Iterator[None]:
    """A block whose communication fails in one sentence when another process is gone; `where` says how far the run is."""
    try:
        yield
    except RuntimeError as error:
        if processes() == 1 or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        known = REASON.search(str(error))
        reason = known[0] if known else " ".join(str(error).split())[:200]
        raise UserError(f"another process of this run has ended or does not answer, {where()} ({reason})") from error
