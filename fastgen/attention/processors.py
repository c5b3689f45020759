"""Setting the kernel of a network's attention, for this network alone and whatever the classes that call it.

diffusers' `set_attention_backend` reaches those of its attention processors that call the dispatcher. The others, all of its
UNets' and those of SD 3, PixArt, Sana, CogView 4, Lumina 2 and AuraFlow, call torch's scaled dot product by itself and would
go on doing so without a word; and what it sets is the default of every other network in the process too. So each processor
gets a subclass of its own class here, whose code finds the chosen kernel where it looks for torch's.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from fastgen.attention.kernels import FALLBACK, KERNELS, Kernel, Mask, computes_in, first_line
from fastgen.errors import UserError

DISPATCHER, PRODUCT = "dispatch_attention_fn", "scaled_dot_product_attention"
NATIVE = AttentionBackendName.NATIVE
TORCH = ("native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn")
"""Kernels that torch itself prepares the precision for, under automatic mixed precision."""
BY_BACKEND = {each.backend: each for each in KERNELS.values()}


def set_kernel(network: nn.Module, name: str) -> int:
    """Compute all attention of `network` by the kernel of that name; the number of layers whose attention it is.

    A kernel of the hub is loaded, and downloaded where it is not on the disk. Copies of the network have the same kernel.
    Raises UserError where the kernel cannot be loaded, and where no layer of the network can be switched.
    """
    kernel = KERNELS[name]
    processors = switchable(network)
    if name == FALLBACK:
        for processor in processors:
            _restore(processor)
        return len(processors)
    if not processors:
        raise UserError(
            f"the attention of {type(network).__name__} is written into its layers and cannot be switched to the kernel "
            f'{name!r}; set speed.attention = "native"'
        )
    backend = load(kernel)
    for processor in processors:
        _restore(processor)
        kind: Any = type(processor)
        processor.__class__ = switched = _switched(kind)
        switched.body(backend)
        processor._attention_backend = backend
    return len(processors)


def load(kernel: Kernel) -> AttentionBackendName:
    """Make a kernel ready to be called, which for one of the hub may mean to download it. Raises UserError where that fails."""
    backend = AttentionBackendName(kernel.backend)
    try:
        _check_attention_backend_requirements(backend)
        _maybe_download_kernel_for_backend(backend)
    except Exception as error:  # the hub's client and a kernel's own import may raise anything
        raise UserError(f"the attention kernel {kernel.name!r} cannot be loaded: {first_line(error, 200)}") from error
    return backend


def kernel_of(network: nn.Module) -> str:
    """The name of the kernel that was set; "native" where none was."""
    backends = {getattr(each, "_attention_backend", None) for each in switchable(network)} - {None}
    names = {each.backend: name for name, each in KERNELS.items()}
    return ", ".join(sorted(names.get(str(getattr(each, "value", each)), str(each)) for each in backends)) or FALLBACK


@contextmanager
def kernel_set(network: nn.Module, name: str) -> Iterator[None]:
    """Within, `network` has the kernel of that name."""
    before = [(each, type(each), vars(each).get("_attention_backend")) for each in switchable(network)]
    set_kernel(network, name)
    try:
        yield
    finally:
        for processor, cls, backend in before:
            _restore(processor)
            processor.__class__ = cls
            if backend is not None:
                processor._attention_backend = backend


def switchable(network: nn.Module) -> list[Any]:
    """The attention processors of a network whose kernel can be set, each once."""
    found = {id(each): each for module in network.modules() if (each := getattr(module, "processor", None)) is not None}
    return [each for each in found.values() if _calls(type(each))]


def _calls(cls: type) -> frozenset[str]:
    """By which of the two names a class of processors reaches its attention."""
    code = getattr(inspect.unwrap(cls.__call__), "__code__", None)
    names: frozenset[str] = frozenset(() if code is None else code.co_names)
    return names & {DISPATCHER} or (names & {PRODUCT} if "F" in names else frozenset())


def other_default() -> bool:
    """Whether processors without a kernel of their own have another than torch's choice, as DIFFUSERS_ATTN_BACKEND may say."""
    return _AttentionBackendRegistry.get_active_backend()[0] != NATIVE


