"""Courses of the learning rate over one stage of a run, as a factor in [0, 1].

    constant      1
    linear        1 - s, where s is the share of the stage that is done
    cosine        (1 + cos(pi s)) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts)
    wsd           1, then in the last part of the stage linearly to 0 (Hu et al. 2024, arXiv:2404.06395, section 4)
    inverse-sqrt  1 / sqrt(n / n0) from update n0 on, the end of the warm-up (Vaswani et al. 2017, arXiv:1706.03762, eq. 3)

A warm-up multiplies the first three, and wsd, by n / warmup; the share counts it in.
"""

from __future__ import annotations

import math

from fastgen.config import Schedule

__all__ = ["pace"]

LONG = 10_000  # n0 of inverse-sqrt where there is no warm-up


def pace(schedule: Schedule, done: int, length: int, *, warmup: int = 0, cooldown: float = 0.2) -> float:
    """What the learning rate is multiplied by after `done` of a stage's `length` updates.

    `warmup` is in updates, `cooldown` in (0, 1] the share of the stage in which "wsd" falls.
    """
    rise = min(1.0, (done + 1) / warmup) if warmup else 1.0
    share = done / length
    if schedule == "linear":
        return rise * (1 - share)
    if schedule == "cosine":
        return rise * (0.5 * (1 + math.cos(math.pi * share)))
    if schedule == "wsd":
        return rise * min(1.0, (1 - share) / cooldown)
    if schedule == "inverse-sqrt":
        return rise * min(1.0, math.sqrt((warmup or LONG) / (done + 1)))
    return rise
