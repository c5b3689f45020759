"""HPS v2.1: a CLIP trained on people's preferences among pictures of a prompt (Wu et al. 2023, arXiv:2306.09341).

open_clip's ViT-H-14 with HPS_v2.1_compressed.pt of xswu/HPSv2 (Apache-2.0), read as tensors alone. The score is 100 x cosine,
as in the authors' benchmark (their function `score` gives the cosine alone). Their preprocessing is not CLIP's: the picture is
resized as a tensor, bicubic and antialiased as today's torchvision does it, so that its longer side is 224, and filled up with
black to a square. The authors compute in half precision on a GPU; here it is float32. Numbers of v2.0 and v2.1 do not compare.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import open_clip
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from fastgen.errors import UserError
from fastgen.eval.networks.towers import Clip, cosines, first_line, hash_at_hand, note_cut_prompts
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

ARCHITECTURE = "ViT-H-14"
WEIGHTS = Weights("HPS_v2.1_compressed.pt", "xswu/HPSv2")
CONTEXT = 77
BATCH = 32


@lru_cache(maxsize=1)
def load(world: World, device: str = "cpu") -> Clip:
    """The network. Raises UserError where its file is missing or is something else."""
    path = locate(WEIGHTS, world, what="HPS v2.1")
    found = read_tensors(path)
    config: dict[str, Any] = open_clip.get_model_config(ARCHITECTURE)
    with init_empty_weights(include_buffers=False):  # saves a minute of random numbers
        model = open_clip.CLIP(**config)
    try:
        model.load_state_dict(found.get("state_dict", found), assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path} does not hold the weights of open_clip's {ARCHITECTURE}: {first_line(error)}") from error
    network = model.float().eval().requires_grad_(False).to(device)
    size = config["vision_cfg"]["image_size"]
    return Clip(
        "HPS v2.1", network, lambda images: padded(images, size), open_clip.get_tokenizer(ARCHITECTURE), CONTEXT, device
    )


def padded(images: Tensor, size: int) -> Tensor:
    """uint8 pictures [B, 3, H, W] as pixels [B, 3, size, size]: the longer side resized, black around the shorter one."""
    height, width = images.shape[2:]
    scale = size / max(height, width)
    inner = round(height * scale), round(width * scale)
    pixels = images.float() / 255
    if scale != 1:
        pixels = resize(pixels, list(inner), InterpolationMode.BICUBIC, antialias=True)
    (above, below), (left, right) = (((size - side) // 2, size - side - (size - side) // 2) for side in inner)
    pixels = F.pad(pixels, (left, right, above, below))
    framed: Tensor = normalize(pixels, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
    return framed


@metric(
    "hps",
    needs=("images", "prompts"),
    readings={"hps": Reading("HPS v2.1", best="high")},
    worlds=("photo",),
    usual=False,
    networks=lambda world: {WEIGHTS.file: hash_at_hand(WEIGHTS, world)},
)
def hps(evidence: Evidence) -> dict[str, Score]:
    """Mean HPS v2.1 of the images."""
    assert evidence.prompts is not None
    prompts, clip = list(evidence.prompts), load(evidence.world, evidence.device)
    note_cut_prompts(evidence, prompts, clip)
    return {"hps": Score.mean(100 * cosines(clip, evidence.images, prompts, BATCH))}
