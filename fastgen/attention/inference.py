"""The kernel of a network that only samples: settled at its first call, on what that call asks of its attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastgen.attention.calls import watch
from fastgen.attention.choose import choose, needs_watching
from fastgen.attention.processors import set_kernel


def settle_at_first_call(
    network: nn.Module, asked: str, *, where: str, cache: Path | None = None, say: Callable[[str], object] | None = None
) -> None:
    """Give `network` the kernel that is `asked` for, "auto" or a name, when it is first called, and tell it in a line.

    `where` is the option that messages name, `cache` the folder in which measurements are kept. Raises UserError at once where
    the kernel cannot be had here, and at the first call where it cannot serve what the network asks.
    """
    device = next(network.parameters()).device
    options: dict[str, Any] = {"training": False, "device": device, "cache": cache, "where": where}
    if asked != "auto":
        choose(asked, [], **options)

    def settle(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls = watch(module, lambda: module.forward(*args, **named)) if needs_watching(asked, device) else []
        choice = choose(asked, calls, **options)
        set_kernel(module, choice.kernel)
        hook.remove()  # not before: a first call that fails leaves the choice to the next
        if say is not None:
            say(choice.line)

    hook = network.register_forward_pre_hook(settle, with_kwargs=True)
