"""Objects in pictures by Mask2Former, and their colours by CLIP, as GenEval looks at them.

Cheng et al. 2022 (arXiv:2112.01527). GenEval's detector is mmdetection's Mask2Former with Swin-S on COCO instances; this is
transformers' network of that architecture with the weights of the paper's authors, which are others than mmdetection's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.eval.geneval import CLASSES, COLOURS, CONFIDENCE, Detection
from fastgen.eval.networks.towers import clip_weights, hash_at_hand, known_clip
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

REPOSITORY = "facebook/mask2former-swin-small-coco-instance"
WEIGHTS, CONFIG = Weights("model.safetensors", REPOSITORY), Weights("config.json", REPOSITORY)
COLOUR_CLIP = "ViT-L-14/openai"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
SHORTER, LONGER, MULTIPLE = 800, 1333, 32
"""Pictures are resized to a shorter side of 800 pixels, a longer one of at most 1333, both rounded up to multiples of 32."""

MOST_QUERIES = 100
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AROUND = (0x99, 0x99, 0x99)
"""The grey that is painted around an object before its colour is asked for."""


def hashes(world: World) -> dict[str, str | None]:
    """SHA-256 of the weights of detector and colour reader, where they are at hand."""
    return {REPOSITORY: hash_at_hand(WEIGHTS, world), COLOUR_CLIP: hash_at_hand(clip_weights(COLOUR_CLIP), world)}


@lru_cache(maxsize=1)
def load_detector(world: World, device: str = "cpu") -> nn.Module:
    """The detector. Raises UserError where a file is missing, or belongs to another network."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    path = locate(CONFIG, world, what="the detector Mask2Former")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "mask2former":
        raise UserError(f"{path} is not the config.json of {REPOSITORY}: it is of another network")
    config = Mask2FormerConfig.from_dict(values)
    if config.num_labels != len(CLASSES):
        raise UserError(f"{path} is of a detector of {config.num_labels} classes; COCO has {len(CLASSES)}")
    weights = locate(WEIGHTS, world, what="the detector Mask2Former")
    # Not load_state_dict: transformers 5 gave the published names of this network's weights new ones, which it knows itself.
    network, report = Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=config, state_dict=read_tensors(weights), ignore_mismatched_sizes=True, output_loading_info=True
    )
    if strange := [*report["missing_keys"], *report["mismatched_keys"]]:
        name = strange[0] if isinstance(strange[0], str) else strange[0][0]
        raise UserError(f"{weights} does not hold the weights of {REPOSITORY}: {name} is missing or of another shape")
    detector: nn.Module = network.eval().requires_grad_(False).to(device)
    return detector


def prepare(images: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] as the detector wants them, float [B, 3, h, w]."""
    height, width = images.shape[-2:]
    scale = min(SHORTER / min(height, width), LONGER / max(height, width))
    size = [-(-int(side * scale + 0.5) // MULTIPLE) * MULTIPLE for side in (height, width)]
    resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255) / 255
    mean, deviation = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (resized - mean) / deviation


@torch.no_grad()
def detect(images: Tensor, network: nn.Module, device: str = "cpu") -> list[dict[str, list[Detection]]]:
    """The objects of each image (uint8 [B, 3, H, W]) by class, with a confidence above 0.3."""
    seen = network(pixel_values=prepare(images.to(device)))
    size = tuple(images.shape[-2:])
    return [
        objects(logits, masks, size) for logits, masks in zip(seen.class_queries_logits, seen.masks_queries_logits, strict=True)
    ]


def objects(logits: Tensor, masks: Tensor, size: tuple[int, ...]) -> dict[str, list[Detection]]:
    """Objects of one image of `size` from logits of queries [Q, classes + 1] and their masks [Q, h, w].

    The hundred most probable pairs of query and class are objects; confidence is that probability times the mean probability of
    the mask where it is above one half, and the box is the mask's (the paper's section 3.2 and its code).
    """
    probability = logits.float().softmax(-1)[:, :-1]
    best, places = probability.flatten().topk(min(MOST_QUERIES, probability.numel()))
    found: dict[str, list[Detection]] = {}
    for sure, place in zip(best.tolist(), places.tolist(), strict=True):
        if sure <= CONFIDENCE:  # the mask can only lower it
            break
        query, index = divmod(place, probability.shape[1])
        values = F.interpolate(masks[query][None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
        mask = values > 0
        if not mask.any():
            continue
        confidence = sure * values.sigmoid()[mask].mean().item()
        if confidence > CONFIDENCE:
            down, across = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            box = (across[0].item(), down[0].item(), across[-1].item() + 1, down[-1].item() + 1)
            found.setdefault(CLASSES[index], []).append(Detection(box, confidence, mask.cpu()))
    return {name: sorted(some, key=lambda one: -one.confidence) for name, some in found.items()}


class ColourReader:
    """The nearest of GenEval's colours to an object, by zero-shot classification."""

    def __init__(self, world: World, device: str = "cpu") -> None:
        self.clip = known_clip(COLOUR_CLIP, world, device)
        self.known: dict[str, Tensor] = {}

    def classifier(self, name: str) -> Tensor:
        """A unit vector for each colour of things of a class: [10, D]; the mean over templates."""
        if name not in self.known:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            self.known[name] = F.normalize(self.clip.read(texts).unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=1)
        return self.known[name]

    def __call__(self, image: Tensor, found: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object of class `name` in an image, uint8 [3, H, W]."""
        seen = torch.cat([self.clip.see(cut_out(image, one)[None]) for one in found])  # crops have different sizes
        return [COLOURS[i] for i in (seen @ self.classifier(name).T).argmax(1).tolist()]


def cut_out(image: Tensor, found: Detection) -> Tensor:
    """The object of an image (uint8 [3, H, W]) in its box, on grey: uint8 [3, h, w]."""
    image = image.cpu()
    if found.mask is not None:
        grey = torch.tensor(AROUND, dtype=torch.uint8)[:, None, None]
        image = torch.where(found.mask, image, grey)
    left, top, right, bottom = map(round, found.box)
    return image[:, top:bottom, left:right]
