"""LAION's aesthetic predictors: the mark from about 1 to 10 that people would give a picture; prompts are not looked at.

Schuhmann et al. 2022 (arXiv:2210.08402, section 3.2). Linear layers on the unit embedding of OpenAI's CLIP ViT-L/14 (MIT,
timm/vit_large_patch14_clip_224.openai):
- `aesthetic`: sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0), five
  layers without activations, the one that papers mean by "aesthetic score";
- `aesthetic_v1`: sa_0_4_vit_l_14_linear.pth of github.com/LAION-AI/aesthetic-predictor (MIT), one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.images import batches
from fastgen.eval.networks.heads import linear_head
from fastgen.eval.networks.towers import BATCH, clip_weights, hash_at_hand, known_clip
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

CLIP = "ViT-L-14/openai"


@dataclass(frozen=True)
class Predictor:
    """A head: its file and the names of its layers in it."""

    weights: Weights
    layers: tuple[str, ...]

    def hashes(self, world: World) -> dict[str, str | None]:
        """SHA-256 of what it looks through."""
        return {
            name: hash_at_hand(each, world) for name, each in ((CLIP, clip_weights(CLIP)), (self.weights.file, self.weights))
        }


IMPROVED = Predictor(
    Weights(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccd",
    ),
    tuple(f"layers.{i}" for i in (0, 2, 4, 6, 7)),
)
FIRST = Predictor(
    Weights(
        "sa_0_4_vit_l_14_linear.pth",
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24",
    ),
    ("",),
)
LARGE: dict[str, Any] = {"needs": ("images",), "worlds": ("photo",), "usual": False}


@metric("aesthetic", readings={"aesthetic": Reading("Aesthetic score", best="high")}, networks=IMPROVED.hashes, **LARGE)
def aesthetic(evidence: Evidence) -> dict[str, Score]:
    """Mean mark by the improved predictor."""
    return {"aesthetic": Score.mean(marks(evidence, IMPROVED))}


@metric("aesthetic_v1", readings={"aesthetic_v1": Reading("Aesthetic score, v1", best="high")}, networks=FIRST.hashes, **LARGE)
def aesthetic_v1(evidence: Evidence) -> dict[str, Score]:
    """Mean mark by the first predictor."""
    return {"aesthetic_v1": Score.mean(marks(evidence, FIRST))}


@torch.no_grad()
def marks(evidence: Evidence, predictor: Predictor) -> Tensor:
    """The mark of each image: [N]. Raises UserError where the head or CLIP are missing or are something else."""
    path = locate(predictor.weights, evidence.world, what="the aesthetic predictor")
    tensors = read_tensors(path)
    clip = known_clip(CLIP, evidence.world, evidence.device)
    head = linear_head(tensors, predictor.layers, path)
    first: Any = head[0]
    found = []
    for shown in batches(evidence.images, BATCH):
        seen = clip.see(shown)
        if seen.shape[1] != first.in_features:
            raise UserError(f"{Path(path).name} looks at {first.in_features} numbers, CLIP {CLIP} gives {seen.shape[1]}")
        found.append(head(seen).squeeze(1))
    return torch.cat(found)
