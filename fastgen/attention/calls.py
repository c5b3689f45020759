"""What a network asks of its attention: the shapes, precision and masks of the calls that it makes, found by watching one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.attention.kernels import Mask
from fastgen.attention.processors import kernel_set, mask_kind


@dataclass(frozen=True, eq=False)
class Call:
    """A call of attention that a network makes `count` times: `query` [B, H, N, D], `key` and `value` [B, H or fewer, M, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    shared_heads: bool = False
    count: int = 1

    @property
    def dtype(self) -> str:
        return str(self.query.dtype).removeprefix("torch.")

    @property
    def head_size(self) -> int:
        return self.query.shape[-1]

    @property
    def mask_kind(self) -> Mask | None:
        """What kind of mask it is, as `mask_kind` says."""
        return None if self.mask is None else mask_kind(self.mask, len(self.key), self.key.shape[2])

    def describe(self) -> dict[str, Any]:
        """All that the choice of a kernel depends on, as JSON."""
        mask = None if self.mask is None else [self.mask_kind, list(self.mask.shape)]
        shapes = {name: list(getattr(self, name).shape) for name in ("query", "key", "value")}
        more = {"causal": self.causal, "shared_heads": self.shared_heads, "scaled": self.scale is not None}
        return {**shapes, "dtype": self.dtype, "mask": mask, **more, "count": self.count}


class Watch(TorchFunctionMode):
    """Keeps the calls of torch's scaled dot product that are made while it lasts; of equal ones the first, and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Call] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            call = as_computed(*args, **(kwargs or {}))
            name = str(call.describe())
            before = self.found.get(name)
            self.found[name] = call if before is None else replace(before, count=before.count + 1)
        return func(*args, **(kwargs or {}))


def as_computed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """A call of torch's scaled dot product in the precision that autocast gives it, without its dropout."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(lower)
    return Call(query.detach(), key.detach(), value.detach(), attn_mask, is_causal, scale, enable_gqa)


@torch.no_grad()
def watch(network: nn.Module, call: Callable[[], object]) -> list[Call]:
    """The calls of attention that `network` makes in `call`, with their tensors, each kind once, whatever its kernel is now."""
    with kernel_set(network, "native"), Watch() as seen:
        call()
    return list(seen.found.values())


def made_up(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    count: int = 1,
    seed: int = 0,
) -> Call:
    """A call of given shape with standard normal numbers, as normalised queries and keys have."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        numbers = torch.randn(batch, length, heads, size, generator=generator)
        return numbers.to(device=device, dtype=dtype).transpose(1, 2)

    return Call(draw(queries), draw(keys), draw(keys), count=count)


def dtypes(calls: Iterable[Call]) -> list[str]:
    return sorted({call.dtype for call in calls})
