"""Tiny random instances of diffusers' pipeline classes, made on the spot from their own configuration classes.

Seeded, milliseconds a call, and nothing is read from disk or from a network: the tokenizers know single letters. What they draw
is noise; they are there to see whether fastgen understands how a class calls its network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastgen.pipelines.tiny import (
    classic_transformers,
    combined,
    language_transformers,
    prompted_transformers,
    recent_transformers,
    transformers,
    unets,
    videos,
)
from fastgen.pipelines.tiny.classes import text_to_image, text_to_video
from fastgen.pipelines.tiny.encoders import PROMPTS

__all__ = ["PROMPTS", "builders", "text_to_image", "text_to_video"]


def builders() -> dict[str, Callable[[], Any]]:
    """For each class name that there is a tiny model of, the function that builds one."""
    images = (unets, classic_transformers, prompted_transformers, language_transformers, transformers, recent_transformers)
    modules = (*images, combined, videos)
    known: dict[str, Callable[[], Any]] = {name: build for module in modules for name, build in module.BUILDERS.items()}
    return {name: functools.partial(_seeded, build) for name, build in known.items()}


def _seeded(build: Callable[[], Any]) -> Any:
    """The same weights at every call, without a trace in the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = build()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline
