"""Which networks measure: small ones for the toy world, the customary ones for photographs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

TOY_FEATURES = "fastgen-toy"
INCEPTION = "inception-v3-compat"


@dataclass(frozen=True)
class World:
    """The measuring networks of an evaluation.

    `features` names a feature extractor registered with torch-fidelity, `features_weights` a file for it where it wants one.
    `clip` is "fastgen-toy" or an open_clip model and weights, "ViT-B-32/openai". `weights` is a folder where files of measuring
    networks are looked for first (`fastgen.eval.weights`). Offline, nothing is downloaded.
    """

    name: str
    features: str
    clip: str
    features_weights: Path | None = None
    offline: bool = True
    weights: Path | None = None

    def online(self) -> World:
        """The same world, allowed to download missing weights."""
        return replace(self, offline=False)


TOY = World("toy", TOY_FEATURES, "fastgen-toy")
PHOTO = World("photo", INCEPTION, "ViT-B-32/openai")
WORLDS = {world.name: world for world in (TOY, PHOTO)}
