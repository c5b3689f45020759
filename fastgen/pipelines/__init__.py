"""One abstraction over every diffusers pipeline: prompts to conditions, images to latents, networks to denoisers."""

from __future__ import annotations

if __name__ != "fastgen.pipelines":
    raise ImportError("the folder `pipelines` at the root is a link for browsing; write `import fastgen.pipelines`")

from fastgen.adapters import LoraOptions
from fastgen.pipelines.base import Pipeline
from fastgen.pipelines.flux import Flux
from fastgen.pipelines.loading import load_pipeline

__all__ = ["Flux", "LoraOptions", "Pipeline", "load_pipeline"]
