"""Kernel distance (Bińkowski et al. 2018, arXiv:1801.01401): squared MMD of features in a cubic kernel, by torch-fidelity.

With Inception features it is KID. torch-fidelity's mean over random subsets of 1000 has no error that could be trusted:
subsets of one set share pictures. To first order the estimate moves with a generated picture x as 2 (E k(x, X) - E k(x, Y)),
which gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from fastgen.eval.frechet import standard_error
from fastgen.eval.registry import Score

SUBSETS, SUBSET_SIZE = 100, 1000
"""torch-fidelity's defaults."""
SCALE = 1000
"""Distances are given times 1000, as is customary."""
ERROR_ROWS = 2000


def kernel_distance(generated: Tensor, real: Tensor, *, subsets: int = SUBSETS, prompts: Sequence[str] | None = None) -> Score:
    """1000 x squared MMD of features [N, D] and [M, D], with its standard error.

    The mean over `subsets` random subsets of 1000, or over one where the smaller set has no more. `prompts` names the prompt of
    each generated picture: those of one are alike.
    """
    smallest = min(len(generated), len(real))
    count, size = (subsets, SUBSET_SIZE) if smallest > SUBSET_SIZE else (1, smallest)
    found = kid_features_to_metric(generated, real, kid_subsets=count, kid_subset_size=size, verbose=False)
    moved = influence(generated[:ERROR_ROWS], real[:ERROR_ROWS])
    drawing = found[KEY_METRIC_KID_STD] / count**0.5
    error = standard_error(moved, len(generated), prompts)
    return Score(SCALE * found[KEY_METRIC_KID_MEAN], error=None if error is None else SCALE * hypot(error, drawing))


def influence(generated: Tensor, real: Tensor) -> Tensor:
    """How far each generated picture [N] moves the squared MMD, times N, centred."""
    own, other = cubic(generated, generated), cubic(generated, real)
    moved = 2 * ((own.sum(1) - own.diagonal()) / (len(generated) - 1) - other.mean(1))
    return moved - moved.mean()


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3 of features [N, D] and [M, D]: [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3
