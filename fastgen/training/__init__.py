"""Training: the loop, checkpoints, averaged weights, sample grids, and whole runs."""

from __future__ import annotations
