"""Resolutions of about equal area and every aspect ratio, and which pictures go to which (Podell et al. 2023, appendix I)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastgen.data.decode import measure, picture_errors
from fastgen.data.pictures import BadSamples, Picture, not_a_picture

__all__ = ["bucket_sizes", "group_by_size"]

STEP = 64
WIDEST = 2.0


def bucket_sizes(height: int, width: int, *, step: int | None = None, widest: float = WIDEST) -> list[tuple[int, int]]:
    """Heights and widths around a base resolution: multiples of `step`, of no greater area, no wider than `widest` to 1.

    The base itself is among them. `step` is 64 pixels by default, less below 256 pixels.
    """
    area, sizes = height * width, {(height, width)}
    step = step or min(STEP, max(16, min(height, width) // 64 * 16))
    for side in range(step, int(math.sqrt(area * widest)) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= widest * min(side, other):
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def group_by_size(
    pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]], bad: BadSamples | None = None
) -> dict[tuple[int, int], list[int]]:
    """The positions of the pictures that each of `sizes` is nearest to in aspect ratio; sizes without any are left out.

    Raises UserError, or tells `bad`, naming one that is not readable.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    bad = bad or BadSamples()
    for i, picture in enumerate(pictures):
        try:
            with picture.open() as content:
                height, width = measure(content)
        except picture_errors as error:
            bad.add(not_a_picture(picture, error))
            continue
        ratio = math.log(height / width)
        nearest = min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]))
        groups.setdefault(nearest, []).append(i)
    return dict(sorted(groups.items()))
