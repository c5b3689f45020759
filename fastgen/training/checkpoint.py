"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

A checkpoint is written under a hidden name beside its place, flushed to disk, and renamed. `manifest.json` holds the size and
SHA-256 of every other file, so that a truncated or altered file is found, and named, before anything is loaded. Nothing is ever
unpickled.

Sharded tensors are written whole, gathered one by one, in the same files: any number of processes can go on from them, sharded
or not. torch's distributed checkpoints are not used because their `.metadata` is a pickle, which runs what it is told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgen.errors import UserError
from fastgen.training.launch import rank
from fastgen.training.sharding import part_like, whole

__all__ = [
    "Unwritable",
    "abandon",
    "begin",
    "choose",
    "find",
    "finish",
    "latest_good",
    "read",
    "read_state",
    "restore",
    "verify",
    "weights_of",
    "write",
]

STATE, MANIFEST = "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
PART = re.compile(r"\w[\w.-]*")
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


class Unwritable(UserError):
    """A checkpoint could not be written: the disk is full or forbidden. What was there before is whole."""


# -- writing --------------------------------------------------------------------------------------


def begin(folder: Path, step: int) -> Path:
    """A new, hidden folder for the checkpoint of `step` in `folder`; what an interrupted write left there is removed."""
    partial = folder / f".step-{step:08d}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        partial.mkdir()
    except OSError as error:
        raise unwritable(folder, error) from error
    return partial


