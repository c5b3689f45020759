"""The autoencoder of a diffusers pipeline, under whichever name and of whichever kind; some pipelines have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("vae", "movq", "vqvae", "vqgan")
TRANSPARENT = 4
UNQUANTISED = {"force_not_quantize": True}


def autoencoder(diffusers: Any) -> Any:
    """A pipeline's autoencoder; None where it has none and draws pixels."""
    found = (getattr(diffusers, name, None) for name in NAMES)
    return next((each for each in found if each is not None), None)


def encodes_frames(vae: nn.Module) -> bool:
    """Whether an autoencoder is one for videos, to which an image is a single frame."""
    return any(isinstance(module, nn.Conv3d) or "CausalConv3d" in type(module).__name__ for module in vae.modules())


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """What an autoencoder makes of `images` [B, 3, H, W], unscaled: the posterior's mean where it gives a distribution."""
    if vae.config.get("in_channels") == TRANSPARENT:
        images = torch.cat([images, torch.ones_like(images[:, :1])], 1)  # Opaque.
    answer = vae.encode(images.unsqueeze(2) if encodes_frames(vae) else images)
    if hasattr(answer, "latent_dist"):
        mean: Tensor = answer.latent_dist.mode()
        return mean
    found: Tensor = answer.latents if hasattr(answer, "latents") else answer.latent
    return found


def decode_latents(vae: Any, raw: Tensor) -> Tensor:
    """Images [B, 3, H, W] of an autoencoder's own latents; videos are [B, 3, frames, H, W]."""
    from diffusers import VQModel

    exact = UNQUANTISED if isinstance(vae, VQModel) else {}
    image: Tensor = vae.decode(raw, return_dict=False, **exact)[0]
    image = image.squeeze(2) if image.ndim == 5 else image
    return image[:, :3] if image.shape[1] == TRANSPARENT else image


def latent_statistics(vae: Any, raw: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The shift and scale with which a pipeline's latents are (raw - shift) * scale, as the autoencoder's settings say."""
    config = vae.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return getattr(config, "shift_factor", None) or 0.0, scale
    shape = (1, -1, *[1] * (raw.ndim - 2))
    shift, spread = (torch.tensor(x, device=raw.device).view(shape) for x in (mean, deviation))
    return shift, scale / spread


def pack_patches(latents: Tensor, patch: int) -> Tensor:
    """[B, C, H, W], or one frame of it, as tokens [B, H W / patch^2, C patch^2], as FLUX and its kin are fed."""
    latents = latents.squeeze(2) if latents.ndim == 5 else latents
    patches = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_patches(tokens: Tensor, patch: int, rows: int) -> Tensor:
    """Inverse of `pack_patches`, to [B, C, H, W], for patches in so many rows."""
    patches = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, -1))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
