"""Fréchet distance, kernel distance, precision and recall of the images against real ones.

Heusel et al. 2017 (arXiv:1706.08500), Bińkowski et al. 2018 (arXiv:1801.01401), Kynkäänniemi et al. 2019 (arXiv:1904.06991).
With Inception features the first two are FID and KID; with others they are not, so the keys are `fd` and `kd`. All of them
depend on the number of images: each comes with its floor, the same number for other real images. When both sets show the same
prompts, as in the toy world, the kernel distance's floor is below zero: its estimator takes the sets for independent.

The Fréchet distance is of all images, the others of the first 10,000. The last two and the kernel distance are torch-fidelity's
own functions. Statistics of a file take the reference's place in the first; there is nothing else that they could give.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from fastgen.errors import UserError
from fastgen.eval.features import Embedded
from fastgen.eval.frechet import Frechet, FrechetTo, Gaussian, standard_error
from fastgen.eval.kernel import SUBSETS, kernel_distance
from fastgen.eval.registry import Evidence, ImageSet, Reading, Score, metric
from fastgen.eval.world import TOY

NEIGHBOURS = 3
NEIGHBOUR_BATCH = 1000
"""Rows of the table of distances that are held at a time."""
ERROR_ROWS = 5000
"""Images that the standard error of the Fréchet distance is taken from."""
TOY_SUBSETS = 10
"""Subsets of the kernel distance in the toy world, where torch-fidelity's 100 would take longer than the pictures."""
READINGS = {
    "fd": Reading("Fréchet distance", best="low"),
    "kd": Reading("Kernel distance x 1000", best="low"),
    "precision": Reading("Precision", best="high"),
    "recall": Reading("Recall", best="high"),
}
BIAS = {"fidelity_bias": Reading("Fréchet distance: expected bias", best="none")}
"""What of the distance is due to the number of images: its expectation to the order 1 / N (`fastgen.eval.frechet`)."""
BIAS_FROM = 5
"""Images for each feature from which on that order is right within a tenth; below, the bias is larger than it says."""
FLOORS = {f"{key}_floor": Reading(f"{reading.label}, real against real", best="none") for key, reading in READINGS.items()}


def frechet(generated: Embedded, reference: FrechetTo, prompts: Sequence[str] | None = None) -> Score:
    """The Fréchet distance with its standard error, which draws prompts where they are known."""
    return with_error(reference.compare(generated.moments), generated, prompts)


def with_error(found: Frechet, generated: Embedded, prompts: Sequence[str] | None = None) -> Score:
    """A distance of the generated images that was computed, with its standard error."""
    moved = found.influence(generated.rows["fid"][:ERROR_ROWS], generated.moments.mean)
    return Score(found.value, error=standard_error(moved, generated.moments.count, prompts))


def neighbours(generated: Tensor, real: Tensor) -> dict[str, float]:
    """`precision` and `recall` of features [N, D] and [M, D]."""
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": NEIGHBOUR_BATCH, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(generated, real, **options)
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def distances(generated: Embedded, real: Embedded) -> dict[str, Score | float]:
    """`fd`, `kd`, `precision` and `recall` of generated images against real ones."""
    mine, theirs = ({key: rows.double() for key, rows in each.rows.items()} for each in (generated, real))
    found = {"fd": frechet(generated, FrechetTo(real.moments)), "kd": kernel_distance(mine["fid"], theirs["fid"])}
    return found | neighbours(mine["prc"], theirs["prc"])


@metric("fidelity", needs=("images", "reference_or_statistics"), readings=READINGS | BIAS | FLOORS)
def fidelity(evidence: Evidence) -> dict[str, Score | float]:
    """Distances of the images to the reference, and of the floor set to the reference at the same number."""
    generated = evidence.embedded("images")
    moments = generated.moments
    to_goal = FrechetTo(goal(evidence, moments.width))
    found = to_goal.compare(moments)
    scores: dict[str, Score | float] = {"fd": with_error(found, generated, evidence.prompts)}
    if moments.count >= BIAS_FROM * moments.width:
        scores["fidelity_bias"] = found.bias(generated.rows["fid"], moments.mean, moments.count)
    if evidence.reference is None:
        evidence.note("Statistics give the Fréchet distance alone; for kernel distance, precision and recall give pictures.")
    else:
        scores |= _of_rows(evidence, "images", evidence.prompts)
    if evidence.floor is None:
        evidence.note("No floor was measured: it takes twice as many real images as generated ones.")
        return scores
    sizes = len(evidence.floor), moments.count
    if sizes[0] != sizes[1]:
        evidence.note(f"The floor is measured at {sizes[0]} images, the distances at {sizes[1]}; compare with care.")
    floors: dict[str, Score | float] = {"fd": to_goal.distance(evidence.moments("floor"))}
    if evidence.reference is not None:
        floors |= _of_rows(evidence, "floor")
    values = {key: score.value if isinstance(score, Score) else score for key, score in floors.items()}
    return scores | {f"{key}_floor": value for key, value in values.items()}


def goal(evidence: Evidence, width: int) -> Gaussian:
    """What distances are measured to: the statistics where there are some, else the reference. Notes what there is to say.

    Raises UserError where the statistics belong to other features, or the images are too few to have neighbours.
    """
    counts = [len(evidence.images)]
    if evidence.statistics is not None:
        for sentence in evidence.statistics.check(evidence.world):
            evidence.note(sentence)
        evidence.statistics.check_width(width)
        counts += [] if evidence.statistics.count is None else [evidence.statistics.count]
    else:
        assert evidence.reference is not None
        counts.append(len(evidence.reference))
    smallest = min(counts)
    if evidence.statistics is None and smallest <= NEIGHBOURS:
        raise UserError(f"precision and recall look at {NEIGHBOURS} neighbours and need more images than that, not {smallest}")
    if smallest <= width:
        evidence.note(
            f"Only {smallest} images for {width} features: the covariance is singular and the Fréchet distance rough; "
            f"take more than {width}."
        )
    return evidence.moments("reference") if evidence.statistics is None else evidence.statistics


def _of_rows(evidence: Evidence, which: ImageSet, prompts: Sequence[str] | None = None) -> dict[str, Score | float]:
    own, real = evidence.features(which), evidence.features("reference")
    subsets = TOY_SUBSETS if evidence.world.name == TOY.name else SUBSETS
    return {
        "kd": kernel_distance(own["fid"], real["fid"], subsets=subsets, prompts=prompts),
        **neighbours(own["prc"], real["prc"]),
    }
