"""Metrics, and the record of an evaluation. `evaluate` samples a diffusers pipeline, `score_images` measures images."""

from __future__ import annotations

if __name__ == "eval":
    raise ImportError("import fastgen.eval, not eval: the link at the root of the repository is for browsing only")

from fastgen.eval.evaluation import Evaluation, evaluate, score_images
from fastgen.eval.registry import metrics, readings
from fastgen.eval.world import PHOTO, TOY, WORLDS, World

__all__ = ["PHOTO", "TOY", "WORLDS", "Evaluation", "World", "evaluate", "metrics", "readings", "score_images"]
