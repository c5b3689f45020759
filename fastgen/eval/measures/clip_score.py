"""CLIP score, 100 x cosine of image and prompt, by open_clip's own model, tokenizer and preprocessing.

Hessel et al. 2021 (arXiv:2104.08718), without their factor 2.5, without clipping at 0 and without their "A photo depicts". The
value means nothing without the name of the model, which is in every result: ViT-B-32/openai by default (weights MIT,
timm/vit_base_patch32_clip_224.openai); `World.clip` takes any that open_clip knows, such as ViT-bigG-14/laion2b_s39b_b160k.

`clip_score_dmd2` is DMD2's (Yin et al. 2024, arXiv:2405.14867), by its released code: the paper's ViT-G/14 is open_clip's
ViT-g-14/laion2b_s12b_b42k (weights MIT, laion/CLIP-ViT-g-14-laion2B-s12B-b42K), "A photo depicts " stands before each prompt,
and pictures are cropped to a square and resized to 256 x 256 (Lanczos) before CLIP's own preprocessing. They print the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.images import Images, from_pillow, to_pillow
from fastgen.eval.networks import towers
from fastgen.eval.networks.towers import Clip, cosines, hash_at_hand, known_clip, note_cut_prompts, toy_file, world_clip
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.weights import locate
from fastgen.eval.world import TOY_FEATURES, World

READINGS = {
    "clip_score": Reading("CLIP score", best="high"),
    "clip_score_real": Reading("CLIP score of real images", best="none"),
}
DMD2_READINGS = {"clip_score_dmd2": Reading("CLIP score as DMD2 measures it", best="high")}
DMD2_CLIP = "ViT-g-14/laion2b_s12b_b42k"
DMD2_PREFIX = "A photo depicts "
DMD2_SIZE = 256


def load_clip(world: World, device: str = "cpu") -> Clip:
    """The world's CLIP. Raises UserError when the name is wrong or the weights are not at hand."""
    return world_clip(world, device)


def clip_scores(
    images: Images, prompts: Sequence[str], world: World, *, device: str = "cpu", batch: int = towers.BATCH
) -> Tensor:
    """100 x cosine for each image (uint8 [N, 3, H, W]) and its prompt: [N]."""
    return 100 * cosines(load_clip(world, device), images, prompts, batch)


@metric("clip_score", needs=("images", "prompts"), readings=READINGS)
def clip_score(evidence: Evidence) -> dict[str, Score]:
    """Mean CLIP score of the images, and of real images of the same prompts where there are some."""
    assert evidence.prompts is not None
    clip, prompts = load_clip(evidence.world, evidence.device), list(evidence.prompts)
    note_cut_prompts(evidence, prompts, clip)
    scores = {"clip_score": Score.mean(100 * cosines(clip, evidence.images, prompts))}
    if evidence.paired and evidence.reference is not None:
        scores["clip_score_real"] = Score(100 * cosines(clip, evidence.reference, prompts).mean().item())
    return scores


@metric(
    "clip_score_dmd2",
    needs=("images", "prompts"),
    readings=DMD2_READINGS,
    worlds=("photo",),
    usual=False,
    networks=lambda world: {DMD2_CLIP: hash_at_hand(towers.clip_weights(DMD2_CLIP), world)},
)
def clip_score_dmd2(evidence: Evidence) -> dict[str, Score]:
    """Mean of 100 x cosine as DMD2's evaluation computes it."""
    assert evidence.prompts is not None
    clip = known_clip(DMD2_CLIP, evidence.world, evidence.device)
    prompts = [DMD2_PREFIX + prompt for prompt in evidence.prompts]
    note_cut_prompts(evidence, prompts, clip)
    preprocess = clip.preprocess
    cropped = replace(clip, preprocess=lambda images: preprocess(square(images, DMD2_SIZE)))
    return {"clip_score_dmd2": Score.mean(100 * cosines(cropped, evidence.images, prompts))}


def square(images: Tensor, size: int) -> Tensor:
    """The central squares of uint8 images [B, 3, H, W], resized to [B, 3, size, size] by Pillow's Lanczos."""
    height, width = images.shape[2:]
    side = min(height, width)
    # Rounded as torchvision's center_crop rounds.
    top, left = round((height - side) / 2), round((width - side) / 2)
    cut = to_pillow(images[:, :, top : top + side, left : left + side].cpu())
    return from_pillow([picture.resize((size, size), Image.Resampling.LANCZOS) for picture in cut])


def clip_weights(world: World) -> Path | None:
    """The file that the world's CLIP is read from; None where it is not on this machine."""
    if world.clip == TOY_FEATURES:
        return toy_file()
    try:
        return locate(towers.clip_weights(world.clip), replace(world, offline=True), what=world.clip)
    except UserError:
        return None
