"""Loading a diffusers pipeline from a folder or the hub, with every mistake told in one sentence.

Weights are read from safetensors files alone, and no code that comes with a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from fastgen.adapters import LoraOptions
from fastgen.errors import UserError
from fastgen.pipelines.base import Mode, Pipeline, network_name


def load_pipeline(
    path: str,
    *,
    roles: Mapping[str, Mode] | None = None,
    lora: LoraOptions | None = None,
    teacher_loras: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    offline: bool = False,
    gradient_checkpointing: bool = False,
    height: int | None = None,
    width: int | None = None,
) -> Pipeline:
    """A diffusers pipeline folder, or a name on the hub, ready to distil.

    `roles` says which roles are trained in full and which as LoRA adapters on the shared base (default: all in full).
    `teacher_loras` are diffusers LoRA files that become part of the teacher. Raises UserError for whatever cannot be loaded.
    """
    source = _folder(path)
    options: dict[str, Any] = {}
    if source is not None:
        options = _check_index(source)
    elif offline:
        options["local_files_only"] = True
    try:
        loaded = diffusers.DiffusionPipeline.from_pretrained(
            *(str(source or path),), torch_dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError, SafetensorError) as problem:
        raise _load_error(path, source, offline, problem) from problem
    loaded = loaded.to(device)
    for file in teacher_loras:
        fuse_lora(loaded, file)
    try:
        return Pipeline.wrap(
            loaded, roles=roles, lora=lora, gradient_checkpointing=gradient_checkpointing, height=height, width=width
        )
    except UserError as problem:
        raise UserError(f"pipeline {path!r}: {problem}") from problem


def _folder(path: str) -> Path | None:
    """The local folder that `path` names, or None for a name on the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"pipeline {path!r} is a file; give the folder that holds model_index.json")
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or path.endswith("/"):
        raise UserError(f"pipeline {path!r} does not exist; give a diffusers pipeline folder or a hub name such as owner/model")
    return None


def _check_index(folder: Path) -> dict[str, Any]:
    """Options for loading `folder`. Raises UserError where it is not a whole pipeline of a stock class."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} is not a pipeline's index: it must be a JSON object with a _class_name") from problem
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise UserError(f"{file} has _class_name {name!r}, which diffusers {diffusers.__version__} does not know")
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if entry[0] not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, str(entry[0])):
            raise UserError(f"{file} loads {component} from {entry[0]!r}; only diffusers and transformers components are loaded")
        if component != "safety_checker" and not (folder / component).is_dir():
            raise UserError(f"{folder} lacks the component {component!r} that its model_index.json names")
    # The checker of images is of no use in training and often comes pickled.
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}


def _load_error(path: str, source: Path | None, offline: bool, problem: Exception) -> UserError:
    reason = " ".join(str(problem).split())[:300] or type(problem).__name__
    if source is not None:
        if pickled := [file for file in source.glob("*/*.bin") if not list(file.parent.glob("*.safetensors"))]:
            return UserError(f"{pickled[0]} is pickled and is not read; convert it to safetensors and load {path!r} again")
        return UserError(f"pipeline {path!r} cannot be loaded: {reason}")
    if offline:
        return UserError(f"pipeline {path!r} is neither a local folder nor in the hub's cache, and offline mode forbids a download")
    return UserError(f"pipeline {path!r} is not a local folder and cannot be loaded from the hub: {reason}")


def fuse_lora(pipeline: Any, file: str) -> None:
    """Merge a diffusers LoRA into the weights of `pipeline`. Raises UserError where the file does not fit it whole."""
    path = Path(file).expanduser()
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(f"teacher LoRA {file!r} must be an existing .safetensors file")
    try:
        with safe_open(path, framework="pt") as reader:
            expected = sum(_is_factor(key) for key in reader.keys())  # noqa: SIM118: not a mapping
    except SafetensorError as problem:
        raise UserError(f"teacher LoRA {file!r} is not a safetensors file: {problem}") from problem
    name = network_name(pipeline)
    mismatch = UserError(f"teacher LoRA {file!r} does not fit the {name} of {type(pipeline).__name__}")
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="teacher", local_files_only=True)
    except (ValueError, RuntimeError, KeyError, AttributeError, IndexError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise UserError(f"{mismatch}: {reason}") from problem
    loaded = sum(
        _is_factor(key) and ".teacher." in key
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
        for key in component.state_dict()
    )
    if loaded == 0 or loaded != expected:
        raise UserError(f"{mismatch}: of its {expected} LoRA tensors {loaded} have a place there")
    pipeline.fuse_lora(components=[c for c in pipeline._lora_loadable_modules if getattr(pipeline, c, None) is not None])
    pipeline.unload_lora_weights()


def _is_factor(key: str) -> bool:
    """Whether a weight is one of LoRA's two low-rank factors, under any of its names."""
    return any(part in key for part in (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "_lora.down.", "_lora.up."))
