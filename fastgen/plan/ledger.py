"""Counting the bytes of live tensors, real ones or ones without values (torch's FakeTensor).

A storage is entered when an operation makes it and struck out when its last tensor dies, so the greatest sum is what an
allocator must have had at once: weights, gradients, what autograd saves, and every temporary result. What kernels allocate and
free within one operation (convolution workspaces) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Hollow", "Ledger", "converting", "empty", "tensors_in"]

REAL_BELOW = 4096
"""Number of elements under which a new tensor gets values: times, masks and tables steer the computation, and cost nothing."""


class Hollow(FakeTensorMode):
    """Makes tensors without values. Copies of what holds it share it: tensors of two modes do not mix."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hollow:
        return self

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the shape and strides of `tensor`, without values."""
        with self:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype)


class Ledger(TorchDispatchMode):
    """Within it, `live` is the sum of the bytes of all storages that were made or entered, `peak` its maximum.

    With `hollow`, new tensors of `REAL_BELOW` elements and more have no values, and where a program asks a tensor without
    values for one it hears zero, or "no".
    """

    def __init__(self, hollow: Hollow | None = None):
        super().__init__()
        self.hollow = hollow
        self.live = self.peak = 0
        self.entered: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            with self.place(args, kwargs):
                result = function(*args, **kwargs)
        except DataDependentOutputException:
            if self.hollow is None:
                raise
            return answer(args)
        for tensor in tensors_in(result):
            self.enter(tensor)
        return result

    def place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Where an operation is done: without values if an argument has none, or if it makes something large from nothing."""
        if self.hollow is None:
            return nullcontext()
        given = list(tensors_in((args, kwargs)))
        hollow = any(isinstance(each, FakeTensor) for each in given) if given else is_large(args)
        return self.hollow if hollow else nullcontext()

    def enter(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` for as long as it lives, once however many tensors share it."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.entered or not size:
            return
        self.entered.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.strike, key, size)

    def leave(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` no longer, though it lives: it is elsewhere."""
        storage = tensor.untyped_storage()
        self.strike(storage._cdata, storage.nbytes())

    def strike(self, key: int, size: int) -> None:
        if key in self.entered:
            self.entered.discard(key)
            self.live -= size

    def restart(self) -> int:
        """Forget the peak so far; what is live now."""
        self.peak = self.live
        return self.live


def tensors_in(nest: Any) -> Iterable[Tensor]:
    """Every tensor of nested lists, tuples and dictionaries."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from tensors_in(value)
    elif isinstance(nest, list | tuple):
        for value in nest:
            yield from tensors_in(value)


def is_large(args: tuple[Any, ...]) -> bool:
    """Whether a function that takes no tensor makes a large one: the first argument of all of them is a shape, or an end."""
    shape = next((each for each in args if isinstance(each, list | tuple)), None)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return False
    count = 1
    for size in shape:
        count *= size
    return count >= REAL_BELOW


def answer(args: tuple[Any, ...]) -> Any:
    """What a tensor without values says when it is asked for one."""
    asked = args[0]
    if len(args) > 1 or asked.dtype is torch.bool:
        return False
    return 0.0 if asked.dtype.is_floating_point else 0


@contextmanager
def converting() -> Iterator[None]:
    """Within, `nn.Module.to` and its like put new parameters in place, since torch cannot swap those without values."""
    before = nn.Module._apply

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(function)
        for name, weight in module._parameters.items():
            if weight is not None:
                with torch.no_grad():
                    applied = function(weight)
                module._parameters[name] = weight if applied is weight else nn.Parameter(applied, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def empty(module: nn.Module, hollow: Hollow) -> None:
    """Take the values from all of a module's parameters; modules that share a parameter go on sharing it."""
    seen: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None or isinstance(weight, FakeTensor):
                continue
            if id(weight) not in seen:
                seen[id(weight)] = nn.Parameter(hollow.like(weight.detach()), requires_grad=weight.requires_grad)
            part._parameters[name] = seen[id(weight)]
