"""Tiny random diffusers pipelines of real classes, as the tests use them; they are `fastgen.pipelines.tiny`'s."""

from __future__ import annotations

from fastgen.pipelines.tiny.classic_transformers import chroma, flux, sd3
from fastgen.pipelines.tiny.encoders import LENGTH, PROMPTS, WIDTH, clip, clip_tokenizer, t5, t5_tokenizer, vae
from fastgen.pipelines.tiny.unets import BETAS, sd15, sdxl, toy, toy_scheduler, unet

__all__ = [
    "BETAS",
    "LENGTH",
    "PROMPTS",
    "WIDTH",
    "chroma",
    "clip",
    "clip_tokenizer",
    "flux",
    "sd15",
    "sd3",
    "sdxl",
    "t5",
    "t5_tokenizer",
    "toy",
    "toy_scheduler",
    "unet",
    "vae",
]
