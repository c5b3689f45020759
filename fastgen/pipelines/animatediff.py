"""AnimateDiff: a UNet of pictures with layers of motion between its own."""

from __future__ import annotations

from typing import Any, ClassVar

from fastgen.pipelines.base import Pipeline

CALLED_BY_KEYWORD = ("proj_in", "proj_out")


class AnimateDiff(Pipeline):
    """AnimateDiff: its layers of motion call their projections by keyword, which adapters do not understand."""

    handles: ClassVar[tuple[str, ...]] = ("AnimateDiffPipeline",)

    def __init__(self, diffusers: Any, **options: Any):
        super().__init__(diffusers, **options)
        self.lora_targets = tuple(target for target in self.lora_targets if target not in CALLED_BY_KEYWORD)
