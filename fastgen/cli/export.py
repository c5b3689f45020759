"""`fastgen export`: what plain diffusers, kohya-ss' scripts and ComfyUI load, scheduler included."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.options import add_common, emit, say, writable
from fastgen.cli.targets import add_run_options, export_run, open_run
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.training.run import LoadedRun

FORMATS = ("diffusers", "diffusers-lora", "kohya", "comfyui", "fused", "single-file")  # fastgen.export's, not importing it
WEIGHTS = ("ema", "raw")
EVALUATION = "evaluation.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--format", default="diffusers", metavar="NAME", help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    parser.add_argument("--weights", metavar="WHICH", help="ema or raw; default: the averaged ones where the run averages")
    parser.add_argument("--steps", type=int, metavar="N", help="network calls of its sampler; default: the student's own")
    parser.add_argument(
        "--force", action="store_true", help="replace a previous export, and take steps that the student was not trained for"
    )
    add_run_options(parser)
    add_common(parser, "folder to make", required=True)


def run(args: argparse.Namespace) -> int:
    if args.format not in FORMATS:
        raise UserError(f"--format {args.format}: must be one of {', '.join(FORMATS)}")
    if args.weights not in (None, *WEIGHTS):
        raise UserError(f"--weights {args.weights}: must be one of {', '.join(WEIGHTS)}")
    if args.weights == "ema" and args.no_ema:
        raise UserError("--weights ema and --no-ema contradict each other; leave one of them out")
    args.no_ema = args.no_ema or args.weights == "raw"
    writable(args.output)
    if args.output.is_dir() and any(args.output.iterdir()) and not args.force:
        raise UserError(f"--output {args.output}: exists already; name a new folder, or replace an export with --force")
    loaded = open_run(args.run, args)
    if args.weights == "ema" and not loaded.averaged:
        raise UserError(f"--weights ema: {loaded.checkpoint} holds no average (train.ema is off); export it with --weights raw")

    from fastgen.export import read_export

    say(args, f"exporting {loaded.checkpoint}{' (averaged weights)' if loaded.averaged else ''}")
    options = {"format": args.format, "steps": args.steps, "force": args.force}
    folder = export_run(loaded, args.output, **options, more=seen_in(args.run, loaded))
    description = read_export(folder)
    call = ", ".join(f"{key}={value!r}" for key, value in description["call"].items())
    result = {
        **{"output": str(folder), "format": args.format, "updates": loaded.step},
        **{"weights": WEIGHTS[not loaded.averaged], "call": description["call"]},
    }
    emit(args, result, f"{folder}: {description['pipeline']}, call it with {call}")
    return 0


def seen_in(run: Path, loaded: LoadedRun) -> dict[str, Any]:
    """What a run's directory has to show in the model card: its newest grid of samples, its evaluation where it has one."""
    samples, evaluation = newest_samples(run, loaded.step), read_evaluation(run)
    measured = (evaluation or {}).get("settings", {})
    if (measured.get("updates", loaded.step), measured.get("averaged", loaded.averaged)) != (loaded.step, loaded.averaged):
        evaluation = None  # Of another student.
    return {
        **({} if samples is None else {"samples": str(samples)}),
        **({} if evaluation is None else {"evaluation": evaluation}),
    }


def newest_samples(run: Path, step: int) -> Path | None:
    """The grid of a run's samples that was drawn last before or at update `step`."""
    grids = sorted((run / "samples").glob("step-*.png"))
    return next((grid for grid in reversed(grids) if int(grid.stem.removeprefix("step-")) <= step), None)


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """The record that `fastgen eval RUN --output RUN/evaluation.json` leaves. Raises UserError for a file that is none."""
    path = run / EVALUATION
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        {key: float(value) for key, value in record["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} is not a record of fastgen eval: it must be a JSON object with scores") from problem
    return record
