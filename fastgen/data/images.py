"""What a run's pictures and prompts are, whatever form they come in, and pictures as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastgen.config import DataConfig
from fastgen.data.pictures import BadSamples, Picture, Samples, find_images
from fastgen.data.prompts import read_prompts
from fastgen.data.readers import Readers
from fastgen.data.shards import is_shards, read_shards
from fastgen.data.tables import is_table, read_captions, read_table
from fastgen.errors import UserError

__all__ = ["find_pictures", "find_prompts", "load_images", "to_tensor"]


def find_pictures(data: DataConfig, bad: BadSamples) -> Samples:
    """The pictures of `data.images` and their captions. Raises UserError, or tells `bad`, as their form has it."""
    where = data.images
    if is_table(where):
        found: Samples = read_table(where, data, bad)
    elif is_shards(where):
        found = read_shards(where, bad, data.caption)
    else:
        found = find_images(where, bad)
    if not found[1]:
        bad.tell(0, where)
    return found


def find_prompts(data: DataConfig, bad: BadSamples) -> list[str]:
    """The prompts of `data.prompts`: lines of a text file, or the captions of a dataset or of shards. Raises UserError."""
    where = data.prompts
    if is_table(where):
        found = read_captions(where, data, bad)
    elif is_shards(where):
        found = read_shards(where, bad, data.caption, pictured=False)[1]
    else:
        return read_prompts(where)
    bad.tell(len(found), where)
    return found


def load_images(pictures: Sequence[Picture], size: tuple[int, int], readers: Readers | None = None) -> Tensor:
    """Pictures [B, 3, height, width] in [-1, 1], scaled and centre-cropped to `size` (height, width), white where see-through.

    Raises UserError naming one that cannot be read.
    """
    found = []
    for each in (readers or Readers()).read(pictures, size):
        if isinstance(each, UserError):
            raise each
        found.append(each)
    return to_tensor(found)


def to_tensor(pixels: Sequence[np.ndarray]) -> Tensor:
    """Pictures [height, width, 3] of bytes as [B, 3, height, width] in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in pixels])