def _restore(processor: Any) -> None:
    """Give a processor its own class back, and torch's own choice, whatever the default of the process."""
    if (own := getattr(type(processor), "switched_from", None)) is not None:
        processor.__class__ = own
    vars(processor).pop("_attention_backend", None)
    # A processor that has no kernel of its own takes the default of the process, which may be any.
    if other_default() and DISPATCHER in _calls(type(processor)):
        processor._attention_backend = NATIVE


@functools.cache
def _switched(cls: Any) -> Any:
    """A subclass of a class of processors whose attention is computed by the kernel named in `_attention_backend`."""
    own: Callable[..., Any] = cls.__call__
    bodies: dict[Any, Callable[..., Any]] = {None: own, NATIVE: own}

    def body(backend: Any) -> Callable[..., Any]:
        if backend not in bodies:
            bodies[backend] = _rebound(own, AttentionBackendName(backend))
        return bodies[backend]

    @functools.wraps(own)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        return body(self._attention_backend)(self, *args, **named)

    members = {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__, "switched_from": cls}
    return type(cls.__name__, (cls,), {"_attention_backend": None, "body": staticmethod(body), **members})


def _rebound(function: Callable[..., Any], backend: AttentionBackendName) -> Callable[..., Any]:
    """A copy of a processor's `__call__` that finds `backend` under the names by which it looks for attention."""
    inner: Any = inspect.unwrap(function)

    def dispatch(*args: Any, backend: Any = None, **named: Any) -> Tensor:
        return attend(chosen, *args, **named)

    def product(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attend(chosen, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)

    chosen = backend
    functional = types.ModuleType(F.__name__)
    functional.__dict__.update(vars(F), **{PRODUCT: product})
    names = {**inner.__globals__, DISPATCHER: dispatch}
    if isinstance(names.get("F"), types.ModuleType):
        names["F"] = functional
    names.pop("__name__", None)  # By it torch.compile would find the module, and there torch's own product.
    copy = types.FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy


def attend(
    backend: AttentionBackendName,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Attention of `query` [B, N, H, D], `key` and `value` [B, M, H, D] by one of diffusers' kernels: [B, N, H, D].

    Does what the dispatcher leaves undone: half precision under autocast (torch's own kernels are given it by torch), masks of
    keys [B, M] in a form that all of torch's take, and true and false as numbers for xformers, which would add 1 and 0. A call
    in a precision or with a mask that the kernel does not take is left to torch's own choice: a run has such calls beside those
    its kernel was chosen on, where prompts differ in length, or where a network is called in single precision.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        if backend.value not in TORCH:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attn_mask, Tensor) and attn_mask.ndim == 2 and attn_mask.shape == (len(key), key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    if not serves(backend, dtype, attn_mask, query, key):
        backend = NATIVE
    if backend is AttentionBackendName.XFORMERS and isinstance(attn_mask, Tensor):
        attn_mask = _added(attn_mask, query, key)
    return dispatch_attention_fn(  # type: ignore[no-any-return]
        *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs),
        backend=backend,
        parallel_config=parallel_config,
    )


def serves(backend: AttentionBackendName, dtype: torch.dtype, mask: Any, query: Tensor, key: Tensor) -> bool:
    """Whether a kernel is known to take a call in this precision and with this mask; one that is in no table takes all."""
    kernel = BY_BACKEND.get(backend.value)
    if kernel is None:
        return True
    masked = mask_kind(mask, len(key), key.shape[1]) if isinstance(mask, Tensor) else None
    fits = computes_in(kernel, str(dtype).removeprefix("torch."), query.device.type)
    return fits and (masked is None or masked in kernel.masks)


def mask_kind(mask: Tensor, samples: int, columns: int) -> Mask:
    """What kind of mask it is, over so many keys; one of pairs that says the same to every query is one of keys."""
    if mask.dtype != torch.bool:
        return "added"
    of_keys = mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1
    return "keys" if of_keys or mask.shape == (samples, columns) else "pairs"


def _added(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as numbers to add to the scores [B, H, N, M], whose rows begin at multiples of 8 in memory, for xformers."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    columns = key.shape[1]
    room = query.new_zeros(len(query), query.shape[2], query.shape[1], -(-columns // 8) * 8)
    room[..., :columns] = mask
    return room[..., :columns]
