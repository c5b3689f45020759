"""`fastgen export`: what plain diffusers loads, scheduler included."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgen.cli.options import add_common, emit, say, writable
from fastgen.cli.targets import add_run_options, export_run, open_run
from fastgen.errors import UserError

FORMATS = ("diffusers", "diffusers-lora")  # fastgen.export's, told without importing it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--format", default="diffusers", metavar="NAME", help=" or ".join(FORMATS))
    parser.add_argument("--steps", type=int, metavar="N", help="network calls of its sampler; default: the student's own")
    parser.add_argument("--force", action="store_true", help="replace a previous export")
    add_run_options(parser)
    add_common(parser, "folder to make", required=True)


def run(args: argparse.Namespace) -> int:
    from fastgen.export import read_export

    if args.format not in FORMATS:
        raise UserError(f"--format {args.format}: must be one of {', '.join(FORMATS)}")
    writable(args.output)
    if args.output.is_dir() and any(args.output.iterdir()) and not args.force:
        raise UserError(f"--output {args.output}: exists already; name a new folder, or replace an export with --force")
    loaded = open_run(args.run, args)
    say(args, f"exporting {loaded.checkpoint}{' (averaged weights)' if loaded.averaged else ''}")
    folder = export_run(loaded, args.output, format=args.format, steps=args.steps)
    description = read_export(folder)
    call = ", ".join(f"{key}={value!r}" for key, value in description["call"].items())
    result = {"output": str(folder), "format": args.format, "updates": loaded.step, "call": description["call"]}
    emit(args, result, f"{folder}: {description['pipeline']}, call it with {call}")
    return 0
