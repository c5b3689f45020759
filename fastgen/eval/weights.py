"""Where the weights of measuring networks are found: a folder of the user's, the caches of Hugging Face and torch, the network.

Nothing here unpickles: what is given back is a path. Files that are pickles by origin are read with `read_tensors`, by torch's
loader that takes tensors alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgen.errors import UserError
from fastgen.eval.world import World

ANONYMOUS = frozenset({"model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "config.json", "vocab.txt"})
"""Names that many repositories give to different files: looked for under "owner/name/" alone."""


@dataclass(frozen=True)
class Weights:
    """A file that a measuring network needs.

    `origin` is a repository of the Hugging Face hub ("owner/name") or the address of the file itself; `file` its name there.
    `sha256` are the first digits of its hash, where they are known: another file of that name is refused.
    """

    file: str
    origin: str
    sha256: str = ""

    @property
    def address(self) -> str:
        """Where a person downloads it."""
        return self.origin if "://" in self.origin else f"https://huggingface.co/{self.origin}/resolve/main/{self.file}"


def locate(weights: Weights, world: World, *, what: str) -> Path:
    """The file on this machine; `what` names the network in sentences.

    Looked for in `world.weights` (under "owner/name/file", or by a telling name), in the caches, and, unless the world is
    offline, at its origin. Raises UserError where it is nowhere, naming the file, where it comes from and where to put it, and
    where its hash is another one.
    """
    path = _in_folder(weights, world.weights) or _in_caches(weights) or _download(weights, world, what)
    if weights.sha256 and not file_hash(path).startswith(weights.sha256):
        raise UserError(f"{path} is not the {what} of {weights.origin}: its SHA-256 does not begin with {weights.sha256}")
    return path


def _in_folder(weights: Weights, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    places = [folder / weights.origin / weights.file]
    if Path(weights.file).name not in ANONYMOUS:
        places.append(folder / Path(weights.file).name)
    return next((place for place in places if place.is_file()), None)


def _in_caches(weights: Weights) -> Path | None:
    if "://" in weights.origin:
        path = torch_cache(weights)
        return path if path.is_file() else None
    found = try_to_load_from_cache(weights.origin, weights.file)
    return Path(found) if isinstance(found, str) else None


def torch_cache(weights: Weights) -> Path:
    """Where torch keeps a file of that name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.file).name


def _download(weights: Weights, world: World, what: str) -> Path:
    wanted = Path(weights.file).name
    if world.offline:
        if wanted in ANONYMOUS:
            wanted = f"{weights.origin}/{weights.file}"
        place = f"put {wanted} into the folder {world.weights}" if world.weights else f"name a folder with {wanted} as weights"
        raise UserError(f"the weights of {what} are missing ({weights.address}): {place}, or evaluate once without offline")
    try:
        if "://" not in weights.origin:
            return Path(hf_hub_download(weights.origin, weights.file))
        path = torch_cache(weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.origin, str(path), hash_prefix=weights.sha256 or None, progress=False)
        return path
    except (OSError, RuntimeError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"the weights of {what} cannot be downloaded from {weights.address}: {error}") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a torch file of tensors alone. Raises UserError for anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError, EOFError) as error:
        raise UserError(f"{path} cannot be read as tensors alone, and nothing else is read: {error}") from error
    return found


def file_hash(path: Path | str | os.PathLike) -> str:
    """SHA-256 of a file's content; kept for a file that has not changed since."""
    status = os.stat(path)
    return _hash_of(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _hash_of(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
