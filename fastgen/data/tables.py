"""Hugging Face datasets: a folder written by `save_to_disk`, parquet, Arrow, JSON and CSV files, or one of the hub.

The `datasets` library reads them into memory-mapped Arrow files, in which any row can be had at any time. Its streaming mode is
not used: it shuffles in a buffer, and what is in there is lost when a run stops.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fastgen.config import DataConfig
from fastgen.data.pictures import BadSamples, Picture, Samples
from fastgen.data.shards import CAPTIONS
from fastgen.errors import UserError
from fastgen.schema import nearest, shown

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["is_table", "read_captions", "read_table"]

HUB = "hf:"
FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def is_table(where: str) -> bool:
    """Whether `data.images` or `data.prompts` names a dataset."""
    path = Path(where)
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return where.startswith(HUB) or path.suffix in FILES or saved or (path.is_dir() and any(path.glob("*.parquet")))


def read_table(where: str, data: DataConfig, bad: BadSamples) -> Samples:
    """The pictures and captions of a dataset, in the order of its rows; the columns are as `data` says.

    Raises UserError where it cannot be had or has no such columns, and, or tells `bad`, for a row without a caption.
    """
    table = open_table(where, data)
    fingerprint = str(table._fingerprint)
    import datasets

    column = column_of(where, table, "data.image", data.image, ("image", "jpg", "png", "img"))
    kind = table.features[column]
    if isinstance(kind, datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    elif getattr(kind, "dtype", "").removeprefix("large_") not in ("string", "binary"):
        raise UserError(f"{where}: column {column!r} holds {shown(kind)}, not pictures; name another in data.image")
    captions, kept = captions_of(where, table, data, bad)
    return Rows(table, column, kept, where, (where, fingerprint, column)), captions


def read_captions(where: str, data: DataConfig, bad: BadSamples) -> list[str]:
    """The captions of a dataset alone. Raises as `read_table` does."""
    return captions_of(where, open_table(where, data), data, bad)[0]


class Rows(Sequence[Picture]):
    """The pictures of a dataset's rows `kept`; their bytes are read when one is asked for."""

    def __init__(self, table: Dataset, column: str, kept: list[int], where: str, identity: tuple[Any, ...]):
        self.table, self.column, self.kept, self.where, self.identity = table, column, kept, where, identity

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.kept[index]
        name, identity, found = f"{self.where}: row {row}", (*self.identity, row), self.table[row][self.column] or b""
        if isinstance(found, dict):  # what a picture is kept as: its bytes, or the path of its file
            found = found.get("bytes") or found.get("path") or b""
        if isinstance(found, str):
            return Picture(f"{name}, {found}", identity, Path(found))
        return Picture(name, identity, content=found)

    def identities(self) -> list[tuple[Any, ...]]:
        """The identity of each, for which no picture is read."""
        return [(*self.identity, row) for row in self.kept]


def captions_of(where: str, table: Dataset, data: DataConfig, bad: BadSamples) -> tuple[list[str], list[int]]:
    """The captions, and the numbers of the rows that have one."""
    column = column_of(where, table, "data.caption", data.caption, CAPTIONS)
    captions, kept = [], []
    for row, text in enumerate(table[column]):
        if isinstance(text, str) and text.strip():
            captions.append(" ".join(text.split()))
            kept.append(row)
        else:
            bad.add(UserError(f"{where}: row {row} has no caption: column {column!r} holds {shown(text)}"))
    return captions, kept


def column_of(where: str, table: Dataset, key: str, wanted: str, usual: Sequence[str]) -> str:
    """The column that is wanted, or the first of the usual ones. Raises UserError where there is none."""
    found = next((each for each in ([wanted] if wanted else usual) if each in table.column_names), None)
    if found is None:
        hint = nearest(wanted, table.column_names) if wanted else f"; there are {', '.join(table.column_names)[:200]}"
        missing = f"column {wanted!r}" if wanted else f"column {' or '.join(map(repr, usual))}"
        raise UserError(f"{where}: has no {missing}, which {key} must name{hint}")
    return found


def open_table(where: str, data: DataConfig) -> Dataset:
    """The dataset. Raises UserError where the library is missing, or the dataset, or its split."""
    try:
        import datasets
    except ImportError as error:
        cure = "pip install 'fastgen-diffusion[datasets]'"
        raise UserError(f"{where}: is a dataset, for which the library datasets is needed; {cure}") from error
    datasets.disable_progress_bars()
    path = Path(where)
    try:
        if where.startswith(HUB):
            return datasets.load_dataset(where.removeprefix(HUB), split=data.split)
        if path.is_dir() and not any(path.glob("*.parquet")):
            found = datasets.load_from_disk(where)
            return found[data.split] if isinstance(found, datasets.DatasetDict) else found
        files = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else sorted(glob.glob(where)) or [where]
        kind = "parquet" if path.is_dir() else FILES[path.suffix]
        return datasets.load_dataset(kind, data_files=[os.path.abspath(each) for each in files], split="train")
    except KeyError:
        raise UserError(f"{where}: has no split {data.split!r}{nearest(data.split, list(found))}; set data.split") from None
    except Exception as error:  # whatever format readers, file systems and the hub's client raise
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:300]
        raise UserError(f"{where}: cannot be read as a dataset ({reason})") from error
