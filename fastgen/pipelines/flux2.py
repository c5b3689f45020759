"""FLUX.2: its packed latents are normalised by the autoencoder's running statistics of each patch's channels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline


class Flux2(Pipeline):
    """FLUX.2 dev, which embeds its guidance, and klein, which guides with two calls or, distilled, not at all."""

    handles: ClassVar[tuple[str, ...]] = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")

    def pack(self, latents: Tensor) -> Tensor:
        mean, deviation = self.patch_statistics(latents)
        return (super().pack(latents) - mean) / deviation

    def unpack(self, latents: Tensor) -> Tensor:
        mean, deviation = self.patch_statistics(latents)
        return super().unpack(latents * deviation + mean)

    def _latent_statistics(self, raw: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """None before patches are made: the statistics are those of a patch's channels."""
        return 0.0, 1.0

    def patch_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each of a patch's channels."""
        vae = self.autoencoder
        mean, variance = (x.to(like.device).float() for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()
