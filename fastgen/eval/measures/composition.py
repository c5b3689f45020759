"""Composition by GenEval's rules with our detector: the keys say "compatible" because the numbers are not GenEval's.

Ghosh et al. 2023 (arXiv:2310.11513). Another detector's weights see other objects, so compare these scores with
each other only; `fastgen.eval.geneval.write_geneval` writes the images for the official scorer. As there, the score is the mean
over the tasks of the share of right images. It takes GenEval's prompts; others are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.detector import ColourReader, detect, hashes, load_detector
from fastgen.eval.geneval import TASKS, Detection, judge, kept, requirements
from fastgen.eval.images import batches
from fastgen.eval.ratios import clustered_error
from fastgen.eval.registry import Evidence, Reading, Score, metric

BATCH = 4
KEY = "geneval_compatible"
READINGS = {
    KEY: Reading("GenEval-compatible", best="high"),
    **{f"{KEY}_{task}": Reading(f"GenEval-compatible, {task.replace('_', ' ')}", best="high") for task in TASKS},
}


def no_colours(found: Sequence[Detection], name: str) -> list[str]:
    """In place of a reader of colours where no prompt asks for any."""
    return []


def right_images(evidence: Evidence, wanted: list[dict | None]) -> Tensor:
    """Whether each image shows what is wanted of it, boolean [N]; false where nothing is known."""
    network = load_detector(evidence.world, evidence.device)
    reader = ColourReader(evidence.world, evidence.device) if any("color" in repr(record) for record in wanted) else None
    right: list[bool] = []
    for batch in batches(evidence.images, BATCH):
        for image, seen in zip(batch, detect(batch, network, evidence.device), strict=True):
            record = wanted[len(right)]
            colours = partial(reader, image) if reader is not None else no_colours
            right.append(record is not None and judge(record, kept(seen, record["tag"]), colours)[0])
    return torch.tensor(right)


@metric(KEY, needs=("images", "prompts"), readings=READINGS, worlds=("photo",), usual=False, networks=hashes)
def geneval_compatible(evidence: Evidence) -> dict[str, Score]:
    """Share of right images of each task, and the mean over the tasks."""
    prompts = evidence.prompts
    assert prompts is not None
    wanted = [requirements(prompt) for prompt in prompts]
    strange = sum(record is None for record in wanted)
    if strange == len(wanted):
        raise UserError('none of the prompts is one of GenEval\'s, such as "a photo of a red apple and a blue cup"')
    if strange:
        evidence.note(
            f"GenEval-compatible scores pass over {strange} of {len(wanted)} images, whose prompts are not GenEval's."
        )
    right, scores = right_images(evidence, wanted).double(), {}
    for task in TASKS:
        rows = [i for i, record in enumerate(wanted) if record is not None and record["tag"] == task]
        if rows:
            error = clustered_error(right[rows], [prompts[i] for i in rows])
            scores[f"{KEY}_{task}"] = Score(right[rows].mean().item(), error=error)
    values = torch.tensor([score.value for score in scores.values()])
    errors = [score.error for score in scores.values()]
    known = [error for error in errors if error is not None]
    error = torch.tensor(known).norm().item() / len(errors) if len(known) == len(errors) else None
    return {KEY: Score(values.mean().item(), error=error), **scores}
