"""Tiny random instances of diffusers' pipeline classes, made on the spot from their own configuration classes.

Seeded, milliseconds a call, and nothing is read from disk or from a network: the tokenizers know single letters. What they draw
is noise; they are there to see whether fastgen understands how a class calls its network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgen.pipelines.tiny import classic_transformers, unets
from fastgen.pipelines.tiny.classes import text_to_image, text_to_video
from fastgen.pipelines.tiny.encoders import PROMPTS

__all__ = ["PROMPTS", "builders", "text_to_image", "text_to_video"]


def builders() -> dict[str, Callable[[], Any]]:
    """For each class name that there is a tiny model of, the function that builds one."""
    return {**unets.BUILDERS, **classic_transformers.BUILDERS}
