"""One picture from its file to numbers, here or in a process of its own.

Run as a program it decodes what its standard input names until that ends. It imports Pillow and NumPy only, so that it starts
in a moment and takes little memory; a request and an answer are each a line of JSON and as many bytes as that says.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ContainerIO import ContainerIO

__all__ = ["decode", "measure", "picture_errors"]

picture_errors = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or a broken one."""

TRANSPOSED = frozenset({5, 6, 7, 8})  # values of EXIF's orientation that turn a picture on its side


def decode(content: IO[bytes], size: tuple[int, int]) -> np.ndarray:
    """A picture [height, width, 3] of bytes, scaled and centre-cropped to `size` (height, width), white where see-through.

    Raises one of `picture_errors`.
    """
    with Image.open(content) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS))


def measure(content: IO[bytes]) -> tuple[int, int]:
    """Height and width of a picture as it is looked at, by its header. Raises one of `picture_errors`."""
    with Image.open(content) as opened:
        width, height = opened.size
        turned = opened.getexif().get(0x0112) in TRANSPOSED
    return (width, height) if turned else (height, width)


def content_of(path: str, offset: int, length: int) -> IO[bytes]:
    """The bytes of a file, or of the part of it that begins at `offset`, where `length` is not -1."""
    file = open(path, "rb")  # noqa: SIM115  # closed by who reads it
    return file if length < 0 else ContainerIO(file, offset, length)


def answer(request: dict[str, Any], inline: bytes) -> tuple[dict[str, Any], bytes]:
    """What a request is answered with: the picture, or why there is none."""
    try:
        with io.BytesIO(inline) if inline else content_of(request["path"], request["offset"], request["length"]) as content:
            pixels = decode(content, (request["height"], request["width"]))
    except picture_errors as error:
        return {"problem": str(error) or type(error).__name__, "bytes": 0}, b""
    return {"bytes": pixels.nbytes}, pixels.tobytes()


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the requests end."""
    while line := requests.readline():
        request = json.loads(line)
        about, content = answer(request, requests.read(request["bytes"]))
        answers.write(json.dumps(about).encode() + b"\n")
        answers.write(content)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; who started this one ends it.
    serve(sys.stdin.buffer, sys.stdout.buffer)
