"""What a student's pictures look like beside the teacher's of the same prompts and noise: colours, and variety of seeds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["beside_teacher", "contrast", "diversity", "saturation"]

SMALL = 32
"""Pixels of the side to which pictures are reduced before seeds are compared: what is in them counts, not their grain."""


def saturation(images: Tensor) -> Tensor:
    """Mean saturation [N], (max - min) / max of HSV, of images [N, 3, H, W] in [-1, 1]."""
    values = (images.float().clamp(-1, 1) + 1) / 2
    high, low = values.amax(1), values.amin(1)
    return ((high - low) / high.clamp_min(1e-6)).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """The standard deviation [N] of brightness (ITU-R BT.601) within each of the images [N, 3, H, W] in [-1, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return ((images.float().clamp(-1, 1) + 1) / 2 * weights).sum(1).flatten(1).std(1, correction=0)


def diversity(images: Tensor, seeds: int) -> Tensor:
    """Root mean square difference of images [prompts * seeds, 3, H, W] of the same prompt, averaged over pairs: [prompts]."""
    size = (min(images.shape[-2], SMALL), min(images.shape[-1], SMALL))
    small = F.adaptive_avg_pool2d(images.float().clamp(-1, 1), size).flatten(1).unflatten(0, (-1, seeds))
    distance = torch.stack([(small - one).square().mean(2).sqrt() for one in small.split(1, 1)], 1)
    return distance.sum((1, 2)) / (seeds * (seeds - 1))


def beside_teacher(student: Tensor, teacher: Tensor, seeds: int) -> dict[str, float]:
    """Saturation, contrast and seed diversity over the teacher's; what the teacher has none of is left out."""
    pairs = {"saturation": (saturation(student), saturation(teacher)), "contrast": (contrast(student), contrast(teacher))}
    if seeds > 1:
        pairs["diversity"] = diversity(student, seeds), diversity(teacher, seeds)
    return {name: float(own.mean() / theirs.mean()) for name, (own, theirs) in pairs.items() if float(theirs.mean()) > 1e-4}
