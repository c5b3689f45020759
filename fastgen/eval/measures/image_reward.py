"""ImageReward: a model of people's preferences among pictures of a prompt (Xu et al. 2023, arXiv:2304.05977).

ImageReward-v1.0, THUDM/ImageReward (Apache-2.0): ImageReward.pt, read as tensors alone; and BERT's vocabulary, vocab.txt of
google-bert/bert-base-uncased (Apache-2.0). The score is the network's mark in deviations from its mean over training pictures,
about -2 to 2. It reads 35 tokens of a prompt. Pictures: shorter side to 224 (bicubic, Pillow), the square in the middle.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fastgen.eval.images import batches
from fastgen.eval.networks.blip import ImageReward, build
from fastgen.eval.networks.towers import hash_at_hand, note_cut_prompts
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

WEIGHTS = Weights("ImageReward.pt", "THUDM/ImageReward")
VOCABULARY = Weights("vocab.txt", "google-bert/bert-base-uncased")
BATCH = 32


@lru_cache(maxsize=1)
def load(world: World, device: str = "cpu") -> ImageReward:
    """The network. Raises UserError where its files are missing or are something else."""
    path = locate(WEIGHTS, world, what="ImageReward")
    return build(read_tensors(path), path, locate(VOCABULARY, world, what="ImageReward's vocabulary"), device)


def hashes(world: World) -> dict[str, str | None]:
    """SHA-256 of what it looks through."""
    return {weights.file: hash_at_hand(weights, world) for weights in (WEIGHTS, VOCABULARY)}


@metric(
    "image_reward",
    needs=("images", "prompts"),
    readings={"image_reward": Reading("ImageReward", best="high")},
    worlds=("photo",),
    usual=False,
    networks=hashes,
)
def image_reward(evidence: Evidence) -> dict[str, Score]:
    """Mean ImageReward of the images."""
    assert evidence.prompts is not None
    prompts, model = list(evidence.prompts), load(evidence.world, evidence.device)
    note_cut_prompts(evidence, prompts, model)
    found = []
    for number, shown in enumerate(batches(evidence.images, BATCH)):
        found.append(model.score(shown, prompts[number * BATCH : number * BATCH + len(shown)]))
    return {"image_reward": Score.mean(torch.cat(found))}
