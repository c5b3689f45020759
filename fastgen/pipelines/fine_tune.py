"""A fine-tuned network in a pipeline's own place: a folder, or one file, in diffusers' layout or the original one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.pipelines.base import network_name

__all__ = ["replace_network"]


def replace_network(pipeline: Any, path: str | Path) -> None:
    """Give the unet or transformer of a diffusers pipeline the weights of `path`, in its own precision and place.

    `path` is a folder with that component's safetensors files (or one that has it as a subfolder), or one .safetensors file,
    in diffusers' layout or the original one, alone or in a whole checkpoint. Raises UserError where it is not there, cannot be
    read, or is of another architecture; then nothing has changed.
    """
    place, name = Path(path).expanduser(), network_name(pipeline)
    network: nn.Module = getattr(pipeline, name)
    if place.is_dir():
        weights = read_folder(place, name, network)
    elif place.is_file() and place.suffix == ".safetensors":
        weights = read_file(place)
        if len(weights.keys() & network.state_dict().keys()) * 2 < len(network.state_dict()):
            weights = from_original(place, network, weights)
    else:
        raise UserError(f"{path}: must be an existing .safetensors file, or a folder with a fine-tuned {name}")
    check_fit(path, network, weights)
    with torch.no_grad():
        network.load_state_dict(weights)


def read_folder(folder: Path, name: str, network: nn.Module) -> dict[str, Tensor]:
    """The weights in a component's folder, or in that subfolder of a pipeline's."""
    folder = folder / name if (folder / name).is_dir() else folder
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    except (OSError, ValueError, AttributeError) as problem:
        raise UserError(f"{config}: is not a component's configuration; it must be a JSON object") from problem
    if kind is not None and kind != type(network).__name__:
        raise UserError(f"{folder}: is a {kind}, but the pipeline's {name} is a {type(network).__name__}")
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"]
    shards = [file for file in files if file.name.startswith("diffusion_pytorch_model-")]
    files = plain or shards or files
    if not files:
        raise UserError(f"{folder}: holds no .safetensors file; it must hold the weights of a {type(network).__name__}")
    return {key: value for file in files for key, value in read_file(file).items()}


def read_file(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{file}: is not a readable safetensors file ({problem})") from problem


def from_original(file: Path, network: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file in the layout of the model's first release, through diffusers' own converter."""
    from accelerate import init_empty_weights
    from diffusers.utils import logging

    kind = type(network)
    if not hasattr(kind, "from_single_file"):
        check_fit(file, network, weights)
    converted: dict[str, Tensor] = {}

    def catch(self: nn.Module, found: dict[str, Tensor], *args: Any, **options: Any) -> tuple[list[str], list[str]]:
        converted.update(found)
        return [], []

    # diffusers converts and loads in one go, and tells of keys that do not fit in a log line only.
    catcher: Any = type(kind.__name__, (kind,), {"load_state_dict": catch})
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as config, init_empty_weights():
            network.save_config(config)
            catcher.from_single_file(str(file), config=config, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        stray = next((key for key in weights if key not in network.state_dict()), "")
        raise UserError(f"{file}: does not fit a {kind.__name__}, beginning with {stray!r}: {reason}") from problem
    finally:
        logging.set_verbosity(before)
    return converted


def check_fit(path: str | Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise UserError, naming the first key that does not fit, where `weights` are not this network's."""
    own, kind = network.state_dict(), type(network).__name__
    for key, value in weights.items():
        if key not in own:
            raise UserError(f"{path}: does not fit the pipeline's {kind}, which has no {key!r}")
        if value.shape != own[key].shape:
            sizes = f"{list(value.shape)} in the file and {list(own[key].shape)} in the pipeline"
            raise UserError(f"{path}: does not fit the pipeline's {kind}: {key!r} is {sizes}")
    missing = next((key for key in own if key not in weights), None)
    if missing is not None:
        raise UserError(f"{path}: does not fit the pipeline's {kind}: it lacks {missing!r}")
