"""Kandinsky 5: pictures are videos of one frame, with the channels last."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastgen.pipelines.base import Pipeline


class Kandinsky5(Pipeline):
    """Kandinsky 5 for pictures: latents [B, 1, H, W, C] over an autoencoder of pictures."""

    handles: ClassVar[tuple[str, ...]] = ("Kandinsky5T2IPipeline",)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.movedim(1, -1).unsqueeze(1)

    def unpack(self, latents: Tensor) -> Tensor:
        return latents.squeeze(1).movedim(-1, 1)
