"""Pictures in and out of evaluation: always uint8 [N, 3, H, W]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastgen.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def to_uint8(images: Tensor) -> Tensor:
    """Float images [N, 3, H, W] in [-1, 1] to uint8, rounded as diffusers rounds. Raises UserError on NaN or infinity."""
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise UserError(f"{bad} of {len(images)} images hold NaN or infinity: the model is broken or its precision too low")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images [N, 3, H, W] to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def check_images(images: Tensor, name: str) -> None:
    """Raise UserError unless `images` is a non-empty uint8 [N, 3, H, W] tensor; `name` says which set is meant."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        found = f"{images.dtype} {tuple(images.shape)}".replace("torch.", "")
        raise UserError(f"{name} must be a uint8 tensor [N, 3, height, width], not {found}; use fastgen.eval.images.to_uint8")


def to_pillow(images: Tensor) -> list[Image.Image]:
    """uint8 images [N, 3, H, W] as Pillow images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]


def from_pillow(images: Sequence[Image.Image]) -> Tensor:
    """Pillow images of one size as uint8 [N, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2).contiguous()


def read_images(folder: Path | str, *, limit: int | None = None, size: int | None = None) -> Tensor:
    """Every picture of a folder, in the order of the names: uint8 [N, 3, H, W].

    `size` crops each to its central square and resizes it (Pillow's Lanczos) to `size` x `size`.

    Raises UserError when the folder is missing or empty, a file cannot be read, or the pictures differ in size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with pictures ({', '.join(EXTENSIONS)})")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)[:limit]
    if not paths:
        raise UserError(f"{folder} holds no pictures; files must end in {', '.join(EXTENSIONS)}")
    pictures: list[Image.Image] = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{path} cannot be read as a picture: {error}") from error
        if size is not None:
            picture = _square(picture, size)
        if pictures and picture.size != pictures[0].size:
            sizes = " and ".join(f"{w} x {h}" for w, h in (pictures[0].size, picture.size))
            raise UserError(
                f"{folder} mixes sizes ({sizes}, the second in {path.name}); give a size to crop and resize them to"
            )
        pictures.append(picture)
    return from_pillow(pictures)


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
