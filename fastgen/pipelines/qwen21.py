"""Qwen-Image 2.1: its network is told where in the sequence the picture stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.pipelines.base import Pipeline

TOKENS_PER_SLOT = 4


class QwenImage21(Pipeline):
    """Qwen-Image 2.1: the picture's slots, of 2 x 2 tokens each, follow the padded prompt."""

    handles: ClassVar[tuple[str, ...]] = ("QwenImage21Pipeline",)
    feels_padding: ClassVar[bool] = True  # The picture's positions begin after the padded prompt.
    makes: ClassVar[tuple[str, ...]] = ("img_mask",)

    def made_arguments(self, arguments: Mapping[str, Any], xt: Tensor) -> dict[str, Any]:
        words = arguments["encoder_hidden_states"]
        slots = [(words.shape[1], False), (xt.shape[1] // TOKENS_PER_SLOT, True)]
        parts = [torch.full((len(xt), count), filled, device=xt.device) for count, filled in slots]
        return {"img_mask": torch.cat(parts, 1)}
