"""Pictures on disk: PNG files that say what they show, so that a folder of them explains itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastgen import __version__
from fastgen.errors import UserError
from fastgen.eval.images import Images, to_pillow


def words(model: str, prompt: str, seed: int, sampler: Mapping[str, Any]) -> dict[str, str]:
    """What a picture says: model, prompt, seed, and the steps and guidance of a protocol's `sampler`."""
    steps, scale = sampler["steps"], sampler["guidance"]
    shown = {"steps": "" if steps is None else str(steps), "guidance": "" if scale is None else f"{scale:g}"}
    return {"model": model, "prompt": prompt, "seed": str(seed), **shown, "Software": f"fastgen {__version__}"}


def write_pictures(images: Tensor, folder: Path, texts: Sequence[Mapping[str, str]], *, start: int = 0) -> None:
    """Write uint8 images [N, 3, H, W] as PNG files, numbered from `start`, with the words of each in its text chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, words) in enumerate(zip(to_pillow(images), texts, strict=True), start):
        chunks = PngInfo()
        for key, value in words.items():
            chunks.add_itxt(key, value)
        path = folder / f"{number:06d}.png"
        temporary = path.with_suffix(".png.tmp")
        picture.save(temporary, format="PNG", pnginfo=chunks)
        temporary.replace(path)


def read_words(path: Path) -> dict[str, str]:
    """The text chunks of a PNG file. Raises UserError for what is none."""
    try:
        with Image.open(path) as picture:
            picture.load()
            found = getattr(picture, "text", {})
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
    return {key: str(value) for key, value in found.items()}


def split_reference(real: Images, images: int) -> tuple[Images, Images]:
    """Real images to compare with, and the last of them, `images` many, for the floor."""
    return part_of(real, slice(0, len(real) - images)), part_of(real, slice(len(real) - images, len(real)))


def part_of(images: Images, rows: slice) -> Images:
    """Some of the images, of a folder without reading them."""
    if isinstance(images, Tensor):
        return images[rows]
    return PartOfFolder(images, range(len(images))[rows])


@dataclass(frozen=True)
class PartOfFolder:
    """Consecutive pictures of a folder, as images."""

    whole: Images
    rows: range

    @property
    def shape(self) -> tuple[int, ...]:
        """N, 3, height, width."""
        return len(self.rows), *self.whole.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice, /) -> Tensor:
        chosen = self.rows[rows]
        return self.whole[chosen.start : max(chosen.stop, chosen.start)]
