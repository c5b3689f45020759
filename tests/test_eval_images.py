"""Pictures that cannot be measured are named: which file, what is wrong, what would be right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.errors import UserError
from fastgen.eval.images import PictureFolder, batches, check_images, images_hash, read_images, write_images


def test_grey_and_indexed_pictures_become_rgb(tmp_path: Path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).convert("RGB").quantize(64).save(tmp_path / "b.png")
    Image.fromarray(np.dstack([grey, np.full_like(grey, 255)])).save(tmp_path / "c.png")
    first, second, opaque = read_images(tmp_path)
    assert torch.equal(first, torch.from_numpy(grey).expand(3, 8, 8))
    assert (second.int() - first.int()).abs().max() <= 2 and torch.equal(opaque, first), "what is opaque is no guess"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_refused(tmp_path: Path, mode: str):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 100))
    clear.convert(mode).save(tmp_path / "clear.png", **({"transparency": 0} if mode == "P" else {}))
    with pytest.raises(UserError, match=r"clear\.png is partly transparent; flatten it onto the background"):
        read_images(tmp_path)


@pytest.mark.parametrize(("dtype", "name"), [(np.uint16, "deep.png"), (np.int32, "deep.tiff"), (np.float32, "deep.tiff")])
def test_pictures_of_more_than_eight_bits_are_refused(tmp_path: Path, dtype: type, name: str):
    """Pillow would clip them to white."""
    Image.fromarray(np.full((8, 8), 40_000, dtype=dtype)).save(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits a channel"):
        read_images(tmp_path)


def test_broken_pictures_are_named(tmp_path: Path):
    """Cut short, of another kind, and with a header that lies."""
    write_images(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), tmp_path)
    whole = (tmp_path / "000001.png").read_bytes()
    for content in (whole[:200], b"", b"GIF87a", whole[:16] + b"\xff" * 8 + whole[24:], whole[:60] + b"\0" * 40 + whole[100:]):
        (tmp_path / "000001.png").write_bytes(content)
        with pytest.raises(UserError, match=r"000001\.png cannot be read as a picture"):
            read_images(tmp_path)


def test_a_folder_of_several_sizes_is_found_before_anything_is_measured(tmp_path: Path):
    for number, side in enumerate((8, 8, 8, 9)):
        Image.new("RGB", (side, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"mixes sizes \(8 x 8 and 9 x 8, the second in 3\.png\); give a size"):
        check_images(PictureFolder(tmp_path), "reference")
    check_images(PictureFolder(tmp_path, limit=3), "reference")
    check_images(PictureFolder(tmp_path, size=4), "reference")
    (tmp_path / "3.png").write_text("nothing")
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        check_images(PictureFolder(tmp_path), "reference")


def test_a_folder_gives_what_the_tensor_gives(tmp_path: Path):
    images = torch.randint(0, 256, (11, 3, 6, 5), dtype=torch.uint8)
    write_images(images, tmp_path)
    folder = PictureFolder(tmp_path)
    assert folder.shape == (11, 3, 6, 5) and len(folder[20:30]) == 0
    assert [len(batch) for batch in batches(folder, 4)] == [4, 4, 3]
    assert torch.equal(torch.cat(list(batches(folder, 4))), images)
    assert images_hash(folder) == images_hash(images) != images_hash(images.flip(0))