def write(partial: Path, name: str, tensors: Mapping[str, Tensor], *, gather_only: bool = False) -> None:
    """Add `name`.safetensors to a checkpoint that was begun; where a tensor is sharded, all processes do so together.

    `gather_only`: write nothing, but take part in gathering what is sharded. Raises UserError for a name that would lead out of
    the folder, Unwritable where the disk refuses.
    """
    if not PART.fullmatch(name):
        raise UserError(f"{name!r} cannot be the name of a file; give the player a name of letters, digits, '_', '.' and '-'")
    path = partial / f"{name}.safetensors"
    try:
        if is_sharded(tensors):
            write_whole(path, tensors, rank() == 0 and not gather_only)
        elif gather_only:
            return
        else:
            save_file(apart(tensors), path)
            flush(path)
    except (OSError, SafetensorError) as error:
        raise unwritable(partial.parent, error) from error


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every process has to take part in writing these."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write_whole(path: Path, tensors: Mapping[str, Tensor], here: bool) -> None:
    """Gather sharded tensors one at a time, which bounds the memory; the process that is told `here` writes them to `path`.

    A safetensors file is the length of a header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every
    tensor), and the tensors' bytes. A process that cannot write still gathers, so that the others do not wait for it for ever.
    """
    header: dict[str, Any] = {}
    place = 0
    names = sorted(tensors)
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    failed: OSError | None = None
    if here:
        try:
            path.write_bytes(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            failed = error
    for name in names:
        value = whole(tensors[name])
        if here and not failed:
            try:
                with path.open("ab") as file:
                    file.write(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            except OSError as error:
                failed = error
    if failed:
        raise failed
    if here:
        flush(path)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another, which safetensors refuses."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        result[key] = value.clone() if place in seen and value.numel() else value
        seen.add(place)
    return result


def finish(partial: Path, state: Mapping[str, Any], texts: Mapping[str, str] | None = None, *, keep: int = 0) -> Path:
    """Complete a checkpoint that was begun: `state` (JSON), `texts` (file name to content), manifest, rename.

    Only the `keep` newest checkpoints stay; 0 keeps all.
    """
    folder = partial.parent
    final = folder / partial.name.removeprefix(".").removesuffix(".partial")
    try:
        for name, text in {STATE: json.dumps(state, indent=1), **(texts or {})}.items():
            (partial / name).write_text(text, encoding="utf-8")
            flush(partial / name)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        flush(partial / MANIFEST)
        flush(partial)
        if final.exists():
            final.rename(folder / f".{final.name}.old")
        partial.rename(final)
        flush(folder)
        for old in find(folder.parent)[:-keep] if keep else ():
            old.rename(folder / f".{old.name}.old")  # Half removed, it would look like a broken checkpoint.
        for old in folder.glob(".step-*.old"):
            shutil.rmtree(old)
    except OSError as error:
        raise unwritable(folder, error) from error
    return final


def abandon(partial: Path) -> None:
    """Remove a checkpoint that was begun and cannot be finished: on a full disk its files are in the way."""
    shutil.rmtree(partial, ignore_errors=True)


def unwritable(path: Path, error: Exception) -> Unwritable:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Unwritable(f"{path}: cannot be written ({reason}); free some space there or choose another --output")


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- finding --------------------------------------------------------------------------------------


def find(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; not whether they are whole."""
    folder = run / "checkpoints"
    paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """The number of updates done when a checkpoint was written, by its name."""
    found = NAME.fullmatch(path.name)
    if not found:
        raise UserError(f"{path}: is not a checkpoint; give a folder such as RUN/checkpoints/step-00000040")
    return int(found[1])


def verify(path: Path) -> None:
    """Raise `UserError` naming the first file of a checkpoint that is missing or is not what was written."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        pairs = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        known = "holds no checkpoint" if not path.is_dir() or not NAME.fullmatch(path.name) else "is incomplete"
        raise UserError(f"{path}: {known} ({MANIFEST} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: is broken ({error})") from error
    for name, size, sha256 in pairs:
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: is missing, so this checkpoint cannot be used")
        if file.stat().st_size != size:
            raise UserError(f"{file}: is broken ({file.stat().st_size} bytes long, {size} were written)")
        if digest(file) != sha256:
            raise UserError(f"{file}: is broken (its content is not what was written)")


def latest_good(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None when there is none."""
    for path in reversed(find(run)):
        try:
            verify(path)
        except UserError:
            continue
        return path
    return None


def choose(run: Path, resume: str = "auto") -> Path | None:
    """The checkpoint to go on from, verified; None to start from the beginning.

    `resume`: "auto" takes the newest of `run`, "never" none, anything else is the path of a checkpoint or of a run. A broken
    checkpoint is refused, never passed over: a run must not lose work in silence.
    """
    if resume == "never":
        return None
    source = run if resume == "auto" else Path(resume)
    if resume != "auto" and not source.is_dir():
        raise UserError(f"--resume {resume}: there is no such checkpoint; it must be 'auto', 'never' or a checkpoint's folder")
    if resume != "auto" and NAME.fullmatch(source.name):
        path = source
    elif paths := find(source):
        path = paths[-1]
    elif resume == "auto":
        return None
    else:
        raise UserError(f"--resume {resume}: holds no checkpoint; it must be 'auto', 'never' or a checkpoint's folder")
    try:
        verify(path)
    except UserError as error:
        good = latest_good(path.parent.parent)
        advice = f"go on from the newest whole one with --resume {good}" if good else "this run has no whole checkpoint left"
        raise UserError(f"{error}; {advice}") from error
    return path


# -- reading --------------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / STATE}: is broken ({error})") from error
    return dict(state)


def read(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one part of a checkpoint, on the CPU."""
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of a module: trainable weights and persistent buffers. The rest comes with the pipeline."""
    everything = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    kept: dict[str, Tensor] = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    kept |= {name: value for name, value in module.state_dict().items() if name not in everything and isinstance(value, Tensor)}
    return kept


@torch.no_grad()
def restore(weights: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Copy one part of a checkpoint into tensors of the same names. Raises UserError where they do not fit."""
    tensors = read(path, name)
    for key in weights.keys() | tensors.keys():
        if key not in weights or key not in tensors or weights[key].shape != tensors[key].shape:
            found = tuple(tensors[key].shape) if key in tensors else "nothing"
            wanted = tuple(weights[key].shape) if key in weights else "nothing"
            raise UserError(f"{path / name}.safetensors: does not fit this run's networks ({key}: {found}, not {wanted})")
    for key, weight in weights.items():
        weight.copy_(part_like(weight, tensors[key]))


# -- nests and optimisers as tensors and JSON -------------------------------------------------------

TENSOR = "__tensor__"


def split(nest: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`nest` as JSON, its tensors moved to `tensors` under names that start with `name`. Tuples become lists."""
    if isinstance(nest, Tensor):
        tensors[name] = nest.detach()
        return {TENSOR: name}
    if isinstance(nest, Mapping):
        if not all(isinstance(key, str) for key in nest):
            raise TypeError(f"state at {name!r} has keys that are not text, which JSON cannot hold")
        return {key: split(value, f"{name}/{key}", tensors) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return [split(value, f"{name}/{i}", tensors) for i, value in enumerate(nest)]
    return nest


def join(nest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `split`."""
    if isinstance(nest, dict) and set(nest) == {TENSOR}:
        return tensors[nest[TENSOR]]
    if isinstance(nest, dict):
        return {key: join(value, tensors) for key, value in nest.items()}
    return [join(value, tensors) for value in nest] if isinstance(nest, list) else nest


def pack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> Any:
    """An optimiser's state as JSON and `tensors`."""
    packed = optimizer.state_dict()
    state = {str(index): entry for index, entry in packed["state"].items()}
    return split({"state": state, "param_groups": packed["param_groups"]}, "optimizer", tensors)


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Any, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `pack_optimizer`."""
    whole = join(packed, tensors)
    whole["state"] = {int(index): entry for index, entry in whole["state"].items()}
    optimizer.load_state_dict(whole)
