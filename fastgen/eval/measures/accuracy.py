"""Strict accuracy in the toy world: does the picture show exactly the scene the prompt asked for?"""

from __future__ import annotations

import torch

from fastgen.data.toy.reader import correct
from fastgen.eval.images import batches, from_uint8
from fastgen.eval.registry import Evidence, Reading, Score, metric

ATTRIBUTES = ("count", "shape", "colour", "size", "texture", "axis", "background")
READINGS = {
    "accuracy": Reading("Strict accuracy", best="high"),
    "accuracy_one": Reading("Strict accuracy, one object", best="high"),
    "accuracy_two": Reading("Strict accuracy, two objects", best="high"),
    **{f"accuracy_{name}": Reading(f"Right {name}", best="high") for name in ATTRIBUTES},
}


@metric("accuracy", needs=("images", "scenes"), readings=READINGS)
def accuracy(evidence: Evidence) -> dict[str, Score]:
    """Share of images in which everything is right, for one and two objects, and of each attribute."""
    scenes = evidence.scenes
    assert scenes is not None
    right = correct(from_uint8(torch.cat(list(batches(evidence.images)))), scenes)
    scores = {"accuracy": Score.mean(right["strict"].float())}
    for number, name in ((1, "one"), (2, "two")):
        chosen = scenes.count == number
        if chosen.any():
            scores[f"accuracy_{name}"] = Score(right["strict"][chosen].float().mean().item())
    return scores | {f"accuracy_{name}": Score.mean(right[name].float()) for name in ATTRIBUTES}
