"""Where pictures are - files, parts of a shard, rows of a dataset - with their captions, and what is done about bad ones.

`data.images` names one of

    a folder of pictures                 with the caption of each in a .txt beside it
    .tar shards, or a folder of them     `shards/{000..099}.tar`, `shards/*.tar` (fastgen.data.shards)
    a dataset                            a folder written by `save_to_disk`, parquet and JSON files, `hf:owner/name` on the hub
                                         (fastgen.data.tables)

Whatever it is, its samples have numbers and any of them can be read at any time; that is what lets seed and position decide
the order, and a run go on in the middle of an epoch.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fastgen.data.decode import content_of
from fastgen.data.prompts import read_text
from fastgen.errors import UserError

__all__ = ["BadSamples", "Picture", "Samples", "find_images", "identities", "not_a_picture", "picture_file"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
TOLD = 10


@dataclass(frozen=True)
class Picture:
    """Where the bytes of a picture are: a file, a part of one (`offset`, `length`), or here (`content`).

    `name` is for messages; `identity`, as JSON, changes when the picture does.
    """

    name: str
    identity: tuple[Any, ...]
    path: Path = Path()
    offset: int = 0
    length: int = -1
    content: bytes | None = None

    def open(self) -> IO[bytes]:
        """The picture as a file to read. Raises OSError."""
        return content_of(str(self.path), self.offset, self.length) if self.content is None else io.BytesIO(self.content)


Samples = tuple[Sequence[Picture], list[str]]
"""Pictures and their captions."""


def picture_file(path: Path) -> Picture:
    """A picture that is a file of its own; it is the same as long as its path, length and time of change are."""
    state = path.stat()
    return Picture(str(path), (str(path.absolute()), state.st_size, state.st_mtime_ns), path)


def not_a_picture(picture: Picture, error: object) -> UserError:
    reason = re.sub(r"\s*<[^<>]*>", "", " ".join(str(error).split()))  # Pillow shows the file object
    return UserError(f"{picture.name}: is not a readable picture ({reason})")


def identities(pictures: Sequence[Picture]) -> list[tuple[Any, ...]]:
    """The identity of each, without reading any."""
    own = getattr(pictures, "identities", None)
    return own() if own is not None else [picture.identity for picture in pictures]


class BadSamples:
    """What is done about samples that cannot be used: "stop" at the first, or "skip" them and tell of them."""

    def __init__(self, action: Literal["stop", "skip"] = "stop", say: Callable[[str], None] | None = None):
        self.action, self.say, self.found = action, say or (lambda line: None), set[str]()

    def add(self, error: UserError) -> None:
        """One more. Raises it where that is what is done."""
        if self.action == "stop":
            raise error
        problem = str(error)
        if problem not in self.found:
            self.found.add(problem)
            if len(self.found) <= TOLD:
                self.say(f"left out: {problem}")

    def tell(self, left: int, where: str) -> None:
        """Say how many were left out, in the end. Raises UserError where nothing is left."""
        if left == 0:
            first = f"; the first: {min(self.found)}" if self.found else ""
            raise UserError(f"{where}: has no sample that can be used{first}")
        if self.found:
            self.say(f"{where}: {len(self.found)} samples cannot be used and were left out, {left} are used")


def find_images(folder: str | Path, bad: BadSamples | None = None) -> tuple[list[Picture], list[str]]:
    """The pictures under `folder`, sorted, and their captions from the .txt of the same name beside each.

    Raises UserError for a folder that is missing or has no pictures, and for a picture without a caption.
    """
    root, bad = Path(folder), bad or BadSamples()
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; it must hold pictures with a .txt caption beside each")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise UserError(f"{root}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    pictures, captions = [], []
    for path in paths:
        try:
            caption = caption_beside(path)
        except UserError as error:
            bad.add(error)
        else:
            pictures.append(picture_file(path))
            captions.append(caption)
    return pictures, captions


def caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        raise UserError(f"{path}: has no caption; it must be in {beside.name} beside it")
    caption = " ".join(read_text(beside).split())
    if not caption:
        raise UserError(f"{beside}: is empty; it must hold the caption of {path.name}")
    return caption
