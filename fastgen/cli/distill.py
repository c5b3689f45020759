"""`fastgen distill`: train what a TOML file describes; the same command goes on where it was interrupted."""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.cli.options import add_common, checked_device, emit
from fastgen.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file; `fastgen methods NAME` prints one to start from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file: train.lr=1e-5 (the last wins)")
    parser.add_argument(
        "--resume", default="auto", metavar="HOW",
        help="auto (default): go on with the run in --output if there is one; never: refuse to; or the path of a checkpoint",
    )  # fmt: skip
    parser.add_argument("--tracker", action="append", default=[], metavar="NAME", help="also log to tensorboard, wandb, ...")
    parser.add_argument("--print-config", action="store_true", help="print the run as it is resolved, as TOML, and stop")
    parser.add_argument("--json-schema", action=PrintSchema, help="print the JSON schema of config files, and stop")
    add_common(parser, "run directory")


class PrintSchema(argparse.Action):
    """Like `--version`: prints and leaves, whatever else is missing."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        from fastgen.cli.json_schema import run_schema

        print(json.dumps(run_schema(), indent=1, ensure_ascii=False))
        parser.exit()


def run(args: argparse.Namespace) -> int:
    from fastgen import config

    if args.output is None and not args.print_config:
        raise UserError("--output is missing; it must be the folder of the run")
    overrides = [*args.overrides, *([] if args.seed is None else [f"seed={args.seed}"])]
    wanted = config.load(args.config, overrides)
    if args.print_config:
        text = wanted.to_toml()
        emit(args, tomllib.loads(text), text, args.output)
        return 0
    from fastgen.training.run import distill

    device = checked_device(args) if args.device else None
    status = distill(
        wanted, args.output, resume=args.resume, device=device, offline=args.offline, quiet=args.quiet, trackers=args.tracker
    )
    if status == 0 and os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        result = {"run": str(args.output), "method": wanted.method_name, "steps": wanted.train.steps}
        emit(args, result, f"trained {args.output}; next: fastgen export {args.output} --output my-student")
    return status
