"""Discriminators: heads, and what they look at."""

from __future__ import annotations

from fastgen.critics.facts import pooled_text, sample_facts
from fastgen.critics.features import FeatureCritic, ScoreCritic, feature_shapes
from fastgen.critics.heads import Heads, groups_for, map_head, token_head
from fastgen.critics.pixels import PixelCritic
from fastgen.critics.transition import TransitionCritic

__all__ = [
    "FeatureCritic",
    "Heads",
    "PixelCritic",
    "ScoreCritic",
    "TransitionCritic",
    "feature_shapes",
    "groups_for",
    "map_head",
    "pooled_text",
    "sample_facts",
    "token_head",
]
