"""Arguments of a network whose length depends on the prompt: kept padded, handed over as the pipeline itself does.

A condition holds such an argument as `{"values": [B, L, ...], "lengths": [B]}`, zeros at the end, so that it can be joined,
indexed, dropped and saved like any other. `hand_over` makes of it what the network is used to for this batch: a list with one
tensor a sample, or tensors padded to the longest of the batch with their mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgen.denoiser import Condition, Nest


@dataclass(frozen=True)
class Lengths:
    """Which of a call's arguments have a length of their own for each prompt, by name.

    `lists` are given as a list with one tensor a sample, `variable` as tensors padded to the longest of the batch. `masks` are
    those of `variable` that mark each sample's own part, with their type; `omits_masks`: None where all of it is.
    `repeated` are lists that hold the same for each sample. `following` belong to no sample and are as long as the padded
    prompts, such as their positions; of a longer one the shorter is the beginning. `padded`: prompts keep the padding that they
    were recorded with, for the network's answer depends on it.
    """

    lists: tuple[str, ...] = ()
    variable: tuple[str, ...] = ()
    masks: dict[str, torch.dtype] = field(default_factory=dict)
    omits_masks: bool = False
    repeated: tuple[str, ...] = ()
    following: tuple[str, ...] = ()
    padded: bool = False

    def take(self, call: dict[str, Any], inputs: dict[str, Nest], shared: dict[str, Nest], half: int | None) -> None:
        """Put these arguments of a recorded `call` into a condition's two parts; the padded ones are there already."""
        shared |= {key: list(call[key][:1]) for key in self.repeated}
        for key in self.lists:
            samples = list(call[key])
            if half is not None:
                samples = samples[: len(samples) // 2] if half == 0 else samples[len(samples) // 2 :]
            inputs[key] = {"values": pad_sequence(samples, True), "lengths": _count([len(x) for x in samples], samples[0])}
        plain = [key for key in self.variable if key not in self.masks]
        for key, dtype in self.masks.items():
            if inputs.get(key) is None and plain:
                values = inputs[plain[0]]
                inputs[key] = torch.ones(values.shape[:2], dtype=dtype, device=values.device)
        marks = [inputs[key] for key in self.masks]
        for key in self.variable:
            values = inputs[key]
            own = [] if self.padded else [mask.sum(1) for mask in marks if mask.shape == values.shape[:2]]
            inputs[key] = {"values": values, "lengths": own[0] if own else _count([values.shape[1]] * len(values), values)}
        for key in self.following:
            positions, batch = shared.pop(key), len(inputs[self.variable[0]]["lengths"])
            values = positions.expand(batch, *positions.shape)
            inputs[key] = {"values": values, "lengths": _count([len(positions)] * batch, values)}

    def hand_over(self, arguments: dict[str, Nest], batch: int) -> None:
        """Replace these arguments by what the network takes."""
        arguments |= {key: arguments[key] * batch for key in self.repeated}
        for key in self.lists:
            values, lengths = arguments[key]["values"], arguments[key]["lengths"].tolist()
            arguments[key] = [sample[:length] for sample, length in zip(values, lengths, strict=True)]
        for key in self.following:
            values, lengths = arguments[key]["values"], arguments[key]["lengths"].tolist()
            arguments[key] = values[lengths.index(max(lengths))][: max(lengths)]
        for key in self.variable:
            values, lengths = arguments[key]["values"], arguments[key]["lengths"].tolist()
            values = values[:, : max(lengths)]
            whole = key in self.masks and self.omits_masks and bool(values.all())
            arguments[key] = None if whole else values

    @property
    def separates(self) -> bool:
        """Whether prompts of different lengths cannot be in one call: there is no mask, or it does not hide all."""
        return bool(self.variable) and (self.padded or not self.masks)

    def groups(self, condition: Condition) -> list[Tensor]:
        """The samples of each length, where padding is not without effect and the network must be called for each."""
        if not self.separates:
            return []
        lengths = torch.stack([condition.inputs[key]["lengths"] for key in self.variable], 1)
        different, which = lengths.unique(dim=0, return_inverse=True)
        return [(which == i).nonzero()[:, 0] for i in range(len(different))]


def learn_lengths(
    short: dict[str, Any],
    long: dict[str, Any],
    lists: Sequence[str],
    repeated: Sequence[str],
    sizes: dict[str, Nest],
    padded: bool,
) -> Lengths:
    """From a call with several short prompts and one with a single long one, of the same resolution."""
    variable = tuple(key for key, size in sizes.items() if size in (1, 2) and _differs(short[key], long.get(key)))
    masks = {key: short[key].dtype for key in variable if _is_mask(short[key])}
    omits = any(long.get(key) is None for key in masks)
    tokens = {(short[key].shape[1], long[key].shape[1]) for key in variable if long.get(key) is not None}
    alone = [key for key, size in sizes.items() if size == 0 and isinstance(short[key], Tensor) and short[key].ndim]
    following = tuple(key for key in alone if (len(short[key]), len(long[key])) in tokens)
    return Lengths(tuple(lists), variable, masks, omits, tuple(repeated), following, padded)


def is_list(two: Any, three: Any) -> bool:
    """Whether an argument is a list of one tensor a sample (or two): from its values for two samples and for three."""
    lists = isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)) and len(two) * 3 == len(three) * 2
    return lists and len(two) > 0 and all(isinstance(x, Tensor) for x in two)


def is_nested(value: Any) -> bool:
    """Whether an argument is a list with a list of one tensor for each sample."""
    lists = isinstance(value, (list, tuple)) and len(value) > 0
    return lists and all(isinstance(each, (list, tuple)) and len(each) == 1 and isinstance(each[0], Tensor) for each in value)


def is_repeated(two: Any, three: Any) -> bool:
    """Whether an argument is a list of the same thing for each sample, such as the size of its image."""
    lists = isinstance(two, list) and isinstance(three, list) and (len(two), len(three)) in ((2, 3), (4, 6))
    return lists and not any(isinstance(x, Tensor) for x in (*two, *three)) and all(x == two[0] for x in two)


def _differs(short: Any, long: Any) -> bool:
    if not isinstance(short, Tensor) or short.ndim < 2:
        return False
    return long is None or short.shape[1] != long.shape[1]


def _is_mask(x: Tensor) -> bool:
    """Whether a tensor marks with ones, from the left, what belongs to each sample."""
    whole = x.ndim == 2 and not x.is_floating_point()
    return whole and bool((x == (torch.arange(x.shape[1], device=x.device) < x.sum(1, keepdim=True))).all())


def _count(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=like.device)
