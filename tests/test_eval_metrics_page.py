"""docs/metrics.md names every metric, says where each runs and what it needs, and where every file of weights comes from."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from fastgen.eval import detector, dinov2, features, lpips
from fastgen.eval.measures import aesthetic, clip_score, cmmd, hps, image_reward, pick_score, similarity
from fastgen.eval.networks.towers import clip_weights
from fastgen.eval.registry import metrics
from fastgen.eval.weights import Weights
from fastgen.eval.world import INCEPTION, PHOTO

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
ENDINGS = ("_floor", "_ratio", "_teacher_ratio", "_real", "_other")
NEEDS = {
    "nothing": {"images"},
    "prompts": {"images", "prompts"},
    "several seeds": {"images", "prompts"},
    "GenEval's prompts": {"images", "prompts"},
    "scenes": {"images", "scenes"},
    "reference": {"images", "reference"},
    "paired reference": {"images", "reference"},
    "teacher": {"images", "teacher"},
}


@cache
def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    part = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = (each for each in part if each.startswith(heading))
    table = [line.strip().strip("|").split("|") for line in found.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


def test_every_metric_has_its_row_and_its_paragraph() -> None:
    described = {row[0].strip("`"): row for row in rows("All of them")}
    assert set(described) == set(metrics())
    paragraphs = PAGE.read_text(encoding="utf-8").split("## Distances")[1].split("## Weights")[0]
    assert [name for name in metrics() if f"**`{name}`**" not in paragraphs] == []


def test_the_rows_say_what_the_registry_says() -> None:
    for name, _, needs, _, runs in rows("All of them"):
        entry = metrics()[name.strip("`")]
        wanted = {need.removesuffix("_or_statistics") for need in entry.needs}
        assert NEEDS[needs] == wanted, name
        if runs != "toy world alone":
            assert runs == ("usual" if entry.usual else "asked") + (", toy" if "toy" in entry.worlds else ""), name


def test_every_number_is_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for entry in metrics().values():
        for key in entry.readings:
            stems = {key, *(key.removesuffix(ending) for ending in ENDINGS)}
            named = any(f"`{stem}`" in page for stem in stems) or any(key.startswith(f"{name}_") for name in metrics())
            assert named, key


def test_every_file_of_weights_is_on_the_page() -> None:
    clips = (PHOTO.clip, clip_score.DMD2_CLIP, cmmd.CLIP, aesthetic.CLIP, detector.COLOUR_CLIP)
    files: list[Weights] = [
        *(clip_weights(name) for name in clips),
        *(predictor.weights for predictor in (aesthetic.IMPROVED, aesthetic.FIRST)),
        hps.WEIGHTS, pick_score.WEIGHTS, image_reward.WEIGHTS, image_reward.VOCABULARY, lpips.HEADS, lpips.TRUNK,
        detector.WEIGHTS, features.ORIGINS[INCEPTION], dinov2.dino_weights(similarity.DINO),
    ]  # fmt: skip
    listed = [(file.split(", ")[0], origin.split(",")[0].removeprefix("github.com/")) for file, origin, _, _ in rows("Weights")]
    for weights in files:
        assert any(file == Path(weights.file).name and origin in weights.address for file, origin in listed), weights
    used = " ".join(row[3] for row in rows("Weights"))
    with_networks = [name for name, entry in metrics().items() if entry.networks is not None]
    assert with_networks and [name for name in with_networks if f"`{name}`" not in used] == []
