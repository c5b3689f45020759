"""A folder of pictures with captions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgen.data.prompts import read_text
from fastgen.errors import UserError

__all__ = ["find_images", "load_images", "not_a_picture", "picture_errors"]

picture_errors = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or a broken one."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def find_images(folder: str | Path) -> tuple[list[Path], list[str]]:
    """The pictures under `folder`, sorted, and their captions from the .txt of the same name beside each.

    Raises UserError for a folder that is missing or has no pictures, and for a picture without a caption.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; it must hold pictures with a .txt caption beside each")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise UserError(f"{root}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    captions = []
    for path in paths:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            raise UserError(f"{path}: has no caption; it must be in {beside.name} beside it")
        caption = " ".join(read_text(beside).split())
        if not caption:
            raise UserError(f"{beside}: is empty; it must hold the caption of {path.name}")
        captions.append(caption)
    return paths, captions


def load_images(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures [B, 3, height, width] in [-1, 1], scaled and centre-cropped to `size` (height, width), white where see-through.

    Raises UserError naming a file that is not a readable picture.
    """
    return torch.stack([load_image(path, size) for path in paths])


def load_image(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except picture_errors as error:
        raise not_a_picture(path, error) from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def not_a_picture(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: is not a readable picture ({error})")
