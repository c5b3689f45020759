"""Inception score of photographs: sure about each picture's class, unsure about the next one's (arXiv:1606.03498).

It looks at no real picture and says nothing of prompts; it is here for comparison with older papers.
"""

from __future__ import annotations

from fastgen.errors import UserError
from fastgen.eval.features import embed
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.world import INCEPTION

READINGS = {"inception_score": Reading("Inception score", best="high")}


@metric("inception_score", needs=("images",), readings=READINGS, worlds=("photo",))
def inception_score(evidence: Evidence) -> dict[str, Score]:
    """Mean over ten parts of the images, with its standard error."""
    if evidence.world.features != INCEPTION:
        raise UserError(f"the Inception score takes Inception's classes, which {evidence.world.features} does not have")
    splits = evidence.embedded("images").splits
    if splits is None:  # the features were computed elsewhere, without classes
        splits = embed(evidence.images, evidence.world, device=evidence.device, rows=0).splits
    assert splits is not None
    scores = splits.scores()
    return {"inception_score": Score(scores.mean().item(), error=(scores.std() / len(scores) ** 0.5).item())}
