"""Of many blocks alike in a row, the first and the last are computed; those between stand for what the first one took.

A network of 57 blocks is then planned in the time of a few. The answers of a block between are made, and what the first one
left for the backward pass is held in one piece, so live memory is the same before, between and after blocks. What a block needs
within is seen at the last one, when most of what is saved is live.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.plan.ledger import Ledger, tensors_in

__all__ = ["Unfoldable", "fold"]

Description = tuple[tuple[int, ...], torch.dtype]


class Unfoldable(Exception):
    """A derivative of a gradient was asked for; blocks that are not computed have none."""


def fold(network: nn.Module, ledger: Ledger, watched: Iterable[str] = ()) -> None:
    """Let only the first and the last of three or more blocks alike be computed, in each of a network's lists, in place.

    Those that hold the layers `watched`, by name, are computed too. Copies of the network do the same.
    """
    names = {id(part): f"{name}." for name, part in network.named_modules()}
    for part in network.modules():
        if isinstance(part, nn.ModuleList):
            for row in alike(part):
                known = Known(ledger)
                for i, block in enumerate(row):
                    seen = any(f"{layer}.".startswith(names[id(block)]) for layer in watched)
                    block.__dict__.update(known=known, between=0 < i < len(row) - 1 and not seen, computed=set())
                    kind: Any = type(block)
                    block.__class__ = folding(kind)


def alike(blocks: nn.ModuleList) -> Iterator[list[nn.Module]]:
    """The rows of three or more neighbours of one class whose weights have the same names and shapes."""
    row: list[nn.Module] = []
    previous = None
    for block in [*blocks, None]:
        shape = block and (type(block), [(name, p.shape) for name, p in block.named_parameters()])
        if row and shape != previous:
            if len(row) > 2:
                yield row
            row = []
        if block is not None:
            row.append(block)
        previous = shape


@functools.cache
def folding(kind: Any) -> Any:
    """The class of blocks of `kind` that ask first whether they have to be computed."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.known.call(self, functools.partial(kind.forward, self), args, kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


@dataclass
class Answer:
    """A block's answer, part by part: a tensor that it made, one that it was given (its number), or None; `single` if it is
    no tuple. `saved` are the bytes that were left for the backward pass.
    """

    parts: list[Description | int | None]
    single: bool
    saved: int

    @property
    def made(self) -> list[Description]:
        return [part for part in self.parts if isinstance(part, tuple)]

    def nested(self, made: Iterable[Tensor], given: list[Tensor]) -> Any:
        """The answer, of tensors made anew and those given."""
        new = iter(made)
        whole = tuple(next(new) if isinstance(part, tuple) else None if part is None else given[part] for part in self.parts)
        return whole[0] if self.single else whole


class Known:
    """What is known of blocks alike, by everything that memory depends on."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.answers: dict[Any, Answer | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Known:
        return self

    def call(self, block: Any, whole: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = list(tensors_in((args, kwargs)))
        key = situation(block, given)
        answer = self.answers.get(key)
        if watched := is_watched(block):
            block.computed.add(key)
        # A block that was computed is computed when checkpointing calls it again.
        if block.between and answer is not None and key not in block.computed:
            inputs = [each for each in given if each.requires_grad]
            weights = [each for each in block.parameters() if each.requires_grad]
            if not torch.is_grad_enabled() or not (inputs or weights):
                return answer.nested(map(self.make, answer.made), given)
            made = StandIn.apply(self, answer, len(inputs), *inputs, *weights)  # type: ignore[no-untyped-call]
            return answer.nested(made, given)
        block.computed.add(key)
        before = self.ledger.live
        result = whole(*args, **kwargs)
        if key not in self.answers and not watched:
            self.answers[key] = self.noted(result, given, before)
        return result

    def noted(self, result: Any, given: list[Tensor], before: int) -> Answer | None:
        """None for an answer of a kind that cannot be made again."""
        single = isinstance(result, Tensor)
        answered = (result,) if single else result
        if not isinstance(answered, tuple) or not all(part is None or isinstance(part, Tensor) for part in answered):
            return None
        numbers = {id(each): i for i, each in enumerate(given)}
        parts: list[Description | int | None] = []
        for part in answered:
            parts.append(None if part is None else numbers.get(id(part), (tuple(part.shape), part.dtype)))
        answer = Answer(parts, single, 0)
        answer.saved = max(
            0, self.ledger.live - before - sum(math.prod(shape) * dtype.itemsize for shape, dtype in answer.made)
        )
        return answer

    def make(self, what: Description) -> Tensor:
        """A tensor without values, counted as long as it lives."""
        assert self.ledger.hollow is not None
        with self.ledger.hollow:
            made = torch.empty(what[0], dtype=what[1])
        self.ledger.enter(made)
        return made


class StandIn(torch.autograd.Function):
    """A block's place in the graph: it holds what the block would, its `inputs` first wanted included, and gives gradients."""

    @staticmethod
    def forward(ctx: Any, known: Known, answer: Answer, inputs: int, *wanted: Tensor) -> tuple[Tensor, ...]:
        ctx.known, ctx.wanted = known, [(tuple(each.shape), each.dtype) for each in wanted]
        ctx.save_for_backward(known.make(((answer.saved,), torch.uint8)), *wanted[:inputs])
        return tuple(map(known.make, answer.made))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise Unfoldable
        assert ctx.saved_tensors  # Where they are computed again, this is when.
        return (None, None, None, *(ctx.known.make(each) for each in ctx.wanted))


def is_watched(block: nn.Module) -> bool:
    """Whether somebody looks into a block, or derivatives go forward through it."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block)


def situation(block: nn.Module, given: list[Tensor]) -> Any:
    """All that the memory of a call depends on, but for the block's class and shapes."""
    asked = tuple((tuple(each.shape), each.dtype, each.requires_grad) for each in given)
    weights = tuple((weight.dtype, weight.requires_grad) for weight in block.parameters())
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.is_grad_enabled(), cast, asked, weights
