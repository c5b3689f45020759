"""Loading a diffusers pipeline from a folder or the hub, with every mistake told in one sentence.

Weights are read from safetensors files alone, and no code that comes with a model is run.
"""

from __future__ import annotations

import inspect
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fastgen.adapters import LoraOptions
from fastgen.errors import UserError
from fastgen.pipelines.base import Mode, Pipeline, network_name
from fastgen.pipelines.fine_tune import replace_network
from fastgen.pipelines.gamma_flow import own_class
from fastgen.pipelines.offloading import Offload, offload_components
from fastgen.pipelines.quantization import Format, check_formats, quantize_network

Builder = Callable[[Path, torch.dtype], Any]
"""Makes a diffusers pipeline object from a folder, with weights of that precision."""

_builder: ContextVar[Builder | None] = ContextVar("builder", default=None)


@contextmanager
def built_by(builder: Builder) -> Iterator[None]:
    """Within, `load_pipeline` has its pipeline from `builder` and reads no weights; of a hub's model, configurations alone."""
    before = _builder.set(builder)
    try:
        yield
    finally:
        _builder.reset(before)


def load_pipeline(
    path: str,
    *,
    roles: Mapping[str, Mode] | None = None,
    lora: LoraOptions | None = None,
    teacher_weights: str = "",
    teacher_loras: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantize: Literal["none"] | Format = "none",
    offload: Offload = "none",
    device: torch.device | str = "cpu",
    offline: bool = False,
    gradient_checkpointing: bool = False,
    height: int | None = None,
    width: int | None = None,
) -> Pipeline:
    """A diffusers pipeline folder, or a name on the hub, ready to distil.

    `roles` says which roles are trained in full and which as LoRA adapters on the shared base; one that is not named goes as
    the student does, and the student in full where it is not named either.
    `teacher_weights` is a fine-tuned network in the place of the pipeline's (see `replace_network`), `teacher_loras` are
    diffusers LoRA files; both become part of the teacher. `quantize` reduces the base's weights, where every role is an adapter
    (see `fastgen.pipelines.quantization`), `offload` keeps text encoders and autoencoder in the CPU's memory (see
    `fastgen.pipelines.offloading`). Raises UserError for whatever cannot be loaded.
    """
    import diffusers

    source = _folder(path)
    builder = _builder.get()
    if quantize != "none":
        _check_roles(quantize, roles or {})
        if builder is None:
            check_formats(quantize)
    options: dict[str, Any] = {}
    if source is not None:
        options = check_index(source)
    elif offline:
        options["local_files_only"] = True
    try:
        if builder is not None:
            loaded = builder(source or _configurations(path, offline), dtype)
        else:
            kind = own_class(source) if source is not None else None
            if kind is not None and roles:
                raise UserError(
                    f"pipeline {path!r} is a student with gamma sampling of its own, which can be sampled and measured but not "
                    "be a teacher; name the pipeline that it was distilled from"
                )
            loaded = (kind or diffusers.DiffusionPipeline).from_pretrained(
                *(str(source or path),), dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError, SafetensorError) as problem:
        raise _load_error(path, source, offline, problem) from problem
    if builder is None:  # What is merely planned stays where it is, and what becomes part of the teacher weighs nothing.
        if quantize == offload == "none":
            loaded = loaded.to(device)
        if teacher_weights:
            replace_network(loaded, teacher_weights)
        for file in teacher_loras:
            fuse_lora(loaded, file)
    network = getattr(loaded, network_name(loaded))
    if quantize != "none":
        quantize_network(network, quantize, device if builder is None else "cpu")
    if builder is None and offload != "none":
        network.to(device)
        offload_components(loaded, network, device)
    elif builder is None:
        loaded = loaded.to(device)
    check_size(path, network, loaded, height, width)
    try:
        return Pipeline.wrap(
            loaded, roles=roles, lora=lora, gradient_checkpointing=gradient_checkpointing, height=height, width=width
        )
    except UserError as problem:
        raise UserError(f"pipeline {path!r}: {problem}") from problem
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as problem:
        sized = isinstance(problem, ValueError) and (height or width)  # Who asked for the size names it.
        if sized or not from_library(problem):
            raise
        kind = type(loaded).__name__
        raise UserError(f"pipeline {path!r}: this {kind} does not run from prompts alone: {_one_line(problem)}") from problem


def _check_roles(quantize: str, roles: Mapping[str, Mode]) -> None:
    """Raise UserError where a role is trained in full, since it begins as a copy of the base."""
    for role, mode in {"student": "full", **roles}.items():
        if mode != "lora":
            raise UserError(
                f'quantize = "{quantize}" is for a base that is not trained, but roles.{role} = "{mode}"; '
                f'set roles.{role} = "lora", or quantize = "none"'
            )


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


