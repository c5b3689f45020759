"""Which kernel computes a network's attention: the one that is named, or the fastest of those that agree, as measured.

What was measured is kept, a file for each device, set of shapes and set of versions, so that the next run of the same kind
begins at once:

    CACHE/attention/0123456789abcdef.json       made-with, seconds by kernel, reasons by kernel that was left out
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgen.attention import measure
from fastgen.attention.calls import Call
from fastgen.attention.kernels import FALLBACK, KERNELS, Kernel, first_line, missing, unfit
from fastgen.attention.processors import load
from fastgen.errors import UserError

FORMAT = 1
PACKAGES = ("torch", "diffusers", "xformers", "flash-attn", "flash-attn-3", "sageattention", "kernels", "triton")
WORTH = 0.97
"""Share of the fallback's time that another kernel must stay below to be taken."""
NO_MEMORY = "there was not the memory to try it"
ONE_CHOICE = "cpu", "mps", "xpu"
"""Devices on which torch's own choice is the only kernel worth having."""


@dataclass(frozen=True)
class Choice:
    """A kernel, what was `asked` for, and how it was found: seconds of a pass by kernel, reasons of those left out."""

    kernel: str
    asked: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    line: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON, for the run's directory."""
        measured = {"seconds": dict(self.seconds), "left_out": dict(self.left_out)} if self.seconds else {}
        return {"kernel": self.kernel, "asked": self.asked, **measured}


@dataclass(frozen=True)
class Measured:
    """Seconds of a pass by kernel, and reasons of those that turned out not to serve."""

    seconds: Mapping[str, float]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Tools:
    """What a choice is made with; tests have their own."""

    kernels: Mapping[str, Kernel] = field(default_factory=lambda: KERNELS)
    missing: Callable[..., str] = missing
    load: Callable[[Kernel], object] = load
    errors: Callable[..., measure.Errors] = measure.errors
    seconds: Callable[..., dict[str, float]] = measure.seconds


def needs_watching(asked: str, device: torch.device) -> bool:
    """Whether a choice needs the calls of a network at all."""
    return asked not in ("auto", FALLBACK) or (asked == "auto" and device.type not in ONE_CHOICE)


def choose(
    asked: str,
    calls: Sequence[Call],
    *,
    training: bool,
    forward_mode: bool = False,
    device: torch.device,
    cache: Path | None = None,
    where: str = "speed.attention",
    tools: Tools | None = None,
) -> Choice:
    """The kernel for a network that makes `calls`, as `asked`: "auto", or by name.

    `training`: it must have a backward pass; `forward_mode`: and a derivative in forward mode. `cache` is the folder in which
    measurements are kept, None: nowhere; `where` is the option that messages name. Raises UserError where a kernel that is
    named cannot do it, with the reason.
    """
    tools = tools or Tools()
    needs = {"training": training, "forward_mode": forward_mode, **facts(calls, device)}
    if asked != "auto":
        return _named(asked, calls, needs, where, tools)
    if device.type in ONE_CHOICE:
        return Choice(FALLBACK, asked, line=f"attention: native, torch's own choice, the only one to have on a {device.type}")
    unsuited = {each.name: unfit(each, **needs) or tools.missing(each) for each in tools.kernels.values()}
    valid = [each for each in tools.kernels.values() if not unsuited[each.name]]
    made_with = _made_with(calls, needs, [each.name for each in valid], device)
    kept = read(cache, made_with)
    if kept is None:
        tried = {each.name: _tried(each, calls, training, tools) for each in valid}
        agreeing = [each for each in valid if not tried[each.name]]
        measured = Measured(_times(agreeing, calls, training, tools), {name: why for name, why in tried.items() if why})
        if NO_MEMORY not in tried.values():  # of which there may be more the next time
            write(cache, made_with, measured)
    else:
        measured = kept
    seconds, before = measured.seconds, " (measured before)" * (kept is not None)
    left_out = {name: reason for name, reason in unsuited.items() if reason} | dict(measured.left_out)
    kernel_name = fastest(seconds)
    passes = "forward and backward" if training else "forward"
    over = f"over the {len(calls)} shape{'s' * (len(calls) != 1)} of this network, {passes}{before}"
    line = f"attention: {kernel_name}{_ratio(kernel_name, seconds)} {over}"
    return Choice(kernel_name, asked, seconds, left_out, line)


def fastest(seconds: Mapping[str, float]) -> str:
    """The name of the kernel to take; the fallback where none is clearly faster."""
    if not seconds:
        return FALLBACK
    best = min(seconds, key=lambda name: (seconds[name], name))
    return best if seconds[best] < WORTH * seconds[FALLBACK] else FALLBACK


