"""HiDream: a mixture of experts with gradients in training mode alone, where the network's answer has another layout."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fastgen.denoiser import Condition
from fastgen.pipelines.base import Pipeline


class HiDream(Pipeline):
    """HiDream-I1, whose experts are always in training mode and whose network as a whole never is.

    The two modes of the experts compute the same; that of evaluation is without gradient, even for what comes before them.
    """

    handles: ClassVar[tuple[str, ...]] = ("HiDreamImagePipeline",)

    def call(self, network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

        network.training = False  # not that of its parts
        for module in network.modules():
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.training = True
        return super().call(network, xt, t, condition, guidance)
