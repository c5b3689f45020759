"""Prompts and captions from text files."""

from __future__ import annotations

import codecs
from pathlib import Path

from fastgen.errors import UserError

__all__ = ["read_prompts", "read_text"]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines are passed over.

    Raises UserError for a file that is missing, empty, or not text (with the line).
    """
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path}: is empty; it must hold one prompt a line")
    return prompts


def read_text(path: str | Path) -> str:
    """A text file. Raises UserError where it cannot be read, with the number of the line that is not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; it must be a text file with one prompt a line") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; it must be a text file with one prompt a line") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if b"\0" in data and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise UserError(f"{path}: line {line} is not text; it must be a text file in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not text in UTF-8; save the file as UTF-8") from error
