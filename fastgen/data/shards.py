"""WebDataset shards: plain .tar files whose members of one name are one sample, `000123.jpg` and `000123.txt` or `.json`.

The format is webdataset's, not the way of reading it. That library streams shards from first to last and shuffles in a buffer,
so that what comes next depends on the numbers of processes and workers and on all that was read before. Here the headers are
read once, after which each picture's place in its file is known, as in a folder: any order, resumed anywhere, by any number
of processes. It takes local, uncompressed files and a seek to each member at the start.
"""

from __future__ import annotations

import functools
import glob
import json
import re
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

from fastgen.data.pictures import SUFFIXES, BadSamples, Picture
from fastgen.errors import UserError

__all__ = ["expand", "is_shards", "read_shards"]

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
CAPTIONS = ("caption", "text")
"""What a caption is called in a sample's JSON or a dataset's columns, where data.caption does not say."""

MOST_SHARDS = 1_000_000


def is_shards(where: str) -> bool:
    """Whether `data.images` or `data.prompts` names shards: a pattern that ends in .tar, or a folder that holds some."""
    return where.endswith((".tar", ".tar.gz", ".tgz")) or (Path(where).is_dir() and any(Path(where).glob("*.tar")))


def expand(where: str) -> list[Path]:
    """The shards of a pattern such as `train-{000..127}.tar` or `*.tar`, in its order, or of a folder, sorted.

    Raises UserError where there are none, or one is missing.
    """
    if Path(where).is_dir():
        return sorted(Path(where).glob("*.tar"))
    parts = BRACES.split(where)
    choices = [alternatives(part) if i % 2 else [part] for i, part in enumerate(parts)]
    if functools.reduce(lambda number, some: number * len(some), choices, 1) > MOST_SHARDS:
        raise UserError(f"{where}: is more than {MOST_SHARDS} shards")
    found: list[Path] = []
    for name in ("".join(each) for each in product(*choices)):
        some = sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name]
        if not some or not Path(some[0]).is_file():
            raise UserError(f"{name}: there is no such shard; data.images or data.prompts names .tar files of pictures")
        found += map(Path, some)
    return found


def alternatives(inside: str) -> list[str]:
    """What stands for `{...}`: numbers from one to another, as wide as the first is written, or words with commas."""
    numbers = RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    if int(last) - int(first) > MOST_SHARDS:
        raise UserError(f"{{{inside}}}: is more than {MOST_SHARDS} shards")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def read_shards(where: str, bad: BadSamples, caption: str = "", *, pictured: bool = True) -> tuple[list[Picture], list[str]]:
    """The pictures of shards and their captions, in the order of the files; `caption` is its key in a sample's .json.

    Where they are not `pictured` captions are all that is asked for. Raises UserError, or tells `bad`, naming shard and sample.
    """
    pictures, captions = [], []
    for shard in expand(where):
        state = shard.stat()
        samples, problem = index(shard, state.st_size, state.st_mtime_ns)
        if problem:
            bad.add(UserError(f"{shard}: {problem}"))
        for name, parts in samples:
            try:
                words = caption_of(shard, name, parts, caption)
                suffix = next((each for each in parts if f".{each}" in SUFFIXES), None)
                if pictured and suffix is None:
                    raise UserError(f"{shard}: sample {name} has no picture ({', '.join(sorted(SUFFIXES))})")
            except UserError as error:
                bad.add(error)
                continue
            captions.append(words)
            if suffix is not None:
                offset, length, _ = parts[suffix]
                identity = (str(shard.absolute()), state.st_size, state.st_mtime_ns, name, offset)
                pictures.append(Picture(f"{shard}: {name}.{suffix}", identity, shard, offset, length))
    return pictures, captions


Parts = dict[str, tuple[int, int, bytes]]


@functools.cache
def index(shard: Path, size: int, changed: int) -> tuple[list[tuple[str, Parts]], str]:
    """A shard's samples with the place of each of their parts (offset, length, and what it says where it is text), and what is
    wrong with the shard, if anything is: what comes before is good.

    `size` and `changed` are the file's: another one is read anew. Nothing is kept of pictures but where they are.
    """
    samples: dict[str, Parts] = {}
    try:
        with shard.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return [], "is compressed; shards must be plain .tar files (gunzip makes one)"
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                suffix, name = suffix.lower(), f"{folder}{slash}{key}"
                if not key or not suffix:
                    continue
                parts = samples.setdefault(name, {})
                if suffix in parts:
                    return list(samples.items()), f"has two members {member.name}; each sample needs a name of its own"
                reader = archive.extractfile(member) if suffix in ("txt", "json") else None
                parts[suffix] = (member.offset_data, member.size, reader.read() if reader else b"")
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        if samples:
            samples.popitem()  # its last parts may be missing
        return list(samples.items()), f"is not a readable .tar after {len(samples)} samples ({error})"
    return list(samples.items()), "" if samples else "holds no samples"


def caption_of(shard: Path, name: str, parts: Parts, key: str) -> str:
    """A sample's caption, from its .txt or its .json; from the latter where `key` is given. Raises UserError."""
    wanted = f"{shard}: sample {name}"
    if "txt" in parts and not key:
        return words(parts["txt"][2], f"{wanted}.txt")
    if "json" not in parts:
        raise UserError(f"{wanted} has no caption; it must be in {name}.{'json' if key else 'txt or .json'}")
    try:
        about: Any = json.loads(parts["json"][2])
    except ValueError as error:
        raise UserError(f"{wanted}.json is not valid JSON ({error})") from error
    found = next((about[each] for each in ((key,) if key else CAPTIONS) if isinstance(about, dict) and each in about), None)
    if not isinstance(found, str):
        raise UserError(f"{wanted}.json has no caption, a text, under {key!r}" if key else f"{wanted}.json has no 'caption'")
    return words(found.encode("utf-8", "replace"), f"{wanted}.json")


def words(text: bytes, where: str) -> str:
    try:
        found = " ".join(text.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not text in UTF-8") from error
    if not found:
        raise UserError(f"{where} is empty; it must hold the caption")
    return found
