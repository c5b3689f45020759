"""A student is good with the sampler that it was trained with; another one is taken only where it is forced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from fastgen.errors import UserError
from fastgen.samplers import Sampler


def require_trained(asked: Sampler, trained: Sampler) -> None:
    """Raise UserError, with both named, where `asked` is not the sampler that the student was trained with."""
    if asked != trained:
        raise UserError(
            f"the student was trained for {in_words(trained)}, not for {in_words(asked)}; "
            "leave the sampler as it is, or force it (--force)"
        )


def require_own_call(description: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Raise UserError, with both values named, where a call of an export's pipeline is not the one that it was made for.

    `description` is what `fastgen.export.read_export` gives. What the call leaves out counts as asked for as it was made.
    """
    for key, value in description["call"].items():
        if key in call and call[key] != value:
            raise UserError(f"the export was made for {key} = {value!r}, not for {call[key]!r}; leave it out, or force it")


def in_words(sampler: Sampler) -> str:
    """Such as "FewStep, 4 steps, times (1, 0.75, 0.5, 0.25), gamma 1, guidance 1"."""
    settings: dict[str, Any] = asdict(sampler) if is_dataclass(sampler) else {}
    told = [f"{type(sampler).__name__}, {sampler.steps} step{'s' * (sampler.steps != 1)}"]
    for key, value in settings.items():
        told.append(f"{key} ({', '.join(f'{each:g}' for each in value)})" if isinstance(value, tuple) else f"{key} {value:g}")
    return ", ".join(told)
