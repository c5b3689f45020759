"""`fastgen plan`: what a run keeps in memory, role by role, and its peak, before any weight is read."""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.options import add_common, emit
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.plan.record import Plan

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
COLUMNS = ("weights", "gradients", "optimizer", "ema")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file; `fastgen methods NAME` prints one to start from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file: train.batch=8 (the last wins)")
    parser.add_argument("--memory", metavar="SIZE", help="say what to change so that the run fits, such as 24GB")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="also the peak of each of N GPUs under sharding")
    add_common(parser, "file for the plan")


def run(args: argparse.Namespace) -> int:
    from fastgen import config

    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: must be at least 1")
    memory = None if args.memory is None else parse_size(args.memory)
    overrides = [*args.overrides, *([] if args.seed is None else [f"seed={args.seed}"])]
    wanted = config.load(args.config, overrides)
    from fastgen.plan.advice import advise
    from fastgen.plan.estimate import estimate

    # torch's own code asks a tensor without values where its data lies.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    device = "cpu" if args.device == "cpu" else "cuda"
    plan = estimate(wanted, offline=args.offline, device=device)
    result = plan.as_json() | {"gpus": args.gpus, "peak_sharded": plan.sharded(args.gpus)}
    text = shown(plan, args.gpus)
    if memory is not None:
        advice = advise(wanted, plan, memory, offline=args.offline, device=device)
        result |= {"memory": memory, **advice.as_json()}
        text += "\n\n" + advice.in_words()
    emit(args, result, text, args.output)
    return 0


def parse_size(text: str) -> int:
    """Bytes of "24GB", "24 GB", "24GiB" or "500MB". Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise UserError(f"--memory {text[:60]!r}: must be a number and a unit, such as 24GB or 24GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size(number: float) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}" if number < 100 * factor else f"{number / factor:.0f} {unit}"
    return f"{number:.0f} B" if number else "-"


def count(number: int) -> str:
    """A number of parameters."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number) if number else "-"


def shown(plan: Plan, gpus: int) -> str:
    """The plan as a table and a few lines."""
    head = ["", "parameters", "trainable", *COLUMNS]
    lines = [[row.name, count(row.parameters), count(row.trainable), *cells(row)] for row in plan.rows]
    total = [sum(getattr(row, column) for row in plan.rows) for column in COLUMNS]
    counts = (count(sum(row.parameters for row in plan.rows)), count(sum(row.trainable for row in plan.rows)))
    table = [head, *lines, ["together", *counts, *map(size, total)]]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    aligned = [
        line[0].ljust(widths[0]) + "".join(f"  {x:>{w}}" for x, w in zip(line[1:], widths[1:], strict=True)) for line in table
    ]
    shape = " x ".join(map(str, plan.latent_shape))
    said = [
        f"{plan.method} on {plan.pipeline} ({plan.network}), batch {plan.batch} in parts of {plan.micro_batch}, "
        f"latents {shape}, {plan.precision}",
        "",
        *(line.rstrip() for line in aligned),
        "",
        *([f"update {plan.update + 1}, the most expensive of {plan.looked_at} looked at"] if plan.looked_at > 1 else []),
        f"before training: peak {size(plan.preparing)}",
        f"kept between updates: {size(plan.held)}",
        *(f"turn of {t.player}: {size(t.saved)} saved for backward, peak {size(t.peak)}" for t in plan.turns),
        f"sample grids: peak {size(plan.samples)}",
        f"peak on one GPU: {size(plan.peak)}",
    ]
    if gpus > 1:
        said.append(f"peak on each of {gpus} GPUs: {size(plan.peak)}, at most {size(plan.sharded(gpus))} if roles were sharded")
    return "\n".join(said)


def cells(row: Any) -> list[str]:
    return [size(getattr(row, column)) for column in COLUMNS]
