"""UNets that take their guidance scale as an input, as latent consistency models do (Luo et al. 2023, section 4.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UserError

GUIDANCE_WIDTH = 256


def embed_guidance(scale: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding [B, width] of guidance scales [B] (1 = off) that diffusers feeds as `timestep_cond`."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = (scale.float() - 1)[:, None] * 1000 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


def with_guidance_embedding(network: Any) -> nn.Module:
    """`network`, a UNet, rebuilt with an input for the guidance scale whose weights are zero: it still answers the same.

    Raises UserError for any other network.
    """
    if not hasattr(network, "mid_block") or not hasattr(network.config, "time_cond_proj_dim"):
        raise UserError(
            f"{type(network).__name__} has no input for a guidance scale and cannot be given one: "
            f"merge one fixed guidance into the student instead"
        )
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    rebuilt: nn.Module = type(network).from_config(config | {"time_cond_proj_dim": GUIDANCE_WIDTH})
    weights: dict[str, Tensor] = network.state_dict()
    weights["time_embedding.cond_proj.weight"] = torch.zeros_like(rebuilt.get_parameter("time_embedding.cond_proj.weight"))
    rebuilt.load_state_dict(weights)
    for name, module in network.named_modules():
        if hasattr(module, "processor"):  # with the kernel that was chosen for it
            rebuilt.get_submodule(name).processor = module.processor
    first = next(network.parameters())
    return rebuilt.to(device=first.device, dtype=first.dtype)
