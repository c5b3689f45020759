"""Image-image similarity: cosine of the features of an image and of its partner, the teacher's image or a real one.

Partners have the same prompt and, for the teacher, the same noise. CLIP (the world's; the CLIP-I of Ruiz et al. 2023,
arXiv:2208.12242, section 4.2) sees what is shown and hardly how it is arranged; DINOv2 ViT-B/14 (Oquab et al. 2023,
arXiv:2304.07193; weights Apache-2.0, facebook/dinov2-base) sees instances, poses and places. Ruiz et al. used the first DINO,
ViT-S/16: our numbers are not theirs. Pictures are resized as the CLIP of the world and torch-fidelity's DINOv2 extractor do it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.dinov2 import dino_weights
from fastgen.eval.features import extract
from fastgen.eval.networks.towers import embeddings, hash_at_hand, world_clip
from fastgen.eval.registry import Evidence, ImageSet, Reading, Score, metric
from fastgen.eval.world import World

DINO = "dinov2-vit-b-14"
Features = Callable[[Evidence, ImageSet], Tensor]


def clip_features(evidence: Evidence, which: ImageSet) -> Tensor:
    """Embeddings [N, D] by the world's CLIP."""
    return embeddings(world_clip(evidence.world, evidence.device), getattr(evidence, which))


def dino_features(evidence: Evidence, which: ImageSet) -> Tensor:
    """DINOv2's class tokens [N, 768]."""
    world = replace(evidence.world, features=DINO, features_weights=None)
    return extract(getattr(evidence, which), world, device=evidence.device, name=which)["fid"]


def hashes(world: World) -> dict[str, str | None]:
    """SHA-256 of DINOv2's weights."""
    return {DINO: hash_at_hand(dino_weights(DINO), world)}


def similarity(evidence: Evidence, features: Features, partner: ImageSet) -> Score:
    """Mean cosine of images and partners. Raises UserError where images and real ones are no pairs."""
    if partner == "reference" and not evidence.paired:
        raise UserError("the real images do not belong to the images one by one; say that they are paired where they do")
    return Score.mean(F.cosine_similarity(features(evidence, "images"), features(evidence, partner)))


@metric(
    "clip_similarity",
    needs=("images", "teacher"),
    readings={"clip_similarity": Reading("CLIP similarity to the teacher's images", best="high")},
)
def clip_similarity(evidence: Evidence) -> dict[str, Score]:
    """CLIP similarity to the teacher's images."""
    return {"clip_similarity": similarity(evidence, clip_features, "teacher")}


@metric(
    "clip_similarity_real",
    needs=("images", "reference"),
    readings={"clip_similarity_real": Reading("CLIP similarity to real images", best="high")},
    usual=False,
)
def clip_similarity_real(evidence: Evidence) -> dict[str, Score]:
    """CLIP similarity to the real images of the same prompts."""
    return {"clip_similarity_real": similarity(evidence, clip_features, "reference")}


@metric(
    "dino_similarity",
    needs=("images", "teacher"),
    readings={"dino_similarity": Reading("DINOv2 similarity to the teacher's images", best="high")},
    worlds=("photo",),
    usual=False,
    networks=hashes,
)
def dino_similarity(evidence: Evidence) -> dict[str, Score]:
    """DINOv2 similarity to the teacher's images."""
    return {"dino_similarity": similarity(evidence, dino_features, "teacher")}


@metric(
    "dino_similarity_real",
    needs=("images", "reference"),
    readings={"dino_similarity_real": Reading("DINOv2 similarity to real images", best="high")},
    worlds=("photo",),
    usual=False,
    networks=hashes,
)
def dino_similarity_real(evidence: Evidence) -> dict[str, Score]:
    """DINOv2 similarity to the real images of the same prompts."""
    return {"dino_similarity_real": similarity(evidence, dino_features, "reference")}
