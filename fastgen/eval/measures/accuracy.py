"""Strict accuracy in the toy world: does the picture show exactly the scene the prompt asked for?"""

from __future__ import annotations

from fastgen.data.toy.reader import correct
from fastgen.eval.images import from_uint8
from fastgen.eval.registry import Evidence, Reading, metric

ATTRIBUTES = ("count", "shape", "colour", "size", "texture", "axis", "background")
READINGS = {
    "accuracy": Reading("Strict accuracy", best="high"),
    "accuracy_one": Reading("Strict accuracy, one object", best="high"),
    "accuracy_two": Reading("Strict accuracy, two objects", best="high"),
    **{f"accuracy_{name}": Reading(f"Right {name}", best="high") for name in ATTRIBUTES},
}


@metric("accuracy", needs=("images", "scenes"), readings=READINGS)
def accuracy(evidence: Evidence) -> dict[str, float]:
    """Share of images in which everything is right, for one and two objects, and of each attribute."""
    scenes = evidence.scenes
    assert scenes is not None
    right = correct(from_uint8(evidence.images), scenes)
    scores = {"accuracy": right["strict"].float().mean().item()}
    for number, name in ((1, "one"), (2, "two")):
        chosen = scenes.count == number
        if chosen.any():
            scores[f"accuracy_{name}"] = right["strict"][chosen].float().mean().item()
    return scores | {f"accuracy_{name}": right[name].float().mean().item() for name in ATTRIBUTES}
