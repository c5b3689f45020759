"""ERNIE-Image and Fibo 2: FLUX.2's autoencoder, whose 2 x 2 patches are normalised but not made tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from fastgen.pipelines.flux2 import Flux2


class Ernie(Flux2):
    """ERNIE-Image: patches as channels, and a constant of its own added to the variances, whatever the autoencoder says."""

    handles: ClassVar[tuple[str, ...]] = ("ErnieImagePipeline",)
    variance_floor = 1e-5

    def pack(self, latents: Tensor) -> Tensor:
        patches = pixel_unshuffle(latents, 2)
        mean, deviation = self.patch_statistics(patches)
        return (patches - mean) / deviation

    def unpack(self, latents: Tensor) -> Tensor:
        mean, deviation = self.patch_statistics(latents)
        return pixel_shuffle(latents * deviation + mean, 2)


class Fibo2(Flux2):
    """Fibo 2: patches laid out again, so that only their statistics remain of them; several states of each token."""

    handles: ClassVar[tuple[str, ...]] = ("BriaFibo2Pipeline",)
    feels_padding: ClassVar[bool] = True  # How many summaries are made of a prompt depends on its padded length.

    def pack(self, latents: Tensor) -> Tensor:
        patches = pixel_unshuffle(latents, 2)
        mean, deviation = self.patch_statistics(patches)
        return pixel_shuffle((patches - mean) / deviation, 2)

    def unpack(self, latents: Tensor) -> Tensor:
        patches = pixel_unshuffle(latents, 2)
        mean, deviation = self.patch_statistics(patches)
        return pixel_shuffle(patches * deviation + mean, 2)
