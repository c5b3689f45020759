"""Seed diversity: how different are images of one prompt, and how different are real images or the teacher's of it?

Few-step students lose variety long before they lose quality, and no distance to a reference shows it: their images of a prompt
become alike. Three distances are averaged over all pairs of images of a prompt, then over prompts: Euclidean in the world's
features, cosine in DINOv2's (Oquab et al. 2023, arXiv:2304.07193), and LPIPS. Each number also comes as a share of the
teacher's, and of the real images' where these belong to the same prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.dinov2 import dino_weights
from fastgen.eval.images import Images
from fastgen.eval.lpips import Lpips, hashes, load_lpips
from fastgen.eval.networks.towers import hash_at_hand
from fastgen.eval.ratios import ratio
from fastgen.eval.registry import Evidence, ImageSet, Reading, Score, metric

DINO = "dinov2-vit-b-14"
BLOCK = 16
"""Images of a prompt whose LPIPS maps are kept at once; of more than that, blocks are compared with blocks."""


def ratio_readings(key: str, label: str) -> dict[str, Reading]:
    """Readings of a score, of its share of the real images' and of its share of the teacher's."""
    return {
        key: Reading(label, best="high"),
        f"{key}_ratio": Reading(f"{label} / real", best="high"),
        f"{key}_teacher_ratio": Reading(f"{label} / teacher", best="high"),
    }


def groups(prompts: Sequence[str]) -> list[list[int]]:
    """The rows of each prompt that occurs more than once, in order of first occurrence."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        found[prompt].append(i)
    return [rows for rows in found.values() if len(rows) > 1]


def euclidean(features: Tensor) -> Tensor:
    """Distances [K, K] of features [K, D]."""
    # Differences, not torch.cdist: its matrix product does not give exactly 0 for equal rows.
    return torch.stack([(features - row).norm(dim=1) for row in features])


def cosine(features: Tensor) -> Tensor:
    """Cosine distances [K, K] in [0, 2] of features [K, D]: half the squared distance of the unit vectors."""
    return euclidean(F.normalize(features, dim=1)).square() / 2


def lpips_matrix(images: Tensor, network: Lpips, device: str = "cpu") -> Tensor:
    """LPIPS [K, K] of uint8 images [K, 3, H, W]."""
    found = torch.zeros(len(images), len(images))
    starts = range(0, len(images), BLOCK)

    def maps(start: int) -> list[Tensor]:
        return network.features(images[start : start + BLOCK].to(device))

    for a in starts:
        mine = maps(a)
        for b in starts[a // BLOCK :]:
            theirs = mine if a == b else maps(b)
            rows = [network.distance([m[i : i + 1] for m in mine], theirs) for i in range(len(mine[0]))]
            found[a : a + BLOCK, b : b + BLOCK] = torch.stack(rows).cpu()
            found[b : b + BLOCK, a : a + BLOCK] = torch.stack(rows).T.cpu()
    return found


def pick(images: Images, rows: Sequence[int]) -> Tensor:
    """The images of these rising rows, uint8 [K, 3, H, W]; in one piece where they follow each other."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return images[rows[0] : rows[-1] + 1]
    return torch.cat([images[row : row + 1] for row in rows])


def spread(matrices: Sequence[Tensor]) -> Tensor:
    """Mean over the pairs of each prompt, from its distances [K, K]: [prompts]."""
    return torch.stack([matrix.double().sum() / (len(matrix) * (len(matrix) - 1)) for matrix in matrices])


def pairwise_distance(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean Euclidean distance over pairs with the same prompt, averaged over prompts; None when no prompt occurs twice."""
    rows = groups(prompts)
    return spread([euclidean(features[some]) for some in rows]).mean().item() if rows else None


def covered(evidence: Evidence, extractor: str | None = None) -> int:
    """Of how many images, from the first, the features are kept; noted where these are not all."""
    rows = len(evidence.features("images", extractor)["fid"])
    if rows < len(evidence.images):
        evidence.note(f"Pairs and single images are measured on the first {rows} of {len(evidence.images)} images.")
    return rows


def seed_diversity(
    evidence: Evidence, key: str, count: int, matrices: Callable[[ImageSet, list[list[int]]], list[Tensor]]
) -> dict[str, Score]:
    """The scores of `ratio_readings` on the first `count` images, from distances [K, K] of the given rows of an image set.

    An image's own value is its mean distance to the others of its prompt; it is given where all prompts have the same number.
    """
    assert evidence.prompts is not None
    rows = groups(evidence.prompts[:count])
    if not rows:
        raise UserError("it needs at least two images of some prompt")
    own = matrices("images", rows)
    mine = spread(own)
    each = None
    if len({len(some) for some in rows}) == 1 and sum(map(len, rows)) == len(evidence.prompts):
        each = torch.zeros(len(evidence.prompts))
        for some, matrix in zip(rows, own, strict=True):
            each[some] = (matrix.sum(1) / (len(some) - 1)).float()
    error = (mine.std() / len(mine) ** 0.5).item() if len(mine) > 1 else None
    return {key: Score(mine.mean().item(), each, error)} | diversity_ratios(
        evidence, key, mine, lambda which: spread(matrices(which, rows))
    )


def diversity_ratios(evidence: Evidence, key: str, own: Tensor, of: Callable[[ImageSet], Tensor]) -> dict[str, Score]:
    """Shares of the real images' and of the teacher's, from one value a prompt."""
    found = {}
    if evidence.paired and evidence.reference is not None:
        found[f"{key}_ratio"] = ratio(own, of("reference"))
    if evidence.teacher is not None:
        found[f"{key}_teacher_ratio"] = ratio(own, of("teacher"))
    return {name: score for name, score in found.items() if score is not None}


@metric("diversity", needs=("images", "prompts"), readings=ratio_readings("diversity", "Seed diversity"))
def diversity(evidence: Evidence) -> dict[str, Score]:
    """Mean distance in the world's features."""

    def matrices(which: ImageSet, rows: list[list[int]]) -> list[Tensor]:
        features = evidence.features(which)["fid"]
        return [euclidean(features[some]) for some in rows]

    return seed_diversity(evidence, "diversity", covered(evidence), matrices)


@metric(
    "dino_diversity",
    needs=("images", "prompts"),
    readings=ratio_readings("dino_diversity", "Seed diversity (DINOv2)"),
    worlds=("photo",),
    usual=False,
    networks=lambda world: {DINO: hash_at_hand(dino_weights(DINO), world)},
)
def dino_diversity(evidence: Evidence) -> dict[str, Score]:
    """Mean cosine distance of DINOv2 ViT-B/14 features."""

    def matrices(which: ImageSet, rows: list[list[int]]) -> list[Tensor]:
        features = evidence.features(which, DINO)["fid"]
        return [cosine(features[some]) for some in rows]

    return seed_diversity(evidence, "dino_diversity", covered(evidence, DINO), matrices)


@metric(
    "lpips_diversity",
    needs=("images", "prompts"),
    readings=ratio_readings("lpips_diversity", "Seed diversity (LPIPS)"),
    worlds=("photo",),
    usual=False,
    networks=hashes,
)
def lpips_diversity(evidence: Evidence) -> dict[str, Score]:
    """Mean LPIPS."""
    network = load_lpips(evidence.world, evidence.device)

    def matrices(which: ImageSet, rows: list[list[int]]) -> list[Tensor]:
        images: Images = getattr(evidence, which)
        return [lpips_matrix(pick(images, some), network, evidence.device) for some in rows]

    return seed_diversity(evidence, "lpips_diversity", len(evidence.images), matrices)
