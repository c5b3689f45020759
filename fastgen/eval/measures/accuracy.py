"""Strict accuracy in the toy world: does the picture show exactly the scene the prompt asked for?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.data.toy.reader import correct, read
from fastgen.data.toy.scenes import COLOURS, Scenes
from fastgen.eval.images import batches, from_uint8
from fastgen.eval.ratios import clustered_error
from fastgen.eval.registry import Evidence, Reading, Score, metric

ATTRIBUTES = ("count", "shape", "colour", "size", "texture", "axis", "background")
READINGS = {
    "accuracy": Reading("Strict accuracy", best="high"),
    "accuracy_one": Reading("Strict accuracy, one object", best="high"),
    "accuracy_two": Reading("Strict accuracy, two objects", best="high"),
    **{f"accuracy_{name}": Reading(f"Right {name}", best="high") for name in ATTRIBUTES},
    "accuracy_binding": Reading("Right binding, two objects", best="high"),
    "accuracy_relation": Reading("Right relation, two objects", best="high"),
}


@metric("accuracy", needs=("images", "scenes"), readings=READINGS)
def accuracy(evidence: Evidence) -> dict[str, Score]:
    """Share of images in which everything is right, for one and two objects, and of each attribute; of those with two objects
    the share in which colours are bound to the right shapes, and in which these also stand in the right relation."""
    scenes = evidence.scenes
    assert scenes is not None
    images = from_uint8(torch.cat(list(batches(evidence.images))))
    right = correct(images, scenes)
    scores = {"accuracy": Score.mean(right["strict"].float())}
    for number, name in ((1, "one"), (2, "two")):
        chosen = scenes.count == number
        if chosen.any():
            scores[f"accuracy_{name}"] = share(right["strict"], chosen, evidence.prompts)
    if (two := scenes.count == 2).any():
        bound, placed = torch.zeros_like(two), torch.zeros_like(two)
        bound[two], placed[two] = binding(read(images[two]), scenes[two])
        scores["accuracy_binding"] = share(bound, two, evidence.prompts)
        scores["accuracy_relation"] = share(placed, two, evidence.prompts)
    return scores | {f"accuracy_{name}": Score.mean(right[name].float()) for name in ATTRIBUTES}


def share(right: Tensor, chosen: Tensor, prompts: Sequence[str] | None) -> Score:
    """The share of true values [N] among the chosen ones, with its standard error over prompts."""
    values = right[chosen].double()
    texts = None if prompts is None else [prompts[i] for i in chosen.nonzero().flatten().tolist()]
    return Score(values.mean().item(), error=clustered_error(values, texts))


def binding(seen: Scenes, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """For scenes with two objects: are the two pairs of shape and colour there, wherever they stand, and nothing else? And do
    they stand as the scene says, left and right or above and below? Boolean [B] each; the second implies the first."""
    pair = seen.shape * len(COLOURS) + seen.colour
    wanted = scenes.shape * len(COLOURS) + scenes.colour
    counted = seen.count == 2
    bound = counted & (pair.sort(1).values == wanted.sort(1).values).all(1)
    return bound, counted & (pair == wanted).all(1) & (seen.axis == scenes.axis)
