"""Vendi score: the effective number of different images in a set.

Friedman and Dieng 2023 (arXiv:2210.02410): exp(-sum_i l_i log l_i) over the eigenvalues l_i of K / n, where K is the kernel of
n images, here the cosine of their features. It is 1 for n equal images and n for n orthogonal ones. Of the images of one prompt
it tells the diversity over seeds, of all images that of the set. It grows with n: compare at the same number only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.measures.diversity import covered, diversity_ratios, groups, ratio_readings
from fastgen.eval.registry import Evidence, ImageSet, Reading, Score, metric

SET = "Vendi score of all images"
READINGS = {
    **ratio_readings("vendi", "Vendi score of a prompt"),
    "vendi_set": Reading(SET, best="high"),
    "vendi_set_ratio": Reading(f"{SET} / real", best="high"),
    "vendi_set_teacher_ratio": Reading(f"{SET} / teacher", best="high"),
}


def vendi_score(features: Tensor) -> float:
    """Of features [N, D], in [1, min(N, D)], in float64. Raises UserError for vectors of length 0, which have no cosine."""
    if not (lengths := features.double().norm(dim=1)).all():
        empty = int((lengths == 0).sum())
        raise UserError(f"{empty} of {len(features)} images have features of length 0, of which there is no cosine")
    unit = features.double() / lengths[:, None]
    # K = U U' and U' U have the same eigenvalues but for zeros, which add nothing: the smaller one is solved.
    kernel = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    shares = torch.linalg.eigvalsh(kernel / len(unit)).clamp_min(0)
    return torch.special.entr(shares).sum().exp().item()


def vendi_of(features: Tensor, rows: Sequence[list[int]]) -> Tensor:
    """Vendi score of each group of rows."""
    return torch.tensor([vendi_score(features[some]) for some in rows], dtype=torch.double)


@metric("vendi", needs=("images", "prompts"), readings=READINGS)
def vendi(evidence: Evidence) -> dict[str, Score]:
    """Mean over prompts of the Vendi score of a prompt's images, and that of all; as shares of real images' and teacher's."""
    assert evidence.prompts is not None

    def features(which: ImageSet) -> Tensor:
        return evidence.features(which)["fid"]

    def whole(which: ImageSet) -> Tensor:
        return torch.tensor([vendi_score(features(which))], dtype=torch.double)

    count, own = covered(evidence), whole("images")
    scores = {"vendi_set": Score(own.item())} | diversity_ratios(evidence, "vendi_set", own, whole)
    rows = groups(evidence.prompts[:count])
    if not rows:
        evidence.note("The Vendi score of a prompt was left out: it needs at least two images of some prompt.")
        return scores
    each = vendi_of(features("images"), rows)
    error = (each.std() / len(each) ** 0.5).item() if len(each) > 1 else None
    shares = diversity_ratios(evidence, "vendi", each, lambda which: vendi_of(features(which), rows))
    return {"vendi": Score(each.mean().item(), error=error)} | shares | scores
