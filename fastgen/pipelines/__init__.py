"""One abstraction over every diffusers pipeline: prompts to conditions, images to latents, networks to denoisers.

diffusers and peft take seconds to import. They are imported where they are used, so that a config is read, and a mistake in it
told, without that wait.
"""

from __future__ import annotations

if __name__ != "fastgen.pipelines":
    raise ImportError("the folder `pipelines` at the root is a link for browsing; write `import fastgen.pipelines`")

from fastgen.adapters import LoraOptions
from fastgen.pipelines.animatediff import AnimateDiff
from fastgen.pipelines.base import Pipeline
from fastgen.pipelines.cogview4 import CogView4
from fastgen.pipelines.cosmos2 import Cosmos2
from fastgen.pipelines.ernie import Ernie, Fibo2
from fastgen.pipelines.flux2 import Flux2
from fastgen.pipelines.hidream import HiDream
from fastgen.pipelines.kandinsky5 import Kandinsky5
from fastgen.pipelines.loading import load_pipeline
from fastgen.pipelines.prx_pixel import PRXPixel
from fastgen.pipelines.qwen21 import QwenImage21
from fastgen.pipelines.sana_sprint import SanaSprint

__all__ = [
    "AnimateDiff",
    "CogView4",
    "Cosmos2",
    "Ernie",
    "Fibo2",
    "Flux2",
    "HiDream",
    "Kandinsky5",
    "LoraOptions",
    "PRXPixel",
    "Pipeline",
    "QwenImage21",
    "SanaSprint",
    "load_pipeline",
]
