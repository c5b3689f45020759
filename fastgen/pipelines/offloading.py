"""Text encoders and autoencoder in the CPU's memory, every layer on the device only while it runs (diffusers' group offload).

Not the base: what autograd keeps of a frozen layer for the backward pass is the layer's own parameter, and an offload has moved
that away by then. `fastgen.pipelines.quantization` makes the base smaller instead.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UserError

__all__ = ["Offload", "offload_components", "offloaded_components"]

Offload = Literal["none", "encoders"]


def offloaded_components(pipeline: Any, network: nn.Module) -> dict[str, nn.Module]:
    """The components of a diffusers pipeline that "encoders" means: all networks but the denoising one."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and part is not network}


def offload_components(pipeline: Any, network: nn.Module, device: torch.device | str) -> None:
    """Keep every component but `network` on the CPU and run it, layer by layer, on `device`.

    A component refuses, with a UserError, inputs whose gradients are wanted.
    """
    from diffusers.hooks import apply_group_offloading

    for name, component in offloaded_components(pipeline, network).items():
        component.to("cpu")
        apply_group_offloading(component, onload_device=torch.device(device), offload_type="leaf_level")
        for part in component.children():
            part.register_forward_pre_hook(Refusal(name), with_kwargs=True)


class Refusal:
    """Called before a part of an offloaded component."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if torch.is_grad_enabled() and any(each.requires_grad for each in given):
            raise UserError(
                f'offload = "encoders" moves the weights of the {self.name} away before a backward pass can use them, '
                'and this method differentiates through it; set offload = "none"'
            )
