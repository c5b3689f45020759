"""How a pipeline guides, read off what it hands its scheduler at a known scale."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.denoiser import guide
from fastgen.errors import UserError

PROBE_GUIDANCE = 3.0
PARTIAL = 3

Renormalises = Literal["never", "always", "down"]
"""Whether a guided output then gets the conditional one's norm: not at all, always, or where it has grown."""

Guides = Literal["batched", "paired", "single"]
"""One call with [null, condition] stacked, two calls, or one call without an unconditional part."""


def read_guidance(outputs: Sequence[Tensor], handed: Tensor, name: str, signs: Sequence[int]) -> dict[str, Any]:
    """Which outputs of a network were combined, and how, to what the scheduler was handed: fields of a `CallForm`.

    Raises UserError where the pipeline `name` does something that fastgen would not repeat.
    """
    outputs, handed = [x.float() for x in outputs], handed.float()
    if len(outputs) == 1 and len(outputs[0]) == len(handed):
        sign = min(signs, key=lambda sign: _distance(handed, sign * outputs[0]))
        if _distance(handed, sign * outputs[0]) > 0.02:
            raise UserError(f"{name} changes its network's output before the scheduler sees it, in a way fastgen does not know")
        return {"guides": "single", "null_first": True, "guidance_offset": 0.0, "sign": sign}
    guides: Guides = "batched" if len(outputs) == 1 else "paired"
    if len(outputs) > 2:
        raise UserError(f"{name} calls its network {len(outputs)} times a step; fastgen knows one call and two")
    a, b = outputs[0].chunk(2) if guides == "batched" else outputs
    if float((b - a).abs().max()) == 0:  # A network that ignores its condition tells nothing about the order.
        return {"guides": guides, "null_first": guides == "batched", "guidance_offset": 0.0}
    norms: tuple[Renormalises, ...] = ("never", "always", "down")
    options = list(itertools.product(signs, (True, False), (0.0, 1.0), norms))

    def error(option: tuple[int, bool, float, Renormalises]) -> float:
        sign, null_first, offset, norm = option
        return _distance(sign * handed, renormalised_guide(*((b, a) if null_first else (a, b)), PROBE_GUIDANCE + offset, norm))

    best = min(options, key=error)
    if error(best) > 0.02:
        for sign, null_first in itertools.product(signs, (True, False)):
            partly = partial_guide(*((b, a) if null_first else (a, b)), PROBE_GUIDANCE, PARTIAL)
            if _distance(sign * handed, partly) <= 0.02:
                return {"guides": guides, "sign": sign, "null_first": null_first} | {
                    "guided_channels": PARTIAL,
                    "guidance_offset": 0.0,
                }
        raise UserError(
            f"{name} combines its guided outputs in an unknown way (off by {error(best):.2g} from the nearest known)"
        )
    return {"guides": guides} | dict(zip(("sign", "null_first", "guidance_offset", "renormalises"), best, strict=True))


def renormalised_guide(yes: Tensor, no: Tensor, scale: float | Tensor, norm: Renormalises) -> Tensor:
    """Guidance that keeps the conditional output's norm along the last dimension (Lin et al. 2024, section 3.4, per token)."""
    both = guide(yes, no, scale)
    if norm == "never":
        return both
    ratio = yes.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)
    return both * (ratio.clamp_max(1) if norm == "down" else ratio)


def partial_guide(yes: Tensor, no: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """Guidance of the first `channels` channels alone, as in DiT (Peebles and Xie 2023) and Lumina-Next."""
    return torch.cat([guide(yes, no, scale)[:, :channels], yes[:, channels:]], 1)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
