"""LPIPS, the learned distance of two pictures: VGG-16 features, normalised, squared differences weighted by channel.

Zhang et al. 2018 (arXiv:1801.03924), equation 1, version 0.1 with VGG, as torch-fidelity's `lpips-vgg16` computes it. That
class fetches its own weights, so the network is set up here and the files are found by `fastgen.eval.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
from torchvision.models.vgg import cfgs, make_layers

from fastgen.errors import UserError
from fastgen.eval.networks.towers import hash_at_hand
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

LARGEST = 256
"""Larger pictures are reduced so that the shorter side has this many pixels: the weights were fitted on small patches."""

HEADS = Weights(URL_VGG16_LPIPS.rsplit("/", 1)[1], URL_VGG16_LPIPS)
TRUNK = Weights("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", sha256="397923af")
CHANNELS = (64, 128, 256, 512, 512)
ENDS = (4, 9, 16, 23, 30)
"""Where VGG-16's layers are cut: after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""


class Lpips(nn.Module):
    """The network without weights."""

    def __init__(self) -> None:
        super().__init__()
        layers = make_layers(cfgs["D"], batch_norm=False)
        self.slices = nn.ModuleList(layers[a:b] for a, b in zip((0, *ENDS), ENDS, strict=False))
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(channels)) for channels in CHANNELS)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] of uint8 images [B, 3, H, W], a unit vector in every place."""
        x = SampleSimilarityLPIPS.normalize(images)
        if (shorter := min(x.shape[-2:])) > LARGEST:
            size = [round(side * LARGEST / shorter) for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="area")
        maps = []
        for layers in self.slices:
            x = layers(x)
            maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """LPIPS of each pair, from maps [B, C, h, w] (one of the two may have B = 1): [B]."""
        layers = zip(a, b, self.heads, strict=True)
        return torch.stack([torch.einsum("bchw,c->bhw", (x - y).square(), w).mean((1, 2)) for x, y, w in layers]).sum(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of each pair of uint8 images [B, 3, H, W]: [B]."""
        return self.distance(self.features(a), self.features(b))


def hashes(world: World) -> dict[str, str | None]:
    """SHA-256 of the two files of weights, where they are at hand."""
    return {weights.file: hash_at_hand(weights, world) for weights in (HEADS, TRUNK)}


@lru_cache(maxsize=1)
def load_lpips(world: World, device: str = "cpu") -> Lpips:
    """The network with its weights. Raises UserError where a file is missing, or is not what its name says."""
    heads, trunk = (locate(weights, world, what="LPIPS") for weights in (HEADS, TRUNK))
    layers, weights = read_tensors(trunk), read_tensors(heads)
    network, state = Lpips(), {}
    for name, own in network.state_dict().items():
        place = name.split(".", 2)
        ours = place[0] == "slices"
        found = layers.get(f"features.{place[2]}") if ours else weights.get(f"lin{place[1]}.model.1.weight")
        if not isinstance(found, Tensor) or found.numel() != own.numel():
            raise UserError(f"{trunk if ours else heads} does not hold what LPIPS needs: {name} is missing or of another shape")
        state[name] = found.float().reshape(own.shape)
    network.load_state_dict(state)
    return network.to(device)
