"""Feature vectors by torch-fidelity's extractors: Inception for photographs (or DINOv2, VGG), our scene reader for the toy
world.

Pictures pass once, in batches: mean and covariance are of all of them, the first `ROWS` feature vectors are kept for metrics
that look at neighbours, kernels or pairs. The pictures go in as uint8 and the extractor resizes them itself, so that the
features are torch-fidelity's own.

The toy extractor is registered with torch-fidelity as `fastgen-toy`, so that `torch_fidelity.calculate_metrics(...,
feature_extractor="fastgen-toy")` works too. Its numbers are no Inception distances and are never printed as FID or KID.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch_fidelity
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from fastgen.data.toy.reader import WEIGHTS as READER_WEIGHTS
from fastgen.data.toy.reader import shipped_reader
from fastgen.errors import UserError
from fastgen.eval.dinov2 import SIZES as DINO
from fastgen.eval.dinov2 import dino_features, dino_weights
from fastgen.eval.images import Images, batches, from_uint8
from fastgen.eval.inception_score import Splits
from fastgen.eval.moments import Moments
from fastgen.eval.weights import Weights, file_hash, locate, read_tensors
from fastgen.eval.world import INCEPTION, TOY_FEATURES, World

ROWS = 10_000
"""Feature vectors of a set that are kept; mean and covariance are of all."""
BATCH = 128
VGG = "vgg16"
ORIGINS = {
    INCEPTION: Weights(URL_INCEPTION_V3.rsplit("/", 1)[1], URL_INCEPTION_V3, "6726825d"),
    VGG: Weights("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    **{name: dino_weights(name) for name in DINO},
}
"""Where the weights of torch-fidelity's extractors come from. The first two are checked by hash and for holding only
tensors."""


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


@dataclass(frozen=True)
class Embedded:
    """What is kept of the features of a set.

    `moments` [D] of all pictures for the Fréchet distance, `rows` [min(N, ROWS), D] of the first ones for distances (`fid`)
    and for neighbourhoods (`prc`), as the network gives them, and `splits`, what the Inception score takes, where there are
    classes.
    """

    moments: Moments
    rows: dict[str, Tensor]
    splits: Splits | None = None

    @classmethod
    def of(cls, features: Mapping[str, Tensor], rows: int = ROWS) -> Embedded:
        """Of features [N, D] that were computed before, as `extract` gives them."""
        return cls(Moments.of(features["fid"]), {metric: values[:rows] for metric, values in features.items()})


class Extraction:
    """Features of pictures that come batch by batch, from a folder or as they are made; `embedded` gives what came so far.

    `name` says in sentences which set it is; `total`, where it is known, is what the Inception score's splits are cut from; of
    `rows` pictures the vectors are kept.

    Raises UserError when the extractor is unknown or its weights are not at hand.
    """

    def __init__(
        self, world: World, *, device: str = "cpu", name: str = "images", total: int | None = None, rows: int = ROWS
    ) -> None:
        self.world, self.device, self.name, self.keep = world, device, name, rows
        self.network = extractor(world, device)
        self.layers = metric_layers(world)
        self.seen, self.total = 0, total
        self._moments: Moments | None = None
        self._splits: Splits | None = None
        self._rows: dict[str, Tensor] = {}

    def add(self, images: Tensor) -> None:
        """Take uint8 [B, 3, H, W] in. Raises UserError when a feature is not finite, or the pictures are no toy scenes'
        size."""
        found = self.features(images)
        values = found[self.layers["fid"]]
        self._moments = (self._moments or Moments(values.shape[1])).add(values)
        if self.seen < self.keep:
            for layer in {self.layers["fid"], self.layers["prc"]}:
                self._keep(layer, found[layer])
        if "isc" in self.layers and self.total is not None:
            logits = found[self.layers["isc"]]
            self._splits = self._splits or Splits(self.total, logits.shape[1])
            self._splits.add(logits)
        self.seen += len(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The network's features by layer, [B, D] on the CPU, checked; nothing of them is kept."""
        if self.world.features == TOY_FEATURES and images.shape[2:] != (32, 32):
            shown = f"{images.shape[3]} x {images.shape[2]}"
            raise UserError(f"toy features read 32 x 32 pictures, but {self.name} are {shown}")
        outputs = self.network(images.to(self.device, non_blocking=True))
        found = {layer: values.flatten(1).cpu() for layer, values in zip(layer_list(self.world), outputs, strict=True)}
        finite = torch.stack([torch.isfinite(values).all(1) for values in found.values()]).all(0)
        if not finite.all():
            bad = f"{int((~finite).sum())} of {len(images)} {self.name}"
            where = f" (the ones from number {self.seen} on)" if self.seen else ""
            raise UserError(f"the features of {bad}{where} are NaN or infinite; no distance can be computed")
        return found

    def _keep(self, layer: str, values: Tensor) -> None:
        if layer not in self._rows:  # the system gives memory as it is written to
            room = self.keep if self.total is None else min(self.keep, self.total)
            self._rows[layer] = values.new_empty(room, values.shape[1])
        kept = self._rows[layer][self.seen : self.seen + len(values)]
        kept.copy_(values[: len(kept)])

    def embedded(self) -> Embedded:
        """Of all that came. Raises UserError when nothing came."""
        if self._moments is None:
            raise UserError(f"there are no {self.name} to take features of")
        kept = {layer: rows[: self.seen] for layer, rows in self._rows.items()}
        rows = {metric: kept[self.layers[metric]] for metric in ("fid", "prc")} if kept else {}
        return Embedded(self._moments, rows, self._splits)


