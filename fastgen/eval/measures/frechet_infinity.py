"""The Fréchet distance of endlessly many images, and how much of the measured one is due to their number.

Chong and Forsyth 2020 (arXiv:1911.07023): the distance at N images is, to first order, a straight line in 1 / N with a slope
that depends on the model, so that models cannot be compared at a finite N. Distances of 15 random subsets give the line, its
value at 1 / N = 0 is the answer. Only the generated set shrinks: the reference's own share of the bias stays, the same for all
models.
"""

from __future__ import annotations

import torch

from fastgen.errors import UserError
from fastgen.eval.frechet import POINTS, FrechetTo, extrapolate, set_sizes
from fastgen.eval.measures.fidelity import goal
from fastgen.eval.moments import Moments
from fastgen.eval.registry import Evidence, Reading, metric

FEWEST = 4 * POINTS
READINGS = {
    "fd_infinity": Reading("Fréchet distance, endless images", best="low"),
    "fd_bias": Reading("Bias of the Fréchet distance", best="none"),
}


@metric("fd_infinity", needs=("images", "reference_or_statistics"), readings=READINGS, usual=False)
def fd_infinity(evidence: Evidence) -> dict[str, float]:
    """The limit, and what the distance of all images is above it."""
    found = evidence.embedded("images")
    rows, count, width = found.rows["fid"], found.moments.count, found.moments.width
    if len(rows) < FEWEST:
        raise UserError(f"the limit of the Fréchet distance takes at least {FEWEST} images, not {len(rows)}")
    to_goal = FrechetTo(goal(evidence, width))
    sizes = set_sizes(len(rows))
    if sizes[0] <= width:
        evidence.note(f"The limit is drawn from sets of {sizes[0]} images and more, of {width} features; it is rough.")
    draw = torch.Generator().manual_seed(0)
    subsets = (rows[torch.randperm(len(rows), generator=draw)[:size]] for size in sizes)
    distances = [to_goal.distance(Moments.of(subset)) for subset in subsets]
    whole = to_goal.distance(found.moments)
    if count > len(rows):
        sizes, distances = [*sizes, count], [*distances, whole]
    limit = extrapolate(sizes, distances)
    return {"fd_infinity": limit, "fd_bias": whole - limit}
