"""FLUX.2: 2 x 2 patches as channels, normalised by the autoencoder's running statistics, one token each."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.pipelines.base import Pipeline


class Flux2(Pipeline):
    """FLUX.2 dev, which embeds its guidance, and klein, which guides with two calls or, distilled, not at all."""

    handles: ClassVar[tuple[str, ...]] = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")

    def pack(self, latents: Tensor) -> Tensor:
        diffusers: Any = self.diffusers
        mean, deviation = self._patch_statistics(latents)
        packed: Tensor = diffusers._pack_latents((diffusers._patchify_latents(latents) - mean) / deviation)
        return packed

    def unpack(self, latents: Tensor) -> Tensor:
        diffusers: Any = self.diffusers
        default = diffusers.default_sample_size * diffusers.vae_scale_factor
        patch = 2 * diffusers.vae_scale_factor
        height, width = (self.height or default) // patch, (self.width or default) // patch
        patches = latents.transpose(1, 2).unflatten(2, (height, width))
        mean, deviation = self._patch_statistics(latents)
        unpacked: Tensor = diffusers._unpatchify_latents(patches * deviation + mean)
        return unpacked

    def _latent_statistics(self, raw: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """None before patches are made: the statistics are those of a patch's channels."""
        return 0.0, 1.0

    def _patch_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.autoencoder
        mean, variance = (x.view(1, -1, 1, 1).to(like.device, torch.float32) for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()
