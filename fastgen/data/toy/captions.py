"""Captions for toy scenes: a small grammar with variations, one word one token."""

from __future__ import annotations

import torch

from fastgen.data.toy.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scenes

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATIONS = {
    ("horizontal", False): ("left of", "to the left of"),
    ("horizontal", True): ("right of", "to the right of"),
    ("vertical", False): ("above", "over"),
    ("vertical", True): ("below", "under"),
}
FRAMES = (
    "a {scene} on a {background} background",
    "a {scene}, {background} background",
    "{background} background with a {scene}",
)
WORDS = sorted(
    {
        *SHAPES, *COLOURS, *TEXTURES, *BACKGROUNDS,
        *(word for words in SIZE_WORDS.values() for word in words),
        *(word for phrases in RELATIONS.values() for phrase in phrases for word in phrase.split()),
        *" ".join(FRAMES).replace("{scene}", "").replace("{background}", "").replace(",", " ,").split(),
    }
)  # fmt: skip
"""Every word the grammar can produce."""


def caption(scenes: Scenes, generator: torch.Generator | None = None) -> list[str]:
    """One caption a scene. With a generator, wording and the order of the objects vary; without one, the plainest is used."""

    def choose(options: int) -> int:
        return 0 if generator is None else int(torch.randint(options, (), generator=generator))

    def thing(i: int, k: int) -> str:
        size = SIZE_WORDS[SIZES[scenes.size[i, k]]]
        texture = TEXTURES[scenes.texture[i, k]]
        words = [size[choose(len(size))], COLOURS[scenes.colour[i, k]], texture, SHAPES[scenes.shape[i, k]]]
        if texture == "plain" and choose(3) != 1:
            words.remove("plain")
        return " ".join(words)

    captions = []
    for i in range(len(scenes)):
        scene = thing(i, 0)
        if scenes.count[i] == 2:
            swapped = bool(choose(2))
            relation = RELATIONS[("horizontal", "vertical")[int(scenes.axis[i])], swapped]
            first, second = (thing(i, 1), scene) if swapped else (scene, thing(i, 1))
            scene = f"{first} {relation[choose(len(relation))]} a {second}"
        captions.append(FRAMES[choose(len(FRAMES))].format(scene=scene, background=BACKGROUNDS[scenes.background[i]]))
    return captions
