"""Density and coverage (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4): precision and recall that outliers move less.

Around each real picture is the ball to its fifth neighbour among the real ones. Density: in how many balls a generated picture
is, over five; above 1 where generated pictures crowd. Coverage: the share of balls with a generated picture in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.frechet import standard_error
from fastgen.eval.registry import Evidence, Reading, Score, metric

NEIGHBOURS = 5
BATCH = 1000
READINGS = {
    "density": Reading("Density", best="high"),
    "coverage": Reading("Coverage", best="high"),
}


def density_and_coverage(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Of features [N, D] and [M, D]: the density of each generated picture [N], and whether each real one is covered [M]."""
    inside = torch.zeros(len(generated), dtype=torch.long)
    covered = []
    for block in real.split(BATCH):
        radius = torch.cdist(block, real).kthvalue(neighbours + 1).values  # the first is the picture itself
        within = torch.cdist(block, generated) < radius[:, None]
        inside += within.sum(0)
        covered.append(within.any(1))
    return inside.double() / neighbours, torch.cat(covered)


@metric("coverage", needs=("images", "reference"), readings=READINGS)
def coverage(evidence: Evidence) -> dict[str, Score]:
    """Density and coverage, of the first 10,000 pictures of each set."""
    generated, real = (evidence.features(which)["prc"] for which in ("images", "reference"))
    if len(real) <= NEIGHBOURS:
        raise UserError(f"coverage looks at {NEIGHBOURS} neighbours and needs more real images than that, not {len(real)}")
    each, covered = density_and_coverage(generated, real)
    density = Score.mean(each)
    if len(each) < len(evidence.images):
        density = Score(density.value, error=standard_error(each - each.mean(), len(each), evidence.prompts))
    return {"density": density, "coverage": Score(covered.double().mean().item())}
