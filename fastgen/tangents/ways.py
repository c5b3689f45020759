"""Derivatives along trajectories: exact, or by differences of a few plain calls.

Exact ones (sCM, Lu and Song 2025, section 4.1) cost about one forward more than the answer itself (`fastgen.tangents.forward`),
which may be the very answer that is trained. Differences work with every attention kernel and with sharded networks (rCM,
Zheng et al. 2025, appendix).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from fastgen.denoiser import Denoiser, Predicts, sharded
from fastgen.errors import UserError
from fastgen.losses import record_derivative, wide
from fastgen.tangents.forward import Duals

Way = Literal["exact", "plain", "central", "semi"]
"""How a derivative is taken: in forward mode, by our own rules or by torch's alone; by a central difference; or in forward mode
along x and by a difference in time."""

MOST_APART = 0.6
"""Up to this share of a batch derivatives in a pass of their own (2.4 forwards of those samples, and one of all with its graph)
cost less than with the answer of the whole batch (2.5 forwards). Two passes with graphs cost the weights' gradients twice."""

COARSE = 0.01
"""The least step of a difference that shows through the rounding of half precision."""

Function = Callable[[Tensor, Tensor], Tensor]
Index = Tensor | slice
PRODUCTS, NATIVE = "_native_math", "native"
"""What diffusers' attention dispatcher calls torch's plain matrix products, and its own choice among torch's kernels."""


@torch.no_grad()
def derivative(
    function: Function,
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
    both ends of a difference, and automatic mixed precision is off, in whose rounding a difference would drown. "exact" and
    "plain" differ in rounding alone, "plain" being torch's forward mode as it is. Differences have an error of O(step^2),
    O(step) within a step of the ends of time, and one of rounding, O(1e-7 / step): through times told in thousandths
    a tenth of the derivative at a step of 1e-3, a thousandth at 1e-4 (benchmarks/results/jvp.json). "central" makes
    two calls, "semi" two and one in forward mode. The rounding of weights in bfloat16 is less than a quarter of the derivative
    at a step of 0.02, to which a test holds it, and grows as the step shrinks. Raises UserError for finer differences than 0.01
    of such weights.
    """
    x, t, dx = wide(x), wide(t), wide(dx)
    network = network_of(denoiser)
    if network is not None and way not in ("exact", "plain"):
        _require_single_precision(network, way, step)
    with torch.autocast(x.device.type, enabled=False), settled(network):
        if way == "plain":
            return _plain(function, network, x, t, dx, dt)
        if way == "exact":
            return _both(function, network, x, t, dx, dt)[1]
        after, before = (t + step * dt).clamp(0, 1), (t - step * dt).clamp(0, 1)
        if way == "semi":
            difference = wide(function(x, after)) - wide(function(x, before))
            return _both(function, network, x, t, dx, 0.0)[1] + dt * difference / _like(after - before, x)
        moves = [_like((end - t) / dt, x) for end in (after, before)]
        ends = [wide(function(x + move * dx, end)) for move, end in zip(moves, (after, before), strict=True)]
        return (ends[0] - ends[1]) / (moves[0] - moves[1])


def answer_and_derivative(
    of: Callable[[Index], Function],
    denoiser: Predicts,
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: float = 1.0,
    *,
    way: Way = "exact",
    step: float = 1e-3,
    one_pass: bool = True,
    where: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A function's value with its graph, and what `derivative` returns, from one pass of the network where that is the same.

    `of(index)` is the function, as `derivative` takes it, for the samples at `index`. One pass suffices for an exact
    derivative of a network without dropout, mixed precision, recomputed activations and sharding, in all of which the trained
    pass differs from the one that is differentiated. `where` [B], boolean, are the samples whose derivative is needed:
    elsewhere what is returned means nothing. A few have a pass of their own, but not where the way is "plain" or the network
    sharded, whose processes must make the same calls.
    """
    network = network_of(denoiser)
    mixed = torch.is_autocast_enabled(x.device.type)
    one_pass = one_pass and way == "exact" and not mixed and _alike(network)

    whole, few = of(slice(None)), None
    if where is not None and way != "plain" and not _sharded(network):
        some = where.nonzero()[:, 0]
        few = some if len(some) <= (MOST_APART * len(x) if one_pass else len(x) - 1) else None
    if few is not None:
        value = whole(x, t)
        change = torch.zeros_like(wide(value.detach()))
        if len(few):
            change[few] = derivative(of(few), denoiser, x[few], t[few], dx[few], dt, way=way, step=step)
    elif one_pass:
        value, change = _both(whole, network, wide(x), wide(t), wide(dx), dt)
    else:
        value, change = whole(x, t), derivative(whole, denoiser, x, t, dx, dt, way=way, step=step)
    record_derivative(value, change, where)
    return value, change


def _both(function: Function, network: nn.Module | None, x: Tensor, t: Tensor, dx: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """Value, with a graph where gradients are enabled, and derivative in forward mode by our rules."""
    with plain_attention(network, NATIVE), forward_ad.dual_level(), Duals():
        found = function(forward_ad.make_dual(x, dx), forward_ad.make_dual(t, torch.full_like(t, dt)))
        value, change = forward_ad.unpack_dual(found)
    # A function may be constant along the way.
    return value, torch.zeros_like(wide(value)) if change is None else wide(change.detach())


def _plain(function: Function, network: nn.Module | None, x: Tensor, t: Tensor, dx: Tensor, dt: float) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH), plain_attention(network):
        speed: Tensor = torch.func.jvp(function, (x, t), (dx, torch.full_like(t, dt)))[1]
    return wide(speed)


def _alike(network: nn.Module | None) -> bool:
    """Whether a network computes the same in training as when it is differentiated, and may do both at once."""

    def differs(module: nn.Module) -> bool:
        drops = isinstance(module, _DropoutNd) and module.training and module.p > 0
        return drops or sharded(module) or bool(vars(module).get("gradient_checkpointing"))

    return network is None or not any(differs(module) for module in network.modules())


def _sharded(network: nn.Module | None) -> bool:
    return network is not None and any(map(sharded, network.modules()))


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
def plain_attention(network: nn.Module | None, backend: str = PRODUCTS) -> Iterator[None]:
    """Within, the attention of a diffusers network is computed by torch's plain matrix products, whatever kernel was chosen.

    Or by another `backend` of torch's own.
    """
    modules = [] if network is None else list(network.modules())
    processors = [p for module in modules if (p := getattr(module, "processor", None)) is not None]
    chosen = [(p, kernel) for p in processors if (kernel := getattr(p, "_attention_backend", None)) is not None]
    foreign: Any = network if any("XFormers" in type(p).__name__ for p in processors) else None
    before = dict(foreign.attn_processors) if foreign is not None else {}
    for processor, kernel in chosen:
        processor._attention_backend = type(kernel)(backend)
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


def _require_single_precision(network: nn.Module, way: Way, step: float) -> None:
    half = next((p.dtype for p in network.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None and step < COARSE:
        raise UserError(
            f"the way {way!r} of taking derivatives at a step of {step:g} needs float32 weights, not {half}, whose rounding "
            f'hides the differences: use a step of {COARSE:g} or more, or "exact"'
        )