def check_index(folder: Path, *, as_teacher: bool = True) -> dict[str, Any]:
    """Options for loading `folder`, `as_teacher` or to be sampled.

    Raises UserError where it is not a whole pipeline of a stock class.
    """
    import diffusers

    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} is not a pipeline's index: it must be a JSON object with a _class_name") from problem
    kind = own_class(folder, as_teacher=as_teacher) or (getattr(diffusers, name, None) if isinstance(name, str) else None)
    if kind is None:
        raise UserError(f"{file} has _class_name {name!r}, which diffusers {diffusers.__version__} does not know")
    stock = isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    if not stock and not hasattr(kind, "_backends"):  # Some hide where an optional package is missing; loading names it.
        raise UserError(f"{file} has _class_name {name!r}, which is no pipeline; give a whole pipeline's folder")
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if entry[0] not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, str(entry[0])):
            raise UserError(f"{file} loads {component} from {entry[0]!r}; it must be diffusers or transformers")
        if component != "safety_checker" and not (folder / component).is_dir():
            raise UserError(f"{folder} lacks the component {component!r} that its model_index.json names")
    absent = [
        key for key in (_needed(kind) if stock else []) if not isinstance(index.get(key), list) or index[key][:1] == [None]
    ]
    if absent:
        raise UserError(f"{folder} lacks the component {absent[0]!r}, which a {kind.__name__} needs")
    # The checker of images is of no use in training and often comes pickled.
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}


def _needed(kind: Any) -> list[str]:
    """The components that a pipeline class cannot do without."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return [each.name for each in parameters if each.default is each.empty and each.name not in kind._optional_components]


def check_size(path: str, network: Any, pipeline: Any, height: int | None, width: int | None) -> None:
    """Raise UserError for a size beyond the places that a network has learned, as SD3's has a fixed number."""
    from diffusers.models.embeddings import PatchEmbed

    embedding, factor = getattr(network, "pos_embed", None), getattr(pipeline, "vae_scale_factor", 8)
    if not isinstance(embedding, PatchEmbed) or not embedding.pos_embed_max_size:
        return
    most = embedding.pos_embed_max_size * embedding.patch_size * factor
    for key, pixels in (("height", height), ("width", width)):
        if pixels is not None and pixels > most:
            raise UserError(f"{key} = {pixels} is more than the {most} pixels that the network of {path!r} has places for")


def from_library(problem: Exception) -> bool:
    """Whether an error was raised in diffusers' or transformers' code, by what it was given, not in ours."""
    frames = traceback.extract_tb(problem.__traceback__)
    return bool(frames) and bool({"diffusers", "transformers"} & set(Path(frames[-1].filename).parts))


def _configurations(path: str, offline: bool) -> Path:
    """A folder with all of a hub's model but its weights."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.jinja"]
    folder = Path(snapshot_download(path, allow_patterns=wanted, local_files_only=offline))
    check_index(folder)
    return folder


def _load_error(path: str, source: Path | None, offline: bool, problem: Exception) -> UserError:
    reason = _one_line(problem)
    if source is not None:
        if pickled := [file for file in source.glob("*/*.bin") if not list(file.parent.glob("*.safetensors"))]:
            return UserError(f"{pickled[0]} is pickled and is not read; convert it to safetensors and load {path!r} again")
        return UserError(f"pipeline {path!r} cannot be loaded: {reason}")
    if offline:
        return UserError(
            f"pipeline {path!r} is no local folder and not in the hub's cache, and offline mode forbids a download"
        )
    return UserError(f"pipeline {path!r} is not a local folder and cannot be loaded from the hub: {reason}")


def fuse_lora(pipeline: Any, file: str) -> None:
    """Merge a diffusers LoRA into the weights of `pipeline`. Raises UserError where the file does not fit it whole."""
    path = Path(file).expanduser()
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(f"teacher LoRA {file!r} must be an existing .safetensors file")
    name = network_name(pipeline)
    network = getattr(pipeline, name)
    misfit = f"teacher LoRA {file!r} does not fit the {name} of {type(pipeline).__name__}"
    where = {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name, "local_files_only": True}
    try:
        with _silence():
            converted = pipeline.lora_state_dict(**where, unet_config=network.config)
            pipeline.load_lora_weights(**where, adapter_name="teacher")
    except SafetensorError as problem:
        raise UserError(f"teacher LoRA {file!r} is not a safetensors file: {problem}") from problem
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as problem:
        raise UserError(f"{misfit}: {_one_line(problem)}") from problem
    weights = converted[0] if isinstance(converted, tuple) else converted
    expected = {key.removeprefix(name + ".") for key in weights if key.startswith(name + ".") and _is_factor(key)}
    loaded = {key.replace(".teacher.", ".") for key in network.state_dict() if ".teacher." in key and _is_factor(key)}
    strays = expected - loaded if all(".lora_A." in key or ".lora_B." in key for key in expected) else ()
    if strays or not loaded or len(loaded) != len(expected):
        reason = f"{len(loaded)} of {len(expected)} LoRA tensors have a place"
        if strays:
            reason = f"it has no place for {min(strays)}"
        elif not expected:
            reason = f"the file holds nothing for a {name}"
        raise UserError(f"{misfit}: {reason}")
    pipeline.fuse_lora(components=[c for c in pipeline._lora_loadable_modules if getattr(pipeline, c, None) is not None])
    pipeline.unload_lora_weights()


@contextmanager
def _silence() -> Iterator[None]:
    """No log lines from diffusers: what goes wrong within is told in our own sentence."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_factor(key: str) -> bool:
    """Whether a weight is one of LoRA's two low-rank factors, under any of its names."""
    return any(part in key for part in (".lora_A.", ".lora_B.", "lora.down.", "lora.up.", ".lora_down.", ".lora_up."))


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
