"""Mean and covariance of features on disk, so that a reference need not be kept: read in the formats in use, written in one.

Read: npz files with `mu` and `sigma` (EDM, clean-fid, pytorch-fid, guided-diffusion), torch-fidelity's own cache (`.pt`), and
ours, an npz with the same two keys, which those read too, and what they depend on: extractor, layer, hash of its weights,
resize, count. Nothing is unpickled: npz without objects, `.pt` by torch's loader that takes tensors and, here, plain arrays
alone.
"""

from __future__ import annotations

import os
from _codecs import encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from fastgen.errors import UserError
from fastgen.eval.features import features_hash, metric_layers, resize_mode
from fastgen.eval.moments import Moments
from fastgen.eval.world import World

ARRAYS = (_reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, encode)
"""What an array of numbers is made of in a file of torch's."""
TEXTS = ("features", "layer", "weights_sha256", "resize")


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to the features of a set: mean [D] and covariance [D, D] in float64, and where they come from.

    What a file does not say is None: those of other libraries hold nothing but the numbers.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    features: str | None = None
    layer: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    source: str = "statistics"

    @classmethod
    def of(cls, moments: Moments, world: World) -> Statistics:
        """Of features that the world's extractor gave."""
        layer = metric_layers(world)["fid"]
        said = features_hash(world), resize_mode(world)
        return cls(moments.mean, moments.covariance, moments.count, world.features, layer, *said)

    def save(self, path: Path | str) -> None:
        """Write an npz by way of a temporary name."""
        path = Path(path)
        texts = {name: value for name in TEXTS if (value := getattr(self, name)) is not None}
        numbers: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            numbers["count"] = self.count
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **numbers, **texts)
        os.replace(temporary, path)

    def check(self, world: World) -> list[str]:
        """Sentences about what the file leaves open. Raises UserError when it belongs to other features than the world's."""
        if self.features is not None and self.features != world.features:
            raise UserError(
                f"{self.source} holds statistics of {self.features} features, but the images are measured with {world.features}"
            )
        layer = metric_layers(world)["fid"]
        if self.layer is not None and self.layer != layer:
            raise UserError(f"{self.source} holds statistics of layer {self.layer}, but distances look at layer {layer}")
        hashes = self.weights_sha256, features_hash(world)
        if None not in hashes and hashes[0] != hashes[1]:
            raise UserError(f"{self.source} was made with other weights of {world.features}: their SHA-256 is {hashes[0]}")
        if self.resize is not None and self.resize != resize_mode(world):
            return [
                f"The pictures of {self.source} were resized otherwise ({self.resize}): the distance holds that difference too."
            ]
        if self.features is None:
            return [
                f"{self.source} does not say which features it is of, nor how its pictures were resized; compare with care."
            ]
        return []

    def check_width(self, width: int) -> None:
        """Raises UserError when features of `width` cannot be compared with these."""
        if len(self.mean) != width:
            raise UserError(f"{self.source} holds statistics of {len(self.mean)} features, but the extractor gives {width}")


def read_statistics(path: Path | str) -> Statistics:
    """The statistics of a file. Raises UserError when it cannot be read, or holds no mean and covariance."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file of statistics; give an .npz with mu and sigma")
    if path.suffix == ".npz":
        found = _read_npz(path)
    elif path.suffix in (".pt", ".pth"):
        found = _read_torch(path)
    else:
        raise UserError(f"{path} is not read: statistics are .npz files with mu and sigma, or torch-fidelity's .pt")
    missing = [key for key in ("mu", "sigma") if key not in found]
    if missing:
        raise UserError(f"{path} holds no {' and '.join(missing)}, but {', '.join(sorted(found)) or 'nothing'}")
    mean, covariance = (torch.from_numpy(np.array(found[key], dtype=np.float64)) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise UserError(f"mu and sigma of {path} have the shapes {shapes}; they should be [D] and [D, D]")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{path} holds NaN or infinity")
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * covariance.abs().max().item()):
        raise UserError(f"sigma of {path} is no covariance: it is not symmetric")
    count = int(found["count"]) if "count" in found else None
    said = {name: str(found[name]) for name in TEXTS if name in found} or _said_by_name(path)
    return Statistics(mean, (covariance + covariance.T) / 2, count, source=str(path), **said)


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if key in ("mu", "sigma", "count", *TEXTS)}
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise UserError(f"{path} cannot be read as an npz of numbers: {error}") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(list(ARRAYS)):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as arrays alone, and nothing else is read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mu and sigma, but a {type(found).__name__}")
    return found


def _said_by_name(path: Path) -> dict[str, str]:
    """torch-fidelity's cache names extractor and layer in the file's name: `<input>-<extractor>-stat-fid-<layer>.pt`."""
    for name in FEATURE_EXTRACTORS_REGISTRY:
        _, mark, layer = path.stem.partition(f"-{name}-stat-fid-")
        if mark:
            return {"features": name, "layer": layer}
    return {}
