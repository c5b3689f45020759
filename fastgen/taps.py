"""Taps: what layers of a network give in a pass, which may end behind the last of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.schema import nearest

__all__ = ["Taps"]


class Left(Exception):
    """A network was left behind the last layer that was asked for."""


class Taps:
    """A block in which one pass is made, and the outputs of `layers` of the network are seen.

    With a `stop` the pass is left at that call, from 1, of the layers: the block ends there, without an error, and nothing
    else of the pass is kept. `added` [B, ...] is added to the output of the layer `place`.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str] = (),
        stop: int = 0,
        *,
        place: str | None = None,
        added: Tensor | None = None,
    ):
        self.network, self.layers, self.stop = network, tuple(layers), stop
        self.place, self.added = place, added
        self.seen: dict[str, Tensor] = {}
        self.calls = 0
        self.handles: list[Any] = []

    def __enter__(self) -> Taps:
        for name in self.layers:
            self.handles.append(self._layer(name).register_forward_hook(self._keep(name)))
        tapped = list(self.layers)
        if self.place is not None and self.added is not None:
            tapped.append(self.place)
            self.handles.append(self.network.get_submodule(self.place).register_forward_hook(self._add))
        self.handles += [Uncompiled(module) for module in compiled(self.network, tapped)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        for handle in self.handles:
            handle.remove()
        if not isinstance(error, Left):
            return False
        traceback.clear_frames(trace)  # and with them what the layers that were left still hold
        return True

    def _layer(self, name: str) -> nn.Module:
        try:
            return self.network.get_submodule(name)
        except AttributeError:
            names = [known for known, _ in self.network.named_modules() if known]
            raise UserError(f"{type(self.network).__name__} has no layer {name!r}{nearest(name, names)}") from None

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output
            self.calls += 1
            if self.calls == self.stop:
                raise Left

        return hook

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.added is not None
        return output + self.added.to(output.dtype)


class Uncompiled:
    """Until `remove`, a module that was compiled computes as it is written: what is compiled knows no hooks that come later."""

    def __init__(self, module: nn.Module):
        self.module, self.call = module, module._compiled_call_impl
        module._compiled_call_impl = None

    def remove(self) -> None:
        self.module._compiled_call_impl = self.call


def compiled(network: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """The compiled modules that hold one of `layers` or are one."""
    names = dict.fromkeys(name.rsplit(".", i)[0] for name in layers for i in range(name.count(".") + 1))
    modules = dict.fromkeys([network, *(network.get_submodule(name) for name in names)])
    return [module for module in modules if module._compiled_call_impl is not None]
