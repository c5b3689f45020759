"""Teacher fidelity: how far is the student's image from the teacher's of the same prompt and the same noise?

A student that follows its teacher's trajectories (consistency models, rectified flows) should keep the picture that the teacher
makes of a noise; one that matches distributions need not. So each distance comes with what it would be without any such bond:
the distance to the teacher's images of the same prompt from other noise, where a prompt has several seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.images import Images, batches
from fastgen.eval.lpips import hashes, load_lpips
from fastgen.eval.measures.diversity import covered, groups
from fastgen.eval.ratios import clustered_error
from fastgen.eval.registry import Evidence, Reading, Score, metric

BATCH = 16
OTHER = ", teacher's other seeds"
PIXELS = {"teacher_rms": Reading("RMS to the teacher", best="low")}
LPIPS = {"teacher_lpips": Reading("LPIPS to the teacher", best="low")}
FEATURES = {
    "teacher_distance": Reading("Feature distance to the teacher", best="low"),
    "teacher_distance_other": Reading("Feature distance, teacher's other seeds", best="none"),
}


def over_pairs(images: Images, teacher: Images, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distances [N] of images and teacher's, in their order."""
    both = zip(batches(images, BATCH), batches(teacher, BATCH), strict=True)
    return torch.cat([distance(mine, theirs) for mine, theirs in both])


def root_mean_square(mine: Tensor, theirs: Tensor) -> Tensor:
    """Root mean square difference over pixels and channels, in [0, 1], of uint8 images [B, 3, H, W]: [B]."""
    return ((mine.float() - theirs.float()) / 255).square().flatten(1).mean(1, dtype=torch.double).sqrt()


def to_other_seeds(mine: Tensor, theirs: Tensor, prompts: list[str]) -> Tensor | None:
    """Mean distance of each image's features [N, D] to the teacher's of the same prompt from other noise: [M], for the M images
    whose prompt has several; None without any."""
    found = []
    for rows in groups(prompts):
        for row in rows:
            others = torch.tensor([other for other in rows if other != row])
            found.append((theirs[others] - mine[row]).norm(dim=1).mean())
    return torch.stack(found) if found else None


@metric("teacher_pixels", needs=("images", "teacher"), readings=PIXELS)
def teacher_pixels(evidence: Evidence) -> dict[str, Score]:
    """Root mean square difference of the pixels."""
    return {"teacher_rms": Score.mean(over_pairs(evidence.images, same_size(evidence), root_mean_square))}


@metric("teacher_fidelity", needs=("images", "teacher"), readings=FEATURES)
def teacher_fidelity(evidence: Evidence) -> dict[str, Score]:
    """Euclidean distance in the world's features, and what it is to the teacher's images from other noise."""
    mine, theirs = (evidence.features(which)["fid"] for which in ("images", "teacher"))
    count, each = covered(evidence), (mine - theirs).norm(dim=1)
    prompts = None if evidence.prompts is None else list(evidence.prompts[:count])
    part = Score(each.mean().item(), error=clustered_error(each, prompts))
    scores = {"teacher_distance": Score.mean(each) if count == len(evidence.images) else part}
    if prompts is not None and (other := to_other_seeds(mine, theirs, prompts)) is not None:
        scores["teacher_distance_other"] = Score(other.mean().item())
    return scores


@metric("teacher_lpips", needs=("images", "teacher"), readings=LPIPS, worlds=("photo",), usual=False, networks=hashes)
def teacher_lpips(evidence: Evidence) -> dict[str, Score]:
    """LPIPS of each image and the teacher's."""
    teacher, network = same_size(evidence), load_lpips(evidence.world, evidence.device)

    def distance(mine: Tensor, theirs: Tensor) -> Tensor:
        return network(mine.to(evidence.device), theirs.to(evidence.device)).cpu()

    return {"teacher_lpips": Score.mean(over_pairs(evidence.images, teacher, distance))}


def same_size(evidence: Evidence) -> Images:
    """The teacher's images. Raises UserError where they have another size than the student's."""
    teacher = evidence.teacher
    assert teacher is not None
    mine, theirs = (f"{images.shape[3]} x {images.shape[2]}" for images in (evidence.images, teacher))
    if mine != theirs:
        raise UserError(f"the teacher's images are {theirs}, the student's {mine}; make both at one size")
    return teacher