def _ratio(name: str, seconds: Mapping[str, float]) -> str:
    if name != FALLBACK:
        return f", {seconds[FALLBACK] / seconds[name]:.2f} times as fast as torch's own choice,"
    others = [each for each in seconds if each != FALLBACK]
    if not seconds:
        return ", torch's own choice, as none could be timed,"
    if not others:
        return ", the only one that can serve,"
    nearest = min(others, key=lambda each: seconds[each])
    return f", torch's own choice, {seconds[nearest] / seconds[FALLBACK]:.2f} times as fast as {nearest}, the next,"


def _named(name: str, calls: Sequence[Call], needs: dict[str, Any], where: str, tools: Tools) -> Choice:
    kernel = tools.kernels[name]
    if reason := unfit(kernel, **needs) or tools.missing(kernel, named=True):
        raise _refused(name, reason, where)
    if calls and name != FALLBACK:
        reason = _tried(kernel, calls, needs["training"], tools, exact=needs["training"])
        if reason:
            raise _refused(name, reason, where)
    return Choice(name, name, line=f"attention: {name}, as asked")


def _refused(name: str, reason: str, where: str) -> UserError:
    return UserError(f'{where}: the kernel "{name}" cannot be had here: {reason}; "auto" takes the fastest that can')


def _tried(kernel: Kernel, calls: Sequence[Call], training: bool, tools: Tools, *, exact: bool = True) -> str:
    """Why a kernel cannot serve these calls, as calling it shows; "" where it can."""
    try:
        tools.load(kernel)
        found = tools.errors(kernel, calls, training=training)
    except torch.OutOfMemoryError:
        return NO_MEMORY
    except Exception as error:  # a kernel may raise anything
        return f"it does not take this network's calls ({first_line(error)})"
    reason = measure.agrees(found, calls)
    return reason if exact or found.output != found.output else ""


def _times(kernels: Sequence[Kernel], calls: Sequence[Call], training: bool, tools: Tools) -> dict[str, float]:
    """Seconds by kernel; nothing where torch's own choice is not among them, or where memory runs out."""
    if FALLBACK not in (each.name for each in kernels):
        return {}
    try:
        return tools.seconds(kernels, calls, training=training)
    except torch.OutOfMemoryError:
        return {}


def facts(calls: Sequence[Call], device: torch.device) -> dict[str, Any]:
    """What `unfit` is to be told of calls and of the device that they are made on."""
    return {
        "device": device.type,
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        "dtypes": sorted({call.dtype for call in calls}),
        "head_sizes": sorted({call.head_size for call in calls}),
        "masks": sorted({call.mask_kind for call in calls if call.mask_kind is not None}),
    }


# -- what was measured before -------------------------------------------------------------------------


def _made_with(calls: Sequence[Call], needs: Mapping[str, Any], valid: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Everything that a measurement depends on, as JSON."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "calls": sorted((call.describe() for call in calls), key=str),
        "training": needs["training"],
        "forward_mode": needs["forward_mode"],
        "kernels": list(valid),
        "matmul": torch.get_float32_matmul_precision(),
        "versions": {**versions, "cuda": torch.version.cuda},
    }


def _file(cache: Path, made_with: Mapping[str, Any]) -> Path:
    name = hashlib.blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=8).hexdigest()
    return cache.expanduser() / "attention" / f"{name}.json"


def read(cache: Path | None, made_with: Mapping[str, Any]) -> Measured | None:
    """What was measured under the same circumstances; None where there is nothing to be relied on."""
    if cache is None:
        return None
    try:
        kept = json.loads(_file(cache, made_with).read_text(encoding="utf-8"))
        if kept["made-with"] != json.loads(json.dumps(made_with)):
            return None
        seconds = {str(name): float(number) for name, number in kept["seconds"].items()}
        left_out = {str(name): str(reason) for name, reason in kept["left-out"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = all(name in made_with["kernels"] and 0 < number < math.inf for name, number in seconds.items())
    return Measured(seconds, left_out) if sound and FALLBACK in seconds else None


def write(cache: Path | None, made_with: Mapping[str, Any], measured: Measured) -> None:
    """Keep a measurement, whole or not at all; a folder that cannot be written is passed over."""
    if cache is None or not measured.seconds:
        return
    path = _file(cache, made_with)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    kept = {"made-with": made_with, "seconds": dict(measured.seconds), "left-out": dict(measured.left_out)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
