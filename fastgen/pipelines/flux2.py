"""FLUX.2: its packed latents are normalised by the autoencoder's running statistics of each patch's channels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline


class Flux2(Pipeline):
    """FLUX.2 dev, which embeds its guidance, and klein, which guides with two calls or, distilled, not at all."""

    handles: ClassVar[tuple[str, ...]] = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")

    def pack(self, latents: Tensor) -> Tensor:
        tokens = super().pack(latents)
        mean, deviation = self.patch_statistics(tokens)
        return (tokens - mean) / deviation

    def unpack(self, latents: Tensor) -> Tensor:
        mean, deviation = self.patch_statistics(latents)
        return super().unpack(latents * deviation + mean)

    def _latent_statistics(self, raw: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """None before patches are made: the statistics are those of a patch's channels."""
        return 0.0, 1.0

    def patch_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each of a patch's channels, to broadcast against tokens or against pictures."""
        norm, shape = self.autoencoder.bn, (-1,) if like.ndim == 3 else (-1, 1, 1)
        mean, variance = (x.to(like.device).float().view(shape) for x in (norm.running_mean, norm.running_var))
        return mean, (variance + self.variance_floor).sqrt()

    @property
    def variance_floor(self) -> float:
        """What is added to every variance."""
        floor: float = self.autoencoder.config.batch_norm_eps
        return floor
