"""`fastgen train-teacher`: the toy world's teacher from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgen.cli.options import add_common, emit, say, writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML recipe; configs/toy/teacher.toml made the teacher that ships")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file: denoiser.updates=100")
    add_common(parser, "folder for the teacher, a diffusers pipeline", required=True)


def run(args: argparse.Namespace) -> int:
    from fastgen.data.toy.recipe import load_recipe, train_teacher

    overrides = [*args.overrides, *([] if args.seed is None else [f"seed={args.seed}"])]
    recipe = load_recipe(args.config, overrides)
    writable(args.output.absolute().parent)
    train_teacher(recipe, args.output, say=lambda line: say(args, line))
    emit(args, {"teacher": str(args.output)}, f"trained {args.output}; any diffusers loads it")
    return 0
