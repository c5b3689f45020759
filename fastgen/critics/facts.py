"""What discriminator heads can be told of a sample beside its features: its noise level, and its text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.denoiser import Condition

WAVES = 16


def sample_facts(t: Tensor, condition: Condition) -> Tensor:
    """A vector for each sample, [B, K]: waves of its time `t` [B], then its pooled text where there is any; float32."""
    waves = torch.cos(math.pi * t.float()[:, None] * torch.arange(WAVES, device=t.device))
    text = pooled_text(condition)
    return waves if text is None else torch.cat([waves, text], 1)


def pooled_text(condition: Condition) -> Tensor | None:
    """One vector [B, D] for each sample's text, normalised, float32; None for a condition without embeddings.

    It is what diffusers' pipelines call a pooled embedding, where there is one, else the mean of the token embeddings, those
    that are all zero (padding) left out.
    """
    sequences = []
    for name, value in named(condition.inputs):
        if value.is_floating_point() and value.ndim == 2 and ("pooled" in name or name.endswith("text_embeds")):
            return F.layer_norm(value.float(), value.shape[1:])
        if value.is_floating_point() and value.ndim == 3:
            sequences.append(value.float())
    if not sequences:
        return None
    pooled = []
    for tokens in sequences:
        present = (tokens != 0).any(2, keepdim=True).float()
        pooled.append((tokens * present).sum(1) / present.sum(1).clamp_min(1))
    return torch.cat([F.layer_norm(each, each.shape[1:]) for each in pooled], 1)


def named(nest: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest with the keys that lead to them."""
    if isinstance(nest, Tensor):
        yield name, nest
    elif isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from named(value, f"{name}/{key}")
    elif isinstance(nest, (list, tuple)):
        for i, value in enumerate(nest):
            yield from named(value, f"{name}/{i}")
