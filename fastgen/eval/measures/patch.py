"""Patch FID of high-resolution pictures: the Fréchet distance of their centres, cut out and not resized.

Inception sees 299 x 299 pixels: a picture of 1024 x 1024 that is resized to that has lost the detail that few-step students
lose first. As in SDXL-Lightning (Lin et al. 2024, arXiv:2402.13929) and DMD2 (Yin et al. 2024, arXiv:2405.14867),
whose code cuts the 299 x 299 pixels in the middle out of generated and real pictures alike.
"""

from __future__ import annotations

from fastgen.errors import UserError
from fastgen.eval.features import embed
from fastgen.eval.frechet import FrechetTo
from fastgen.eval.images import Centres, Images
from fastgen.eval.measures.fidelity import frechet
from fastgen.eval.registry import Evidence, Reading, Score, metric

SIDE = 299
READINGS = {"patch_fd": Reading("Patch Fréchet distance", best="low")}


@metric("patch_fd", needs=("images", "reference"), readings=READINGS, worlds=("photo",), usual=False)
def patch_fd(evidence: Evidence) -> dict[str, Score]:
    """The distance of the middle 299 x 299 pixels."""
    reference = evidence.reference
    assert reference is not None
    generated, real = (
        embed(centres(images, name), evidence.world, device=evidence.device, name=name)
        for images, name in ((evidence.images, "images"), (reference, "reference images"))
    )
    width, smallest = generated.moments.width, min(len(evidence.images), len(reference))
    if smallest <= width:
        evidence.note(f"Only {smallest} patches for {width} features: the patch distance is rough; take more than {width}.")
    return {"patch_fd": frechet(generated, FrechetTo(real.moments), evidence.prompts)}


def centres(images: Images, name: str) -> Centres:
    """The middle 299 x 299 pixels of each. Raises UserError for smaller pictures."""
    if min(images.shape[2:]) < SIDE:
        shown = f"{images.shape[3]} x {images.shape[2]}"
        raise UserError(f"patches are {SIDE} x {SIDE} pixels, but the {name} are {shown}; this is for larger pictures")
    return Centres(images, SIDE)
