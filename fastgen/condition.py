"""What a network is told beside a noisy sample and its time: nests of tensors with the batch first, and where a step ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Condition", "EndInput", "Nest", "map_tensors", "pad_alike"]

Nest = Any
"""Tensors in dictionaries, lists and tuples; other leaves are left alone."""


def map_tensors(function: Callable[..., Any], nest: Nest, *others: Nest) -> Nest:
    """Apply `function` to each tensor of `nest` (and its twins in `others`), keeping the structure."""
    if isinstance(nest, Tensor):
        return function(nest, *others)
    if isinstance(nest, Mapping):
        return {key: map_tensors(function, value, *(other[key] for other in others)) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_tensors(function, *values) for values in zip(nest, *others, strict=True))
    return nest


def pad_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, zeros at the end of every dimension but the first until all have one size."""
    sizes = {x.shape[1:] for x in tensors}
    if len(sizes) == 1:
        return list(tensors)
    if len({x.ndim for x in tensors}) > 1:
        raise ValueError(f"conditions of different structure cannot be joined: shapes {[tuple(x.shape) for x in tensors]}")
    longest = [max(size) for size in zip(*sizes, strict=True)]
    padding = [[n for size, to in zip(x.shape[:0:-1], longest[::-1], strict=True) for n in (0, to - size)] for x in tensors]
    return [nn.functional.pad(x, wanted) if any(wanted) else x for x, wanted in zip(tensors, padding, strict=True)]


@dataclass
class Condition:
    """What samples are conditioned on; only the pipeline that made it knows the keys.

    `inputs` is a nest of tensors with the batch first; `shared` holds what does not depend on the sample (position ids, flags).
    `null` is the unconditional twin, of the same structure, or None where the pipeline has none.

    Samples and twins may differ in length: where they are joined, the shorter are padded with zeros at the end. The pipeline
    keeps each sample's length among the inputs and takes the padding off again before its network is called.
    """

    inputs: dict[str, Nest]
    shared: dict[str, Nest] = field(default_factory=dict)
    null: Condition | None = None

    def __len__(self) -> int:
        sizes: list[int] = []
        map_tensors(lambda x: sizes.append(len(x)), self.inputs)
        return sizes[0] if sizes else 0

    def _map(self, function: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor] | None = None) -> Condition:
        null = self.null._map(function, shared) if self.null else None
        return Condition(map_tensors(function, self.inputs), map_tensors(shared or (lambda x: x), self.shared), null)

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Condition:
        """The samples at `index` (a slice, a list of positions, or an integer or boolean tensor)."""
        return self._map(lambda x: x[index])

    def repeat(self, times: int) -> Condition:
        """Each sample `times` times, in place (a, a, b, b)."""
        return self._map(lambda x: x.repeat_interleave(times, 0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move, and cast what is floating point."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        return self._map(move, move)

    def dropout(self, drop: Tensor) -> Condition:
        """The null condition where `drop` ([B], boolean) is true.

        Raises ValueError where there is no null condition.
        """
        if self.null is None:
            raise ValueError("this pipeline has no unconditional twin, so its conditions cannot be dropped")

        def choose(yes: Tensor, no: Tensor) -> Tensor:
            yes, no = pad_alike([yes, no])
            return torch.where(drop.view(-1, *[1] * (yes.ndim - 1)), no, yes)

        return Condition(map_tensors(choose, self.inputs, self.null.inputs), self.shared, self.null)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch from several of equal structure; `shared` is taken from the first."""
        first = conditions[0]
        inputs = map_tensors(lambda *parts: torch.cat(pad_alike(parts)), first.inputs, *(c.inputs for c in conditions[1:]))
        nulls = [c.null for c in conditions if c.null is not None]
        null = Condition.cat(nulls) if len(nulls) == len(conditions) else None
        return Condition(inputs, first.shared, null)

    def save(self, path: Path) -> None:
        """Write as safetensors; `load` reads it back."""
        flat: dict[str, Tensor] = {}
        _flatten({"inputs": self.inputs, "shared": self.shared}, "yes", flat)
        if self.null:
            _flatten({"inputs": self.null.inputs, "shared": self.null.shared}, "null", flat)
        save_file({key: value.contiguous().clone() for key, value in flat.items()}, path)

    def load(self, path: Path) -> Condition:
        """A condition of this one's structure with the tensors of `path`."""
        flat = load_file(path)

        def fill(condition: Condition, name: str) -> Condition:
            nest = _unflatten({"inputs": condition.inputs, "shared": condition.shared}, name, flat)
            return Condition(nest["inputs"], nest["shared"], fill(condition.null, "null") if condition.null else None)

        return fill(self, "yes")


def _flatten(nest: Nest, name: str, flat: dict[str, Tensor]) -> None:
    if isinstance(nest, Tensor):
        flat[name] = nest
    elif isinstance(nest, (Mapping, list, tuple)):
        items = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
        for key, value in items:
            _flatten(value, f"{name}/{key}", flat)


def _unflatten(nest: Nest, name: str, flat: Mapping[str, Tensor]) -> Nest:
    if isinstance(nest, Tensor):
        return flat[name]
    if isinstance(nest, Mapping):
        return {key: _unflatten(value, f"{name}/{key}", flat) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(_unflatten(value, f"{name}/{i}", flat) for i, value in enumerate(nest))
    return nest


class EndInput(nn.Module):
    """A second time as an input, for a network that has none: how far a call is to go, added to its embedding of the time.

    Waves of t - s through two layers, of which the second is zero at first, so that the network goes on as it did.
    """

    def __init__(self, place: str, width: int, waves: int = 16, fastest: float = 16.0):
        """`place` names the submodule that embeds the time, into `width` numbers; `fastest` is the quickest wave's rate.

        A quick wave has a steep derivative, which is noise in what a mean velocity learns from.
        """
        super().__init__()
        self.place = place
        rates = torch.exp(torch.linspace(0.0, math.log(fastest), waves))
        self.register_buffer("rates", rates, persistent=False)
        self.enter, self.leave = nn.Linear(2 * waves, width), nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    rates: Tensor

    def forward(self, span: Tensor) -> Tensor:
        """[B, width] of t - s [B], in the time from 0 to 1 of the network's own process."""
        phase = span.to(self.rates.dtype)[:, None] * self.rates
        hidden = self.enter(torch.cat([phase.sin(), phase.cos()], 1).to(self.enter.weight.dtype))
        embedding: Tensor = self.leave(nn.functional.silu(hidden))
        return embedding
