"""FLUX: latents are packed, each 2 x 2 patch one token [B, tokens, 4 C]; fastgen's latents are the pipeline's own, packed."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline


class Flux(Pipeline):
    """FLUX.1, guidance-distilled or not, and those that share its latents: Chroma, Bria, Ovis, LongCat."""

    handles: ClassVar[tuple[str, ...]] = (
        *("FluxPipeline", "ChromaPipeline", "BriaPipeline", "OvisImagePipeline", "LongCatImagePipeline"),
    )

    def pack(self, latents: Tensor) -> Tensor:
        diffusers: Any = self.diffusers
        packed: Tensor = diffusers._pack_latents(latents, *latents.shape)
        return packed

    def unpack(self, latents: Tensor) -> Tensor:
        diffusers: Any = self.diffusers
        default = diffusers.default_sample_size * diffusers.vae_scale_factor
        height, width = self.height or default, self.width or default
        unpacked: Tensor = diffusers._unpack_latents(latents, height, width, diffusers.vae_scale_factor)
        return unpacked
