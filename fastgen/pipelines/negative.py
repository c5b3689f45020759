"""Negative prompts for students that are sampled without guidance: NASA, negative-away steer attention (Nguyen et al. 2024).

In every cross-attention, what the image finds in the negative prompt is taken from what it finds in the prompt,
Z = Attention(Q, K+, V+) - a Attention(Q, K-, V-), before the output projection. It takes no training. Guiding a one-step
student away from a prompt in the usual way, by two predictions, blends two pictures instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError


@dataclass
class Text:
    """What a layer attends to of one prompt: its states [1, N, C], and the mask that the network made of its length."""

    states: Tensor
    mask: Tensor | None


@contextmanager
def steered_away(denoiser: Denoiser, negative: Condition, shape: tuple[int, ...], scale: float) -> Iterator[None]:
    """Within, `denoiser`, and any pipeline that calls its network, is steered away from `negative`, which holds one prompt.

    `shape` is that of a latent, without the batch. `scale` is the paper's a: 0.1 for SD 1.5, 0.2 for SD 2.1, up to 0.5 for
    PixArt-alpha; 0 changes nothing. The prompt costs one call of the network, to see what its layers attend to, and each
    cross-attention is then computed twice. Raises UserError for a network without cross-attention to text.
    """
    if len(negative) != 1:
        raise ValueError(f"one negative prompt is needed, not {len(negative)}")
    texts = _texts(denoiser, negative, shape)
    originals = {layer: layer.forward for layer in texts}
    for layer, text in texts.items():
        layer.forward = _steered(layer, originals[layer], text, scale)
    try:
        yield
    finally:
        for layer in texts:
            del layer.forward


def _texts(denoiser: Denoiser, negative: Condition, shape: tuple[int, ...]) -> dict[nn.Module, Text]:
    """What every cross-attention of the network attends to when it is called with `negative`."""
    found: dict[nn.Module, Text] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        states, mask = _attended(args, given)
        if states is not None and getattr(layer, "added_kv_proj_dim", None) is None:
            found[layer] = Text(states, mask)

    hooks = [
        layer.register_forward_pre_hook(look, with_kwargs=True)
        for layer in denoiser.network.modules()
        if all(hasattr(layer, part) for part in ("to_q", "to_k", "to_v", "to_out"))
    ]
    device = next(denoiser.network.parameters()).device
    try:
        with torch.no_grad():
            denoiser(torch.zeros(1, *shape, device=device), torch.ones(1, device=device), negative)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        name = type(denoiser.network).__name__
        raise UserError(
            f"{name} has no cross-attention to text that could be steered away from a negative prompt; "
            "networks that attend to image and text jointly are not supported"
        )
    return found


def _attended(args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The states and the mask among the arguments of a layer of diffusers, which come second and third."""
    states = args[1] if len(args) > 1 else given.get("encoder_hidden_states")
    mask = args[2] if len(args) > 2 else given.get("attention_mask")
    return states, mask


def _steered(layer: nn.Module, original: Callable[..., Tensor], text: Text, scale: float) -> Callable[..., Tensor]:
    """`original`, the layer's forward, steered away from `text`."""
    outputs: Any = layer.to_out
    projection: nn.Module = outputs[0]

    def forward(hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        if scale == 0:
            return original(hidden_states, *args, **given)
        size = len(hidden_states)
        away = {
            "encoder_hidden_states": text.states.to(hidden_states).expand(size, *text.states.shape[1:]),
            "attention_mask": None if text.mask is None else text.mask.expand(size, *text.mask.shape[1:]),
        }
        rest = {key: value for key, value in given.items() if key not in away}
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        def take_away(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] - scale * seen[0], *inputs[1:])

        with projection.register_forward_pre_hook(keep):
            original(hidden_states, **away, **rest)
        with projection.register_forward_pre_hook(take_away):
            return original(hidden_states, *args, **given)

    return forward
