"""Feature vectors by torch-fidelity's extractors: Inception for photographs, our scene reader for the toy world.

The toy extractor is registered with torch-fidelity as `fastgen-toy`, so that `torch_fidelity.calculate_metrics(...,
feature_extractor="fastgen-toy")` works too. Its numbers are no Inception distances and are never printed as FID or KID.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from fastgen.data.toy.reader import WEIGHTS as READER_WEIGHTS
from fastgen.data.toy.reader import shipped_reader
from fastgen.errors import UserError
from fastgen.eval.images import Images, from_uint8
from fastgen.eval.weights import file_hash
from fastgen.eval.world import INCEPTION, TOY_FEATURES, World

INCEPTION_HASH = "6726825d"
"""First digits of the SHA-256 of torch-fidelity's Inception weights. They are a pickle: nothing else is ever unpickled."""


DAMAGE_WEIGHT = 40.0
"""How far full damage of one kind moves an image: unrelated scenes are sqrt(2 * 160) = 18 apart, near ones about 10."""


class ToyFeatures(torch_fidelity.FeatureExtractorBase):
    """The scene reader as a torch-fidelity extractor of uint8 [B, 3, 32, 32].

    It provides `scene` [B, 160], the reader's features, and `scene+damage` [B, 167], with the damage it sees appended.
    Precision and recall use the second: toy scenes have so many combinations that the neighbourhoods of `scene` alone are wide
    enough to take in mush.
    """

    layers: ClassVar[tuple[str, ...]] = ("scene", "scene+damage")

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.reader = shipped_reader()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ToyFeatures.layers

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return ToyFeatures.layers[metric == "prc"]

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(4, 3, 32, 32, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        scene, damage = self.reader.measures(from_uint8(images))
        found = {"scene": scene, "scene+damage": torch.cat([scene, DAMAGE_WEIGHT * damage], 1)}
        return tuple(found[layer] for layer in self.features_list)


if TOY_FEATURES not in FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor(TOY_FEATURES, ToyFeatures)


class _Images(Dataset):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index : index + 1][0]


@lru_cache(maxsize=2)
def extractor(world: World, device: str = "cpu") -> nn.Module:
    """The world's feature extractor, ready. Raises UserError when its name is unknown or its weights are not at hand."""
    if world.features not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
        raise UserError(f"no feature extractor is called {world.features!r}; torch-fidelity knows {known}")
    weights = world.features_weights
    if world.features == INCEPTION:
        weights = inception_weights(world)
    layers = sorted(set(metric_layers(world).values()))
    path = None if weights is None else str(weights)
    try:
        made: nn.Module = create_feature_extractor(
            world.features, layers, cuda=False, feature_extractor_weights_path=path, verbose=False
        )
    except OSError as error:  # URLError among them
        raise UserError(f"the weights of the feature extractor {world.features!r} cannot be loaded: {error}") from error
    return made.to(device)


def metric_layers(world: World) -> dict[str, str]:
    """Which layer of the world's extractor the distances (`fid`) and precision and recall (`prc`) look at."""
    registered = FEATURE_EXTRACTORS_REGISTRY[world.features]
    return {metric: registered.get_default_feature_layer_for_metric(metric) for metric in ("fid", "prc")}


def inception_weights(world: World) -> Path:
    """torch-fidelity's Inception weights on disk, checked by hash; downloaded when the world is not offline."""
    name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    path = world.features_weights or Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        if world.offline:
            raise UserError(f"Inception weights are missing: put {URL_INCEPTION_V3} at {path}, or evaluate without offline")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_HASH, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"Inception weights cannot be downloaded from {URL_INCEPTION_V3} to {path}: {error}") from error
    if not file_hash(path).startswith(INCEPTION_HASH):
        raise UserError(
            f"{path} is not torch-fidelity's Inception: its SHA-256 does not begin with {INCEPTION_HASH}; delete it"
        )
    return path


def features_hash(world: World) -> str | None:
    """SHA-256 of the weights that the features come from, or None where they are not one known file."""
    if world.features == TOY_FEATURES:
        return file_hash(READER_WEIGHTS / "model.safetensors")
    if world.features == INCEPTION:
        return file_hash(inception_weights(world))
    return file_hash(world.features_weights) if world.features_weights is not None else None


def extract(images: Images, world: World, *, device: str = "cpu", name: str = "images") -> dict[str, Tensor]:
    """Features [N, D] in float64 of uint8 images [N, 3, H, W] for `fid` and `prc`, by torch-fidelity's own loop.

    Raises UserError when a feature is NaN or infinite; `name` says in the sentence which set it was.
    """
    network = extractor(world, device)
    if world.features == TOY_FEATURES and images.shape[2:] != (32, 32):
        raise UserError(f"toy features read 32 x 32 pictures, but {name} are {images.shape[3]} x {images.shape[2]}")
    cuda = device.startswith("cuda")
    # `save_cpu_ram` keeps torch-fidelity from starting worker processes: the images are in memory already.
    found = get_featuresdict_from_dataset(_Images(images), network, 128, cuda, save_cpu_ram=True, verbose=False)
    features = {metric: found[layer].flatten(1).double() for metric, layer in metric_layers(world).items()}
    for values in features.values():
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).any(1).sum())
            raise UserError(f"the features of {bad} of {len(images)} {name} are NaN or infinite; no distance can be computed")
    return features
