"""Seed diversity: how different are images of one prompt, and how different are real images of it?

Few-step students lose variety long before they lose quality, and no distance to a reference shows it: their images of a prompt
become alike. This is the mean Euclidean distance of features over all pairs of images of a prompt, averaged over prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.eval.registry import Evidence, Reading, metric

READINGS = {
    "diversity": Reading("Seed diversity", best="high"),
    "diversity_ratio": Reading("Seed diversity / real", best="high"),
}


def pairwise_distance(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean distance over pairs with the same prompt, averaged over prompts; None when no prompt occurs twice."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    # Differences, not torch.cdist: its matrix product does not give exactly 0 for equal rows.
    means = [torch.pdist(features[rows]).mean() for rows in groups.values() if len(rows) > 1]
    return torch.stack(means).mean().item() if means else None


@metric("diversity", needs=("images", "prompts"), readings=READINGS)
def diversity(evidence: Evidence) -> dict[str, float]:
    """The images' diversity, and as a share of the reference's where that belongs to the same prompts."""
    assert evidence.prompts is not None
    own = pairwise_distance(evidence.features("images")["fid"], evidence.prompts)
    if own is None:
        evidence.note("Seed diversity was left out: it needs at least two images of some prompt.")
        return {}
    scores = {"diversity": own}
    if evidence.paired and evidence.reference is not None:
        real = pairwise_distance(evidence.features("reference")["fid"], evidence.prompts)
        if real:
            scores["diversity_ratio"] = own / real
    return scores
