"""DINOv2 features (Oquab et al. 2023, arXiv:2304.07193), under torch-fidelity's names and with its preprocessing.

torch-fidelity itself would download and run the code of another repository; here the network is transformers' with weights
from the Hugging Face hub. The original resizes its position embeddings to 16 x 16 patches by a scale of (16 + 0.1) / 37,
transformers by the sizes; the original is followed, so that the features are those of published distances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from transformers import Dinov2Config, Dinov2Model

from fastgen.errors import UserError
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

PATCH, PATCHES = 14, 16
"""Size of a patch in pixels, and how many there are on a side of the 224 x 224 pixels that torch-fidelity resizes to."""
OFFSET = 0.1
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2-vit-s-14": ("small", {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}),
    "dinov2-vit-b-14": ("base", {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "dinov2-vit-l-14": ("large", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "dinov2-vit-g-14": (
        "giant",
        {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
    ),
}
"""The hub's name of each size, and what makes its network."""


def dino_weights(name: str) -> Weights:
    """Where the weights of torch-fidelity's `name` come from."""
    return Weights("model.safetensors", f"facebook/dinov2-{SIZES[name][0]}")


class ClassToken(nn.Module):
    """The normalised class token [B, D] of pictures [B, 3, 224, 224], which the original's network returns."""

    def __init__(self, network: Dinov2Model) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        token: Tensor = self.network(pixel_values=pictures).last_hidden_state[:, 0]
        return token


class DinoFeatures(FeatureExtractorDinoV2):
    """torch-fidelity's extractor around a network that is already there."""

    def __init__(self, name: str, features_list: list[str], network: Dinov2Model) -> None:
        FeatureExtractorBase.__init__(self, name, features_list)
        self.feature_extractor_internal_dtype = torch.float32
        self.model = ClassToken(network)
        self.requires_grad_(False)
        self.eval()


def dino_features(name: str, world: World, layers: list[str]) -> DinoFeatures:
    """The extractor of that name. Raises UserError when its weights are not at hand, or are another network's."""
    path = world.features_weights or locate(dino_weights(name), world, what=f"DINOv2 ({name})")
    config = Dinov2Config(**SIZES[name][1], image_size=PATCH * PATCHES, patch_size=PATCH)
    tensors = dict(read_tensors(path))
    positions = "embeddings.position_embeddings"
    if positions in tensors:
        tensors[positions] = resized_positions(tensors[positions])
    try:
        network, found = Dinov2Model.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold the weights of {name}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{path} does not hold the weights of {name}: {missing[0]} is missing ({len(missing)} are in all)")
    return DinoFeatures(name, layers, network)


def resized_positions(positions: Tensor) -> Tensor:
    """Position embeddings [1, 1 + n^2, D] of n x n patches for 16 x 16, as the original does it."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == PATCHES:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (PATCHES + OFFSET) / side
    resized = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([positions[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)
