"""Switches of `[speed]` that change how a method's networks compute, not what: passes, guidance, compiled blocks, layout.

Compiled are the blocks that a network repeats, one by one (regional compilation), by torch.compile with the shapes as they
come: blocks of a class share what was compiled for the first of them. Weights, their names and exports stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from fastgen.config import RunConfig, SpeedConfig
from fastgen.data.ahead import ahead
from fastgen.data.source import Source
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.pipelines import Pipeline
from fastgen.training.attention import takes_forward_mode
from fastgen.training.sharding import blocks, reached

__all__ = ["Compilations", "compile_blocks", "prefetching", "repeated_blocks", "set_up", "switch"]

RESNETS = ("ResnetBlock2D",)
"""What UNets repeat beside the transformer blocks that diffusers names."""
VARIANTS = 64
"""How many versions of a block may be compiled: for its batch sizes, with and without a graph, for every adapter."""

Say = Callable[[str], object]


def set_up(config: RunConfig, pipeline: Pipeline, say: Say) -> None:
    """Set the run's method up, and its networks to compute as `[speed]` says.

    Raises UserError for switches that do not go with the method, the network or one another.
    """
    refuse(config)
    pipeline.partial_passes, pipeline.batched_guidance = config.speed.partial_passes, config.speed.batched_guidance
    config.method.setup(pipeline)
    config.method.sampler()  # times that a student cannot be called at are said now, not at the first grid
    switch(config.method, config.speed, say)


def prefetching(source: Source, config: RunConfig) -> Source:
    """The run's data, a batch ahead where that is wanted and saves waiting."""
    return ahead(source) if config.speed.prefetch else source


def refuse(config: RunConfig) -> None:
    """Raise UserError for switches that do not go with what else the run asks."""
    if config.speed.channels_last and config.train.sharding != "none":
        raise UserError(
            f'speed.channels_last = true does not go with train.sharding = "{config.train.sharding}", which cuts '
            "weights row by row; set one of them back"
        )
    if not config.speed.compile:
        return
    if takes_forward_mode(config.method):
        way = getattr(config.method, "tangent", "")
        raise UserError(
            f'speed.compile = true does not go with method.tangent = "{way}": compiled blocks have no forward mode; set '
            'method.tangent = "central", or speed.compile = false'
        )
    if config.train.sharding != "none":
        raise UserError(
            f'speed.compile = true does not go with train.sharding = "{config.train.sharding}", with which it was never '
            "tested; set one of them back"
        )


def switch(method: Method, options: SpeedConfig, say: Say, *, backend: str = "inductor") -> None:
    """Set the networks of a method that has been set up to compute as `options` say.

    `backend` is torch.compile's. Raises UserError for a network that has no blocks to compile, or no convolutions to lay out.
    """
    denoisers, _ = reached(method)
    networks = list({id(denoiser.network): denoiser.network for denoiser in denoisers}.values())
    tapped: dict[int, set[str]] = {id(network): set() for network in networks}
    for denoiser in denoisers:
        tapped[id(denoiser.network)].update(layer for layers in denoiser.layer_calls for layer in layers)
        if denoiser.end_input is not None:
            tapped[id(denoiser.network)].add(denoiser.end_input.place)
    if options.channels_last:
        for network in networks:
            lay_out(network)
    if options.compile:
        compiled = [compile_blocks(network, tapped[id(network)], backend=backend) for network in networks]
        Compilations(say).listen()
        say(f"compiling {sum(map(len, compiled))} blocks, each when it is first called")


def lay_out(network: nn.Module) -> None:
    """Keep the weights of convolutions with the channels last, in which their kernels read them; maps follow."""
    # Of the pieces that a transformer cuts a picture into none overlap.
    if not any(isinstance(module, nn.Conv2d) and module.kernel_size > module.stride for module in network.modules()):
        raise UserError(
            f"speed.channels_last = true is for networks of convolutions, which {type(network).__name__} is not; set it false"
        )
    for weight in network.parameters():
        if weight.ndim == 4:  # One by one: modules would be moved with buffers of other shapes, such as videos'.
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: of the classes that diffusers names, and residual ones; else members of its lists."""
    names: Sequence[str] = (*(getattr(network, "_repeated_blocks", None) or ()), *RESNETS)
    named = [module for module in network.modules() if type(module).__name__ in names]
    return named or blocks(network)


def compile_blocks(network: nn.Module, tapped: Collection[str] = (), *, backend: str = "inductor") -> list[nn.Module]:
    """Let torch compile the repeated blocks when they are first called; returns them. Raises UserError where there are none.

    Those that hold one of the layers `tapped` stay as they are: `Taps` would take turns with what is compiled, and where blocks
    are computed again in the backward pass the two must not differ.
    """
    places = [network.get_submodule(layer) for layer in tapped]
    found = [block for block in repeated_blocks(network) if not any(place in block.modules() for place in places)]
    if not found:
        raise UserError(f"speed.compile = true: {type(network).__name__} has no repeated blocks to compile; set it false")
    import torch._dynamo.config as dynamo  # heavy, and for those who compile alone

    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, VARIANTS * len(found))
    for block in found:
        block.compile(backend=backend, dynamic=False)
    return found


class Compilations:
    """Counts what is compiled, and says so each time there is twice as much: where shapes change that never ends."""

    def __init__(self, say: Say, first: int = 32):
        """`first`: from how many on it says anything."""
        self.say, self.count, self.next = say, 0, first

    def listen(self) -> None:
        """From now on hear of everything that this process compiles."""
        from torch._dynamo.callback import on_compile_end  # of those who compile alone

        on_compile_end(self.heard)

    def heard(self, *_: Any) -> None:
        self.count += 1
        if self.count >= self.next:
            self.next = 2 * self.count
            self.say(
                f"speed.compile: {self.count} versions of blocks were compiled so far; each shape and each adapter is one "
                "more, and where they go on changing it costs more than it gains"
            )
