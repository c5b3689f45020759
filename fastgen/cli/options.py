"""The flags that every command takes, and the checks on what they hold."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastgen.errors import UserError

__all__ = ["add_common", "checked_device", "emit", "free_folder", "say", "seed", "writable"]


def add_common(parser: argparse.ArgumentParser, output: str, *, required: bool = False) -> None:
    """Add `--output --seed --device --offline --quiet --json`; `output` says what the first one means here."""
    common = parser.add_argument_group("flags of every command")
    common.add_argument("--output", "-o", type=Path, required=required, metavar="PATH", help=output)
    common.add_argument("--seed", type=int, metavar="N", help="seed of all randomness")
    common.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; default: the best there is")
    common.add_argument("--offline", action="store_true", help="never ask the network")
    common.add_argument("--quiet", "-q", action="store_true", help="no progress, only results")
    common.add_argument("--json", action="store_true", help="print the result as JSON")


def seed(args: argparse.Namespace, otherwise: int = 0) -> int:
    """The seed asked for. Raises UserError for one that torch cannot take."""
    if args.seed is None:
        return otherwise
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must be between 0 and 2**63 - 1")
    return int(args.seed)


def checked_device(args: argparse.Namespace) -> str:
    """A device that this machine has, by name: the one asked for, else the best. Raises UserError for one it has not."""
    import torch

    kinds = [kind for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there]
    kinds.append("cpu")
    if args.device is None:
        return kinds[0]
    kind, _, index = args.device.partition(":")
    if kind not in kinds or (index and not index.isdigit()):
        raise UserError(f"--device {args.device}: this machine has {', '.join(kinds)}")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {args.device}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    return str(args.device)


def writable(path: Path) -> Path:
    """`path`, if a folder can be made there or written to; nothing is left behind. Raises UserError if not."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--output {path}: {there} is a file, not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fastgen-", dir=there))
    except OSError as error:
        raise UserError(f"--output {path}: {there} cannot be written to ({error.strerror})") from error
    return path


def free_folder(path: Path) -> Path:
    """`path`, if it is writable and nothing lies there yet. Raises UserError if something does: nothing is overwritten."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--output {path}: exists already; name a new folder or remove it")
    return writable(path)


def say(args: argparse.Namespace, line: str) -> None:
    """A line of progress, on standard error so that results can be piped."""
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def emit(args: argparse.Namespace, result: Any, text: str, to: Path | None = None) -> None:
    """Print a result: `result` as JSON with `--json`, else `text`; into the file `to` instead if given."""
    if args.json:
        text = json.dumps(result, indent=2, ensure_ascii=False)
    text = text if text.endswith("\n") else text + "\n"
    if to is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    if to.exists():
        raise UserError(f"--output {to}: exists already; name a new file or remove it")
    writable(to.absolute().parent)
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(to)
