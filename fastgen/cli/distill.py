"""`fastgen distill`: train what a TOML file describes; the same command goes on where it was interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgen.cli.options import add_common, checked_device, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file; `fastgen methods NAME` prints one to start from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file: train.lr=1e-5 (the last wins)")
    parser.add_argument(
        "--resume", default="auto", metavar="HOW",
        help="auto (default): go on with the run in --output if there is one; never: refuse to; or the path of a checkpoint",
    )  # fmt: skip
    parser.add_argument("--tracker", action="append", default=[], metavar="NAME", help="also log to tensorboard, wandb, ...")
    add_common(parser, "run directory", required=True)


def run(args: argparse.Namespace) -> int:
    from fastgen import config

    overrides = [*args.overrides, *([] if args.seed is None else [f"seed={args.seed}"])]
    wanted = config.load(args.config, overrides)
    from fastgen.training.run import distill

    device = checked_device(args) if args.device else None
    status = distill(
        wanted, args.output, resume=args.resume, device=device, offline=args.offline, quiet=args.quiet, trackers=args.tracker
    )
    if status == 0:
        result = {"run": str(args.output), "method": wanted.method_name, "steps": wanted.train.steps}
        emit(args, result, f"trained {args.output}; next: fastgen export {args.output} --output my-student")
    return status
