"""Fréchet distance, kernel distance, precision and recall, by torch-fidelity's own functions.

Heusel et al. 2017 (arXiv:1706.08500), Bińkowski et al. 2018 (arXiv:1801.01401), Kynkäänniemi et al. 2019 (arXiv:1904.06991).
With Inception features the first two are FID and KID; with others they are not, so the keys are `fd` and `kd`. All of them
depend on the number of images: each comes with its floor, the same number for other real images. When both sets show the same
prompts, as in the toy world, the kernel distance's floor is below zero: its estimator takes the sets for independent.
"""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from fastgen.errors import UserError
from fastgen.eval.registry import Evidence, Reading, metric

NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000
READINGS = {
    "fd": Reading("Fréchet distance", best="low"),
    "kd": Reading("Kernel distance x 1000", best="low"),
    "precision": Reading("Precision", best="high"),
    "recall": Reading("Recall", best="high"),
}
FLOORS = {f"{key}_floor": Reading(f"{reading.label}, real against real", best="none") for key, reading in READINGS.items()}


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to two feature sets [N, D] and [M, D]."""
    statistics = (fid_features_to_statistics(features) for features in (generated, real))
    value: float = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    return value


def distances(generated: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, float]:
    """`fd`, `kd`, `precision` and `recall` of generated features against real ones, as `extract` returns them.

    The kernel distance is the mean over random subsets of at most 1000 (over one, where that is everything), times 1000.
    """
    smallest = min(len(generated["fid"]), len(real["fid"]))
    options = {"kid_subsets": 1, "kid_subset_size": smallest}
    if smallest > KID_SUBSET_SIZE:
        options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": KID_SUBSET_SIZE}
    kid = kid_features_to_metric(generated["fid"], real["fid"], verbose=False, **options)
    prc = prc_features_to_metric(generated["prc"], real["prc"], prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {
        "fd": frechet_distance(generated["fid"], real["fid"]),
        "kd": 1000 * kid[KEY_METRIC_KID_MEAN],
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
    }


@metric("fidelity", needs=("images", "reference"), readings=READINGS | FLOORS)
def fidelity(evidence: Evidence) -> dict[str, float]:
    """Distances of the images to the reference, and of the floor set to the reference at the same number."""
    generated, real = evidence.features("images"), evidence.features("reference")
    smallest, width = min(len(generated["fid"]), len(real["fid"])), generated["fid"].shape[1]
    if smallest <= NEIGHBOURS:
        raise UserError(f"precision and recall look at {NEIGHBOURS} neighbours and need more images than that, not {smallest}")
    if smallest <= width:
        evidence.note(
            f"Only {smallest} images for {width} features: the covariance is singular and the Fréchet distance rough; "
            f"take more than {width}."
        )
    scores = distances(generated, real)
    if evidence.floor is None:
        evidence.note("No floor was measured: it takes twice as many real images as generated ones.")
        return scores
    other = evidence.features("floor")
    sizes = len(other["fid"]), len(generated["fid"])
    if sizes[0] != sizes[1]:
        evidence.note(f"The floor is measured at {sizes[0]} images, the distances at {sizes[1]}; compare with care.")
    return scores | {f"{key}_floor": value for key, value in distances(other, real).items()}
