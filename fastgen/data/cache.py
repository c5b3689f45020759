"""Encoded samples on disk: computed once, memory-mapped after that, found again by key.

    CACHE/prompts-0123456789abcdef/     one folder for each way of encoding; a digest of everything the result depends on
        made-with.json                  what that was, for people
        0a1b....safetensors             up to `ROWS` samples: tensors, and in the header their keys and structure

A file is written under another name and renamed, and its own name is a digest of the keys in it. So a build that is
interrupted goes on where it was, several processes may fill one folder at the same time, and other settings have another
folder: nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgen.denoiser import Condition, Nest, map_tensors
from fastgen.errors import UserError

__all__ = ["Cache", "Rows", "digest", "lean", "pick"]

FORMAT = 2
ROWS = 256
OPEN_FILES = 1024
STALE_SECONDS = 86_400
SAY_SECONDS = 10


def digest(value: Any) -> str:
    """32 hexadecimal digits of a JSON value (or text)."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Rows:
    """Samples of a cache in a chosen order. Taking some reads just those from the disk."""

    def __init__(self, cache: Cache, keys: Sequence[str]):
        places = [cache.places[key] for key in keys]
        self.cache = cache
        self.file = torch.tensor([file for file, _ in places])
        self.row = torch.tensor([row for _, row in places])

    def __len__(self) -> int:
        return len(self.file)

    def take(self, index: Tensor) -> Condition:
        """The samples at `index` [B], in that order, on the CPU."""
        files, rows = self.file[index], self.row[index]
        parts, order = [], []
        for file in files.unique().tolist():
            here = (files == file).nonzero().flatten()
            parts.append(pick(self.cache.open(file), rows[here]))
            order.append(here)
        return Condition.cat(parts)[torch.cat(order).argsort()]


class Cache:
    """The folder of one way of encoding. What it holds are `Condition`s: any tensors with the batch first."""

    def __init__(self, root: str | Path, kind: str, made_with: Mapping[str, Any]):
        """`made_with` is everything that an encoded sample depends on besides its key, as JSON.

        Raises UserError where the folder cannot be made.
        """
        described = {"format": FORMAT, **made_with}
        self.folder = Path(root).expanduser() / f"{kind}-{digest(described)[:16]}"
        self.places: dict[str, tuple[int, int]] = {}
        self.files: list[Path] = []
        self.seen: set[str] = set()
        self.opened: OrderedDict[int, Condition] = OrderedDict()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            note = self.folder / "made-with.json"
            if not note.is_file():
                self.put(note, lambda partial: partial.write_text(json.dumps(described, indent=1), encoding="utf-8"))
            for partial in self.folder.glob(".*.partial"):
                with suppress(FileNotFoundError):  # Another process has renamed it.
                    if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                        partial.unlink()
        except OSError as error:
            raise self.unwritable(error) from error
        self.look()

    def look(self) -> None:
        """Take in the files that have appeared; one that is broken is passed over and made again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.seen:
                continue
            try:
                with safe_open(path, "pt") as file:
                    keys = json.loads(file.metadata()["keys"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                continue
            self.seen.add(path.name)
            self.files.append(path)
            for row, key in enumerate(keys):
                self.places.setdefault(key, (len(self.files) - 1, row))

    def fill(
        self,
        keys: Sequence[str],
        encode: Callable[[list[int]], Condition | None],
        *,
        left_out: Collection[int] = (),
        rank: int = 0,
        processes: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> Rows:
        """The samples of `keys`, with those that were missing made by `encode`, which is given their positions.

        `encode` may put some of them into `left_out` and give samples of the others, None for none: the rows are without those.

        Each of `processes` makes its own share first and then whatever is missing still. Raises UserError where the folder
        cannot be written.
        """
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        unique = sorted(first, key=first.__getitem__)
        parts = [unique[start : start + ROWS] for start in range(0, len(unique), ROWS)]
        told = time.monotonic()
        for part in [*parts[rank::processes], *parts]:
            if all(key in self.places or first[key] in left_out for key in part):
                continue
            self.look()
            missing = [key for key in part if key not in self.places and first[key] not in left_out]
            if missing:
                samples = encode([first[key] for key in missing])
                if samples is not None:
                    self.write([key for key in missing if first[key] not in left_out], samples)
                    self.look()
            if say is not None and time.monotonic() - told > SAY_SECONDS:
                told = time.monotonic()
                done = sum(key in self.places for key in unique)
                say(f"{done} of {len(unique)} encoded into {self.folder}")
        return Rows(self, [key for key in keys if first[key] not in left_out])

    def write(self, keys: Sequence[str], samples: Condition) -> None:
        """One file of new samples."""
        tensors: dict[str, Tensor] = {}
        structure = take_apart(lean(samples), tensors)
        about = {"keys": json.dumps(list(keys)), "structure": json.dumps(structure)}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        path = self.folder / f"{digest(list(keys))}.safetensors"
        try:
            self.put(path, lambda partial: save_file(tensors, partial, metadata=about))
        except (OSError, SafetensorError) as error:
            raise self.unwritable(error) from error

    def put(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Make a file whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def unwritable(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or error
        return UserError(f'{self.folder}: cannot be written ({reason}); name another folder in data.cache, or "none"')

    def open(self, file: int) -> Condition:
        """The samples of a file as memory-mapped tensors."""
        if file in self.opened:
            self.opened.move_to_end(file)
            return self.opened[file]
        try:
            with safe_open(self.files[file], "pt") as mapped:
                structure = json.loads(mapped.metadata()["structure"])
                samples: Condition = put_together(structure, mapped.get_tensor)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.files[file]}: has gone or is broken ({error}); run again, and it is made anew") from error
        self.opened[file] = samples
        if len(self.opened) > OPEN_FILES:
            self.opened.popitem(last=False)
        return samples


# -- conditions ------------------------------------------------------------------------------------


def lean(condition: Condition) -> Condition:
    """The same with a null twin of one sample, where all its samples are alike."""
    null = condition.null
    if null is None or len(null) < 2:
        return condition
    alike: list[bool] = []
    map_tensors(lambda x: alike.append(bool((x == x[:1]).all())), null.inputs)
    return Condition(condition.inputs, condition.shared, null[[0]]) if all(alike) else condition


def pick(condition: Condition, index: Tensor) -> Condition:
    """The samples at `index` of a lean condition, each with its null twin."""
    found = Condition(condition.inputs, condition.shared)[index]
    null = condition.null
    if null is not None:
        found.null = null[index if len(null) == len(condition) else torch.zeros_like(index)]
    return found


def take_apart(nest: Nest, tensors: dict[str, Tensor]) -> Any:
    """A nest as JSON, its tensors moved to `tensors`."""
    if isinstance(nest, Tensor):
        tensors[str(len(tensors))] = nest
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(nest, Condition):
        return {"condition": [take_apart(part, tensors) for part in (nest.inputs, nest.shared, nest.null)]}
    if isinstance(nest, Mapping):
        return {"mapping": {key: take_apart(value, tensors) for key, value in nest.items()}}
    if isinstance(nest, (list, tuple)):
        return {"tuple" if isinstance(nest, tuple) else "list": [take_apart(value, tensors) for value in nest]}
    return nest


def put_together(structure: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Inverse of `take_apart`."""
    if not isinstance(structure, dict):
        return structure
    [(kind, value)] = structure.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "condition":
        return Condition(*(put_together(part, tensor) for part in value))
    if kind == "mapping":
        return {key: put_together(part, tensor) for key, part in value.items()}
    parts = [put_together(part, tensor) for part in value]
    return tuple(parts) if kind == "tuple" else parts
