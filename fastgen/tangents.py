"""The derivative of a denoiser's output along a trajectory, which continuous consistency models and mean flows are trained on.

Exact, by forward-mode differentiation (sCM, Lu and Song 2025, section 4.1), or by differences of a few plain calls, which
work with every attention kernel and with sharded networks (rCM, Zheng et al. 2025, appendix). Forward mode needs operations
that have a forward derivative: within, attention runs as plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.denoiser import Denoiser, Predicts
from fastgen.errors import UserError
from fastgen.losses import wide

Way = Literal["exact", "central", "semi"]
"""How a derivative is taken: in forward mode, by a central difference, or forward along x and by a difference in time."""

MATHS = "_native_math"
"""What diffusers' attention dispatcher calls plain matrix products."""


@torch.no_grad()
def derivative(
    function: Callable[[Tensor, Tensor], Tensor],
    denoiser: Predicts,
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: float = 1.0,
    *,
    way: Way = "exact",
    step: float = 1e-3,
) -> Tensor:
    """d/dh of `function(x + h dx, t + h dt)` at h = 0, in float32 at least and without gradient.

    `function` calls `denoiser` at `x` [B, ...] and times `t` [B] in [0, 1]. Its dropout is off, as it must be the same at
    both ends of a difference, and automatic mixed precision is off, in whose rounding a difference would drown. The ways that
    are not exact have an error of O(step^2), O(step) within a step of the ends of time; "central" makes two calls, "semi" two
    and one in forward mode. Raises UserError for differences of a network in half precision.
    """
    x, t, dx = wide(x), wide(t), wide(dx)
    network = network_of(denoiser)
    if network is not None and way != "exact":
        _require_single_precision(network, way)

    def forward(along: Tensor, rate: float) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if network is not None:
                stack.enter_context(plain_attention(network))
            speed: Tensor = torch.func.jvp(function, (x, t), (along, torch.full_like(t, rate)))[1]
        return wide(speed)

    with torch.autocast(x.device.type, enabled=False), settled(network):
        if way == "exact":
            return forward(dx, dt)
        after, before = (t + step * dt).clamp(0, 1), (t - step * dt).clamp(0, 1)
        if way == "semi":
            difference = wide(function(x, after)) - wide(function(x, before))
            return forward(dx, 0.0) + dt * difference / _like(after - before, x)
        moves = [_like((end - t) / dt, x) for end in (after, before)]
        ends = [wide(function(x + move * dx, end)) for move, end in zip(moves, (after, before), strict=True)]
        return (ends[0] - ends[1]) / (moves[0] - moves[1])


def network_of(denoiser: Predicts) -> nn.Module | None:
    """The network inside a denoiser and what wraps it; None for one without, such as a teacher with a closed form."""
    inner: object = denoiser
    while not isinstance(inner, Denoiser) and hasattr(inner, "denoiser"):
        inner = inner.denoiser
    return inner.network if isinstance(inner, Denoiser) else None


@contextmanager
def settled(network: nn.Module | None) -> Iterator[None]:
    """Within, `network` has no dropout and recomputes nothing."""
    modules = [] if network is None else list(network.modules())
    training = [module for module in modules if module.training]
    recomputing = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    _set(training, "training", False)
    _set(recomputing, "gradient_checkpointing", False)
    try:
        yield
    finally:
        _set(training, "training", True)
        _set(recomputing, "gradient_checkpointing", True)


@contextmanager
def plain_attention(network: nn.Module) -> Iterator[None]:
    """Within, the attention of a diffusers network is computed by torch's plain matrix products, whatever kernel was chosen."""
    processors = [p for module in network.modules() if (p := getattr(module, "processor", None)) is not None]
    chosen = [(p, kernel) for p in processors if (kernel := getattr(p, "_attention_backend", None)) is not None]
    foreign: Any = network if any("XFormers" in type(p).__name__ for p in processors) else None
    before = dict(foreign.attn_processors) if foreign is not None else {}
    for processor, kernel in chosen:
        processor._attention_backend = type(kernel)(MATHS)
    if foreign is not None:
        foreign.set_default_attn_processor()
    try:
        yield
    finally:
        if foreign is not None:
            foreign.set_attn_processor(before)
        for processor, kernel in chosen:
            processor._attention_backend = kernel


def _set(modules: list[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


def _require_single_precision(network: nn.Module, way: Way) -> None:
    half = next((p.dtype for p in network.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise UserError(
            f"the way {way!r} of taking derivatives needs float32 weights, not {half}, whose rounding hides the differences: "
            'use "exact"'
        )
