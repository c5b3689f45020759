"""Attention and its derivative in forward mode, exact, in pieces of the scores that stay in fast memory.

With the scores S = s q k^T, their derivative S' = s (q' k^T + q k'^T), the weights P = softmax(S) and P' = P (S' - sum P S'),
the derivative of P v is P' v + P v'. All rows of queries are independent, so that no more than a piece of the scores is ever
held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIECE = {"cpu": 1 << 18}
"""Scores [..., queries, keys] held at once: on a CPU what its cache holds."""
LARGE_PIECE = 1 << 25
Dual = tuple[Tensor, Tensor | None]


def attention(
    query: Dual,
    key: Dual,
    value: Dual,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    shared_heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v [B, H, N, E] and its derivative, of pairs of values [B, H, N or M, D or E] and their tangents.

    As `torch.nn.functional.scaled_dot_product_attention`: `mask` is boolean (True: is looked at) or added to the scores;
    without a scale it is 1 / sqrt(D); with `shared_heads` several heads of queries share one of keys and values.
    """
    q, k, v = query[0], key[0], value[0]
    if torch.is_autocast_enabled(q.device.type):
        lower = torch.get_autocast_dtype(q.device.type)
        with torch.autocast(q.device.type, enabled=False):
            cast = [tuple(None if x is None else x.to(lower) for x in pair) for pair in (query, key, value)]
            return attention(*cast, mask=mask, causal=causal, scale=scale, shared_heads=shared_heads)  # type: ignore[arg-type]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, rows = q.shape[:3]
    columns, width = k.shape[-2], v.shape[-1]

    def flat(x: Tensor | None, factor: float = 1.0) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(batch, *x.shape[1:])
        if shared_heads and x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], 1)
        x = x.expand(batch, heads, *x.shape[2:]).reshape(batch * heads, *x.shape[2:])
        return x if factor == 1 else x * factor

    q, dq = flat(q, scale), flat(query[1], scale)  # type: ignore[assignment]
    k, dk, v, dv = flat(k), flat(key[1]), flat(v), flat(value[1])  # type: ignore[assignment]
    bias, seen = _bias(mask, causal, batch, heads, rows, columns, q)
    values = v if dv is None else torch.cat([v, dv], -1)
    out, speed = (v.new_empty(batch * heads, rows, width) for _ in range(2))
    for at, along in _pieces(batch * heads, rows, columns, q.device.type):
        scores = q[at, along] @ k[at].mT
        if bias is not None:
            scores = scores + _cut(bias, at, along)
        weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if seen is not None:
            weights = weights.masked_fill(~_cut(seen, at, along), 0.0)
        mixed = weights.to(v.dtype) @ values[at]
        out[at, along] = mixed[..., :width]
        change = None if dq is None else dq[at, along] @ k[at].mT
        if dk is not None:
            other = q[at, along] @ dk[at].mT
            change = other if change is None else change.add_(other)
        found = None if dv is None else mixed[..., width:]
        if change is not None:
            change = torch._softmax_backward_data(change.to(weights.dtype), weights, -1, weights.dtype).to(v.dtype)
            found = change @ v[at] if found is None else torch.baddbmm(found, change, v[at])
        assert found is not None
        speed[at, along] = found
    return out.view(batch, heads, rows, width), speed.view(batch, heads, rows, width)


def _pieces(count: int, rows: int, columns: int, device: str) -> list[tuple[slice, slice]]:
    """Slices of heads and of rows of queries, each with no more scores than fit."""
    most = PIECE.get(device, LARGE_PIECE)
    some, long = max(1, most // (rows * columns)), max(1, most // columns)
    return [(slice(i, i + some), slice(j, min(rows, j + long))) for i in range(0, count, some) for j in range(0, rows, long)]


def _bias(
    mask: Tensor | None, causal: bool, batch: int, heads: int, rows: int, columns: int, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, and which rows see anything at all; None where nothing is, and where all do."""
    if causal:
        ahead = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()
        mask = ahead if mask is None else (mask & ahead if mask.dtype == torch.bool else mask.masked_fill(~ahead, -math.inf))
    if mask is None:
        return None, None
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.shape[0] == mask.shape[1] == 1:
        mask = mask[0]
    else:
        mask = mask.expand(batch, heads, *mask.shape[2:]).reshape(batch * heads, *mask.shape[2:])
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    return mask, (mask > -math.inf).any(-1, keepdim=True)


def _cut(x: Tensor, at: slice, along: slice) -> Tensor:
    """The part of `x` [1 or heads, 1 or rows, ...] in a piece."""
    x = x if len(x) == 1 else x[at]
    return x if x.shape[1] == 1 else x[:, along]
