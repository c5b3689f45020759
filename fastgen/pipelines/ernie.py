"""ERNIE-Image: FLUX.2's normalised 2 x 2 patches, kept as channels of a picture."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fastgen.pipelines.flux2 import Flux2

VARIANCE_FLOOR = 1e-5


class Ernie(Flux2):
    """ERNIE-Image, which adds its own constant to the variances, whatever the autoencoder says."""

    handles: ClassVar[tuple[str, ...]] = ("ErnieImagePipeline",)

    def pack(self, latents: Tensor) -> Tensor:
        mean, deviation = self.patch_statistics(latents)
        return (pixel_unshuffle(latents, 2) - mean) / deviation

    def unpack(self, latents: Tensor) -> Tensor:
        mean, deviation = self.patch_statistics(latents)
        return pixel_shuffle(latents * deviation + mean, 2)

    def patch_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.autoencoder.bn
        mean, variance = (x.to(like.device).float().view(-1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return mean, (variance + VARIANCE_FLOOR).sqrt()
