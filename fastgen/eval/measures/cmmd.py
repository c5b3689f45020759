"""CMMD: the maximum mean discrepancy of CLIP embeddings under a Gaussian kernel (Jayasumana et al. 2024, arXiv:2401.09603).

As in the authors' code: unit embeddings of CLIP ViT-L/14 at 336 pixels (openai weights, MIT,
timm/vit_large_patch14_clip_336.openai), k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10, and

    CMMD = 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),

the biased estimator, whose first two means include the pairs of an image with itself: it grows as the number of images falls.
In the toy world the embeddings are the toy CLIP's, and its numbers are no CMMD of papers.

The standard error is the first order's, 2 sqrt(var_x(h) / N + var_y(h) / M) with h the difference of the kernel's means over
both sets (Gretton et al. 2012, JMLR 13, section 4 and appendix B), as if images were independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.eval.images import Images, batches
from fastgen.eval.networks.towers import BATCH, Towers, clip_weights, hash_at_hand, known_clip, world_clip
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.world import TOY_FEATURES, World

CLIP = "ViT-L-14-336/openai"
SIGMA = 10.0
SCALE = 1000.0
LARGEST = 10_000
ROWS = 1024
"""Rows of the kernel's matrix that are in memory at once."""
READINGS = {
    "cmmd": Reading("CMMD", best="low"),
    "cmmd_floor": Reading("CMMD, real against real", best="none"),
}


def discrepancy(x: Tensor, y: Tensor) -> Score:
    """1000 times the squared maximum mean discrepancy of embeddings [N, D] and [M, D], with its standard error."""
    x, y = x.double(), y.double()
    within_x, within_y, from_x, from_y = kernel_means(x, x), kernel_means(y, y), kernel_means(x, y), kernel_means(y, x)
    value = within_x.mean() + within_y.mean() - 2 * from_x.mean()
    spread = [(within - across).var(correction=0) / len(within) for within, across in ((within_x, from_x), (within_y, from_y))]
    return Score(SCALE * value.item(), error=2 * SCALE * (spread[0] + spread[1]).sqrt().item())


def kernel_means(x: Tensor, y: Tensor, rows: int = ROWS) -> Tensor:
    """Mean of the kernel over `y` [M, D] for each row of `x` [N, D]: [N]; never more than `rows` x M kernel values at once."""
    lengths = y.square().sum(1)
    found = []
    for part in x.split(rows):
        squares = part.square().sum(1, keepdim=True) + lengths - 2 * part @ y.T
        found.append((-squares / (2 * SIGMA**2)).exp_().mean(1))
    return torch.cat(found)


def few_embeddings(clip: Towers, images: Images) -> Tensor:
    """Embeddings of the images, or of `LARGEST` of them, evenly spaced."""
    number, start, found = len(images), 0, []
    chosen = torch.zeros(number, dtype=torch.bool)
    chosen[torch.arange(min(number, LARGEST)) * number // min(number, LARGEST)] = True
    for shown in batches(images, BATCH):
        wanted = shown[chosen[start : start + len(shown)]]
        start += len(shown)
        if len(wanted):
            found.append(clip.see(wanted))
    return torch.cat(found)


def hashes(world: World) -> dict[str, str | None]:
    """SHA-256 of the weights, where they are not the world's own CLIP."""
    return {} if world.clip == TOY_FEATURES else {CLIP: hash_at_hand(clip_weights(CLIP), world)}


@metric("cmmd", needs=("images", "reference"), readings=READINGS, usual=False, networks=hashes)
def cmmd(evidence: Evidence) -> dict[str, Score]:
    """CMMD of the images to the reference, and of the floor set to the reference."""
    assert evidence.reference is not None
    toy = evidence.world.clip == TOY_FEATURES
    clip = world_clip(evidence.world, evidence.device) if toy else known_clip(CLIP, evidence.world, evidence.device)
    sets = {"cmmd": evidence.images, "cmmd_floor": evidence.floor}
    real = few_embeddings(clip, evidence.reference)
    if (largest := max(len(each) for each in (evidence.reference, *sets.values()) if each is not None)) > LARGEST:
        evidence.note(f"CMMD looks at {LARGEST} images of a set, evenly spaced; there are up to {largest}.")
    found = {key: few_embeddings(clip, images) for key, images in sets.items() if images is not None}
    return {key: discrepancy(each, real) for key, each in found.items()}
