"""Pictures in and out of evaluation: always uint8 [N, 3, H, W], in memory (a tensor) or read when wanted (a folder)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastgen.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
READERS = 4
"""Threads that decode pictures of a folder."""
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of more than 8 bits, which it would clip and not scale."""
BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises over files that are damaged, no pictures, or unreasonably large."""


class Images(Protocol):
    """A set of pictures of one size: a uint8 tensor [N, 3, H, W], or a `PictureFolder`, which gives one for a slice."""

    @property
    def shape(self) -> Sequence[int]:
        """N, 3, height, width."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def batches(images: Images, size: int = 128) -> Iterator[Tensor]:
    """The pictures in order, `size` at a time; of a folder the next ones are decoded meanwhile."""
    starts = range(0, len(images), size)
    if isinstance(images, Tensor):
        yield from (images[start : start + size] for start in starts)
        return
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(images.__getitem__, slice(0, size))
        for start in starts:
            batch = coming.result()
            coming = ahead.submit(images.__getitem__, slice(start + size, start + 2 * size))
            yield batch


def images_hash(images: Images) -> str:
    """SHA-256 of the pixels in order, however the pictures are kept."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    for batch in batches(images):
        digest.update(batch.contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_uint8(images: Tensor) -> Tensor:
    """Float images [N, 3, H, W] in [-1, 1] to uint8, rounded as diffusers rounds. Raises UserError on NaN or infinity."""
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise UserError(f"{bad} of {len(images)} images hold NaN or infinity: the model is broken or its precision too low")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images [N, 3, H, W] to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def check_images(images: Images, name: str) -> None:
    """Raise UserError unless `images` are a folder of one size or a non-empty uint8 [N, 3, H, W] tensor, called `name`."""
    if not isinstance(images, Tensor):
        if isinstance(images, PictureFolder):
            images.check()
        return
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        found = f"{images.dtype} {tuple(images.shape)}".replace("torch.", "")
        raise UserError(f"{name} must be a uint8 tensor [N, 3, height, width], not {found}; use fastgen.eval.images.to_uint8")


def to_pillow(images: Tensor) -> list[Image.Image]:
    """uint8 images [N, 3, H, W] as Pillow images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]


def from_pillow(images: Sequence[Image.Image]) -> Tensor:
    """Pillow images of one size as uint8 [N, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2).contiguous()


class PictureFolder:
    """The pictures of a folder in the order of their names, decoded when they are asked for.

    `size` crops each to its central square and resizes it (Pillow's Lanczos) to `size` x `size`; without it all must have one
    size. Grey pictures become RGB; transparent ones are refused, since what shows through would be a guess.

    Raises UserError when the folder is missing or empty; on reading, where a file is broken, transparent, deeper than 8 bits,
    or of another size. `check` looks at sizes beforehand.
    """

    def __init__(self, folder: Path | str, *, limit: int | None = None, size: int | None = None) -> None:
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a folder; give one with pictures ({', '.join(EXTENSIONS)})")
        self.paths = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in EXTENSIONS)[:limit]
        if not self.paths:
            raise UserError(f"{folder} holds no pictures; files must end in {', '.join(EXTENSIONS)}")
        self._first = self._read(self.paths[0]).size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, 3, height, width."""
        return len(self.paths), 3, self._first[1], self._first[0]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice, /) -> Tensor:
        paths = self.paths[rows]
        if not paths:
            return torch.zeros((0, *self.shape[1:]), dtype=torch.uint8)
        with ThreadPoolExecutor(READERS) as readers:
            pictures = list(readers.map(self._read, paths))
        for path, picture in zip(paths, pictures, strict=True):
            self._same_size(path, picture.size)
        return from_pillow(pictures)

    def check(self) -> None:
        """Raise UserError where a file is no picture or of another size, from the files' first bytes alone."""
        if self.size is not None:
            return
        with ThreadPoolExecutor(READERS) as readers:
            for path, size in zip(self.paths, readers.map(_size_of, self.paths), strict=True):
                self._same_size(path, size)

    def _same_size(self, path: Path, size: tuple[int, int]) -> None:
        if size != self._first:
            sizes = " and ".join(f"{w} x {h}" for w, h in (self._first, size))
            raise UserError(
                f"{self.folder} mixes sizes ({sizes}, the second in {path.name}); give a size to crop and resize them to"
            )

    def _read(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as opened:
                opened.load()
        except BROKEN as error:
            raise UserError(f"{path} cannot be read as a picture: {error}") from error
        if opened.mode in DEEP:
            raise UserError(f"{path} has more than 8 bits a channel (Pillow's mode {opened.mode}); save it with 8")
        if opened.has_transparency_data and np.array(opened.convert("RGBA"))[..., 3].min() < 255:
            raise UserError(f"{path} is partly transparent; flatten it onto the background that it should be judged on")
        picture = opened.convert("RGB")
        return picture if self.size is None else _square(picture, self.size)


class Centres:
    """The middle `side` x `side` pixels of a set of pictures that are at least as large, cut as torchvision's center_crop
    does."""

    def __init__(self, images: Images, side: int) -> None:
        self.images, self.side = images, side

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, 3, side, side."""
        return len(self.images), 3, self.side, self.side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice, /) -> Tensor:
        pictures = self.images[rows]
        top, left = (round((length - self.side) / 2) for length in pictures.shape[2:])
        return pictures[:, :, top : top + self.side, left : left + self.side]


def read_images(folder: Path | str, *, limit: int | None = None, size: int | None = None) -> Tensor:
    """Every picture of a folder at once: uint8 [N, 3, H, W]. Arguments and errors as of `PictureFolder`."""
    return PictureFolder(folder, limit=limit, size=size)[:]


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as opened:
            return opened.size
    except BROKEN as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def _square(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def write_images(images: Tensor, folder: Path | str) -> list[Path]:
    """Write uint8 images [N, 3, H, W] as 000000.png, 000001.png, ...; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.png" for i in range(len(images))]
    for path, picture in zip(paths, to_pillow(images), strict=True):
        temporary = path.with_suffix(".png.tmp")
        picture.save(temporary, format="PNG")
        temporary.replace(path)
    return paths
