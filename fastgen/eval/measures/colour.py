"""Colour and sharpness: the usual failure of few-step students is too much saturation and contrast, and too little detail.

For each image, of its sRGB values R, G, B in [0, 1] and its luma Y = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601):
- brightness, the mean of Y; contrast, the standard deviation of Y;
- saturation, the mean of HSV's (max - min) / max, 0 for black;
- colourfulness, sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2) with mean m and deviation s of rg = R - G and
  yb = (R + G) / 2 - B, in units of 1/255 (Hasler and Suesstrunk 2003, Measuring colourfulness in natural images);
- clipped, the share of pixels with a channel at 0 or 255;
- sharpness, the variance of the Laplacian of Y (4 neighbours, inner pixels, in units of 1/255; Pech-Pacheco et al. 2000).

Each also comes as a ratio to the teacher's and to the reference's. A mean over the set can look right while single images err
both ways; their values are in the record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.eval.images import Images, batches
from fastgen.eval.ratios import ratio
from fastgen.eval.registry import Evidence, Reading, Score, metric

LUMA = (0.299, 0.587, 0.114)
PIXELS = 2**22
"""Pixels that are looked at together."""

LABELS = {
    "brightness": "Brightness",
    "contrast": "Contrast",
    "saturation": "Saturation",
    "colourfulness": "Colourfulness",
    "clipped": "Clipped pixels",
    "sharpness": "Sharpness",
}
READINGS = {
    key + ending: Reading(label + said, best="none")
    for key, label in LABELS.items()
    for ending, said in (("", ""), ("_ratio", " / real"), ("_teacher_ratio", " / teacher"))
}


def colour_statistics(images: Tensor) -> dict[str, Tensor]:
    """The statistics above by name, [B] each, of uint8 images [B, 3, H, W]."""
    values = images.double() / 255
    red, green, blue = values.unbind(1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    high, low = values.amax(1), values.amin(1)
    rg, yb = red - green, (red + green) / 2 - blue
    deviation = (_variance(rg) + _variance(yb)).sqrt()
    distance = (rg.mean((1, 2)).square() + yb.mean((1, 2)).square()).sqrt()
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return {
        "brightness": luma.mean((1, 2)),
        "contrast": _variance(luma).sqrt(),
        "saturation": ((high - low) / high.clamp_min(1e-12)).mean((1, 2)),
        "colourfulness": 255 * (deviation + 0.3 * distance),
        "clipped": ((images == 0) | (images == 255)).any(1).double().mean((1, 2)),
        "sharpness": 255**2 * _variance(around - 4 * inner) if inner.numel() else torch.zeros(len(images)).double(),
    }


def _variance(values: Tensor) -> Tensor:
    return values.var((1, 2), correction=0)


def statistics_of(images: Images) -> dict[str, Tensor]:
    """`colour_statistics` of a whole set, some megapixels at a time."""
    size = max(1, PIXELS // (images.shape[2] * images.shape[3]))
    parts = [colour_statistics(batch.cpu()) for batch in batches(images, size)]
    return {key: torch.cat([part[key] for part in parts]) for key in LABELS}


@metric("colour", needs=("images",), readings=READINGS)
def colour(evidence: Evidence) -> dict[str, Score]:
    """Means over the images, and their ratios to those of the teacher and of the reference."""
    own = statistics_of(evidence.images)
    scores = {key: Score.mean(each) for key, each in own.items()}
    others = {"_ratio": (evidence.reference, evidence.paired), "_teacher_ratio": (evidence.teacher, True)}
    for ending, (images, paired) in others.items():
        if images is None:
            continue
        theirs = statistics_of(images)
        shares = {key: ratio(own[key], theirs[key], evidence.prompts, paired=paired) for key in LABELS}
        scores |= {key + ending: share for key, share in shares.items() if share is not None}
    return scores
