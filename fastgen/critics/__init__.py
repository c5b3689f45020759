"""Discriminators: heads, and what they look at."""

from __future__ import annotations

from fastgen.critics.features import FeatureCritic, ScoreCritic, feature_shapes
from fastgen.critics.heads import Heads, groups_for, map_head, token_head

__all__ = ["FeatureCritic", "Heads", "ScoreCritic", "feature_shapes", "groups_for", "map_head", "token_head"]