def embed(
    images: Images, world: World, *, device: str = "cpu", name: str = "images", rows: int = ROWS, batch: int = BATCH
) -> Embedded:
    """What is kept of a set, in one pass over it. Arguments and errors as of `Extraction`."""
    extraction = Extraction(world, device=device, name=name, total=len(images), rows=rows)
    for shown in batches(images, batch):
        extraction.add(shown)
    return extraction.embedded()


def extract(
    images: Images, world: World, *, device: str = "cpu", name: str = "images", batch: int = BATCH
) -> dict[str, Tensor]:
    """All features [N, D] in float64 for `fid` and `prc`. Errors as of `Extraction`."""
    extraction = Extraction(world, device=device, name=name)
    parts = [extraction.features(shown) for shown in batches(images, batch)]
    layers = {metric: extraction.layers[metric] for metric in ("fid", "prc")}
    return {metric: torch.cat([part[layer] for part in parts]).double() for metric, layer in layers.items()}


@lru_cache(maxsize=2)
def extractor(world: World, device: str = "cpu") -> nn.Module:
    """The world's feature extractor, ready. Raises UserError when its name is unknown or its weights are not at hand."""
    name = world.features
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
        raise UserError(f"no feature extractor is called {name!r}; torch-fidelity knows {known}")
    if name in DINO:
        return dino_features(name, world, layer_list(world)).to(device)
    path = extractor_weights(world)
    if path is not None and name in ORIGINS:
        read_tensors(path)  # torch-fidelity would unpickle whatever it is
    if path is None and FEATURE_EXTRACTORS_REGISTRY[name].__module__.startswith("torch_fidelity."):
        raise UserError(f"the features {name!r} are not offered: their weights are a program, and none is run")
    file = None if path is None else str(path)
    try:
        made: nn.Module = create_feature_extractor(
            name, layer_list(world), cuda=False, feature_extractor_weights_path=file, verbose=False
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights of the feature extractor {name!r} cannot be loaded: {error}") from error
    return made.to(device)


def extractor_weights(world: World) -> Path | None:
    """The file with the extractor's weights, checked by hash; None where it has none of its own. Errors as of `locate`."""
    if world.features == TOY_FEATURES:
        return READER_WEIGHTS / "model.safetensors"
    origin = ORIGINS.get(world.features)
    if origin is None:
        return world.features_weights
    path = world.features_weights or locate(origin, world, what=f"the features {world.features}")
    if origin.sha256 and not file_hash(path).startswith(origin.sha256):
        raise UserError(
            f"{path} does not hold torch-fidelity's {world.features}: its SHA-256 does not begin with {origin.sha256}"
        )
    return path


def metric_layers(world: World) -> dict[str, str]:
    """Which layer of the extractor distances (`fid`), neighbourhoods (`prc`) and, with Inception, its score (`isc`) look at."""
    registered = FEATURE_EXTRACTORS_REGISTRY[world.features]
    used = ("fid", "prc", "isc") if world.features == INCEPTION else ("fid", "prc")
    return {metric: registered.get_default_feature_layer_for_metric(metric) for metric in used}


def layer_list(world: World) -> list[str]:
    """The layers that the extractor is asked for, in its order."""
    return sorted(set(metric_layers(world).values()))


def features_hash(world: World) -> str | None:
    """SHA-256 of the weights that the features come from, or None where they are not one known file. Errors as of `locate`."""
    path = extractor_weights(world)
    return None if path is None else file_hash(path)


def resize_mode(world: World) -> str:
    """How the extractor brings pictures to its size, and which library does it."""
    if world.features == TOY_FEATURES:
        return "none: pictures are 32 x 32"
    registered = FEATURE_EXTRACTORS_REGISTRY[world.features]
    size = getattr(registered, "INPUT_IMAGE_SIZE", None)
    if world.features not in ORIGINS or size is None:
        return f"the extractor's own ({registered.__module__})"
    version = importlib.metadata.version("torch-fidelity")
    return f"bilinear as in TensorFlow 1, without antialiasing, to {size} x {size}, by torch-fidelity {version}"


def features_protocol(world: World) -> dict[str, Any]:
    """All of the features that could change a distance: extractor, hash of its weights, layers, resize, how many are kept.

    Raises UserError when the weights are not at hand.
    """
    return {
        "features": world.features,
        "features_sha256": features_hash(world),
        "layers": metric_layers(world),
        "resize": resize_mode(world),
        "rows": ROWS,
    }


def shown_label(label: str, features: str) -> str:
    """The label of a distance by an extractor as readers know it: with Inception's features FID and KID, else what it is."""
    if features != INCEPTION:
        return label
    return label.replace("Fréchet distance", "FID").replace("Kernel distance", "KID")
