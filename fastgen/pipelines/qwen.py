"""Qwen-Image: FLUX's packing of 2 x 2 patches, of one frame of an autoencoder for videos."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastgen.pipelines.flux import Flux


class QwenImage(Flux):
    """Qwen-Image and those that share its autoencoder and packed latents."""

    handles: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)

    def pack(self, latents: Tensor) -> Tensor:
        diffusers: Any = self.diffusers
        batch, channels, _, height, width = latents.shape
        packed: Tensor = diffusers._pack_latents(latents, batch, channels, height, width)
        return packed
