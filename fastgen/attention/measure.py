"""How fast a kernel is and how far off: timed and compared with attention written out in a higher precision.

The error of an output or gradient x against the reference r is the relative one ||x - r|| / ||r||, over a few heads.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from fastgen.attention.calls import Call
from fastgen.attention.kernels import Kernel
from fastgen.attention.processors import attend

BOUNDS = {"float64": 1e-10, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""How far off a kernel may be, by precision: some ten roundings of one number (2^-24, 2^-11 and 2^-8), for float32 more."""
TF32 = 5e-3
"""The same for float32 whose products are allowed to be of TF32, which has float16's digits."""
HEADS = 4
"""Heads of a call that are compared."""
SCORES = 1 << 26
"""Scores that the reference holds at once."""
ROUNDS = 7
LEAST_SECONDS = 2e-3


@dataclass(frozen=True)
class Errors:
    """Largest relative errors over all calls; `gradient` is None where none was asked for."""

    output: float
    gradient: float | None = None


def run(kernel: Kernel, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a kernel makes of a call with other queries, keys and values [B, H, N, D]: [B, H, N, D]."""
    backend = AttentionBackendName(kernel.backend)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attend(backend, q, k, v, call.mask, 0.0, call.causal, call.scale, call.shared_heads).transpose(1, 2)


def errors(kernel: Kernel, calls: Sequence[Call], *, training: bool) -> Errors:
    """How far a kernel's output, and in training its gradient, are from the reference. Raises what the kernel raises."""
    output, gradient = 0.0, 0.0
    for call in calls:
        inputs = [each.detach().clone().requires_grad_(training) for each in (call.query, call.key, call.value)]
        towards = torch.randn(call.query.shape[:-1] + call.value.shape[-1:], generator=torch.Generator().manual_seed(0))
        towards = towards.to(call.query)
        with torch.set_grad_enabled(training):
            found = run(kernel, call, *inputs)
        if training and not found.requires_grad:
            raise RuntimeError("its output has no gradient")
        grads = torch.autograd.grad(found, inputs, towards) if training else ()
        for head in _heads(call):
            expected = reference(call, towards, *head)
            output = _worse(output, _off(found.detach()[head], expected[0]))
            shared = call.query.shape[1] != call.key.shape[1]
            for grad, right in zip(grads[:1] if shared else grads, expected[1:], strict=False):
                gradient = _worse(gradient, _off(grad[head], right))
    return Errors(output, gradient if training else None)


def agrees(found: Errors, calls: Sequence[Call]) -> str:
    """Why a kernel is too far off, "" where it is not."""
    rough = torch.get_float32_matmul_precision() != "highest"
    bound = max(TF32 if rough and call.dtype == "float32" else BOUNDS[call.dtype] for call in calls)
    for name, error in (("output", found.output), ("gradient", found.gradient)):
        if error is not None and not error <= bound:  # a NaN is not
            return f"its {name} is off by {error:.1e}, more than the {bound:.0e} of this precision"
    return ""


def reference(call: Call, towards: Tensor, sample: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of one head [N, D] and the gradients of its queries, keys and values, towards `towards` [B, H, N, D].

    With the scores S = s q k^T, the weights P = softmax(S), o = P v and the gradient g of o: dv = P^T g,
    dS = P (g v^T - sum_j P g v^T), dq = s dS k, dk = s dS^T q; by pieces of the queries, in float64.
    """
    group = call.query.shape[1] // call.key.shape[1]
    q, g = (each[sample, head].double() for each in (call.query, towards))
    k, v = (each[sample, head // group].double() for each in (call.key, call.value))
    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
    out, dq = torch.empty_like(g), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    rows = max(1, SCORES // len(k))
    for start in range(0, len(q), rows):
        part = slice(start, start + rows)
        weights = _scores(call, q, k, scale, sample, head, part).softmax(-1)
        weights = weights.nan_to_num(0.0)  # of queries that may look at nothing
        out[part] = weights @ v
        dv += weights.mT @ g[part]
        inner = g[part] @ v.mT
        slope = weights * (inner - (weights * inner).sum(-1, keepdim=True))
        dq[part] = scale * slope @ k
        dk += scale * slope.mT @ q[part]
    return out, dq, dk, dv


def _scores(call: Call, q: Tensor, k: Tensor, scale: float, sample: int, head: int, part: slice) -> Tensor:
    scores = scale * q[part] @ k.mT
    mask = call.mask
    if mask is not None:
        if mask.ndim == 2 and mask.shape == (len(call.key), len(k)):
            mask = mask[:, None, None]
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mask.expand(len(call.query), call.query.shape[1], *mask.shape[2:])[sample, head]
        mask = mask.expand(len(q), len(k))[part]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if call.causal:
        ahead = torch.arange(len(k), device=k.device) > torch.arange(len(q), device=q.device)[part, None]
        scores = scores.masked_fill(ahead, -math.inf)
    return scores


def _heads(call: Call) -> list[tuple[int, int]]:
    """A few samples and heads, spread over all."""
    samples, heads = call.query.shape[:2]
    every = [(i, j) for i in range(samples) for j in range(heads)]
    return every[:: max(1, len(every) // HEADS)][:HEADS]


def _off(found: Tensor, right: Tensor) -> float:
    return float((found.to(right.dtype) - right).norm() / right.norm().clamp(min=1e-30))


def _worse(a: float, b: float) -> float:
    """The larger error; one that is not a number is worse than any."""
    return a if math.isnan(a) or b <= a else b


def seconds(kernels: Sequence[Kernel], calls: Sequence[Call], *, training: bool, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds that all calls of one pass take with each kernel, forward and, in training, backward; by turns, their medians."""
    total = dict.fromkeys((each.name for each in kernels), 0.0)
    for call in calls:
        times: dict[str, list[float]] = {each.name: [] for each in kernels}
        for kernel in kernels:
            _once(kernel, call, 1, training)  # what is done at the first call alone
        some = {each.name: max(1, math.ceil(LEAST_SECONDS / max(_once(each, call, 1, training), 1e-7))) for each in kernels}
        for _ in range(rounds):
            for kernel in kernels:
                times[kernel.name].append(_once(kernel, call, some[kernel.name], training))
        for name, measured in times.items():
            total[name] += call.count * statistics.median(measured)
    return total


def _once(kernel: Kernel, call: Call, repeats: int, training: bool) -> float:
    """Seconds of one of `repeats` computations of a call."""
    inputs = [each.detach().requires_grad_(training) for each in (call.query, call.key, call.value)]
    towards = call.query.new_ones(*call.query.shape[:-1], call.value.shape[-1])
    start = _now(call)
    for _ in range(repeats):
        with torch.set_grad_enabled(training):
            found = run(kernel, call, *inputs)
        if training:
            torch.autograd.grad(found, inputs, towards)
    return (_now(call) - start) / repeats


def _now(call: Call) -> float:
    """Seconds on a GPU that has done all it was given; of a CPU's own time, which other programs disturb least."""
    if not call.query.is_cuda:
        return time.process_time()
    torch.cuda.synchronize(call.query.device)
    return time.perf_counter()
