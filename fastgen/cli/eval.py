"""`fastgen eval`: measure a run, an export or a teacher, always through plain diffusers."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgen.cli.options import add_common, checked_device, emit, say, seed
from fastgen.cli.targets import add_run_options, call_with, export_run, is_run, open_run, plain_folder
from fastgen.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help='a run directory, an export or any diffusers folder, or "toy" for the shipped teacher')
    parser.add_argument("--steps", type=int, metavar="N", help="network calls; default: the student's own")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale, 1 = off; default: the student's own")
    add_protocol(parser)
    parser.add_argument("--force", action="store_true", help="sample an export or a run otherwise than it was trained to be")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="keep the pictures here")
    add_run_options(parser)
    add_common(parser, "JSON file for the whole record")


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The flags that say on which pictures candidates are compared."""
    protocol = parser.add_argument_group("what is measured")
    protocol.add_argument("--number", type=int, default=1000, metavar="N", help="pictures (default 1000); scores depend on it")
    protocol.add_argument("--prompts", metavar="FILE", help="one prompt a line; default: held-out prompts of the toy world")
    protocol.add_argument("--reference", type=Path, metavar="FOLDER", help="real pictures to compare with, beside --prompts")
    protocol.add_argument("--seeds-per-prompt", type=int, default=2, metavar="N", help="pictures of one prompt (default 2)")
    protocol.add_argument("--metrics", metavar="A,B", help="only these; default: all that there is evidence for")
    protocol.add_argument("--batch", type=int, default=64, metavar="N", help="pictures computed at once (default 64)")


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments common to `evaluate` and `sweep`. Raises UserError for what neither can take."""
    from fastgen.data.prompts import read_prompts
    from fastgen.eval import PHOTO, TOY

    for flag in ("number", "seeds_per_prompt", "batch"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    if args.reference is not None and not args.reference.is_dir():
        raise UserError(f"--reference {args.reference}: is not a folder of pictures")
    world = TOY if args.prompts is None else PHOTO
    return {
        **{"prompts": None if args.prompts is None else read_prompts(args.prompts), "reference": args.reference},
        **{"seed": seed(args), "seeds_per_prompt": args.seeds_per_prompt, "batch": args.batch, "device": checked_device(args)},
        "world": world if args.offline else world.online(),
    }


def run(args: argparse.Namespace) -> int:
    from fastgen.eval import evaluate

    if args.output is not None and args.output.exists():
        raise UserError(f"--output {args.output}: exists already; name a new file or remove it")
    asked = protocol(args)
    with tempfile.TemporaryDirectory(prefix="fastgen-eval-") as aside:
        folder, loaded = plain_folder(args.target), None
        if is_run(args.target):
            say(args, f"exporting {args.target}, so that plain diffusers is measured")
            place = Path(aside) / Path(args.target).resolve().name
            loaded = open_run(args.target, args)
            folder = str(export_run(loaded, place, steps=args.steps, force=args.force))
        call = call_with(folder, args.steps, args.guidance, force=args.force)
        guidance, steps = call.pop("guidance_scale", None), call.pop("num_inference_steps", None)
        evaluation = evaluate(
            folder, number=args.number, steps=steps, guidance=guidance, call=call, only=names(args.metrics),
            images_folder=args.images, progress=lambda done, total: say(args, f"{done} of {total} pictures"), **asked,
        )  # fmt: skip
    record = json.loads(json.dumps(asdict(evaluation), default=str))
    record["settings"]["target"] = args.target
    if loaded is not None:
        record["settings"] |= {"updates": loaded.step, "averaged": loaded.averaged}
    if args.output is not None:
        emit(argparse.Namespace(json=True), record, "", args.output)
    width = max(map(len, evaluation.scores), default=0)
    lines = [f"{name:<{width}}  {value:.4g}" for name, value in evaluation.scores.items()]
    emit(args, record, "\n".join([*lines, *(f"note: {each}" for each in evaluation.notes)]))
    return 0


def names(text: str | None) -> list[str] | None:
    """The metrics in `a,b`. Raises UserError for one that does not exist."""
    from fastgen.eval import metrics
    from fastgen.schema import nearest

    wanted = None if text is None else [each.strip() for each in text.split(",")]
    for each in wanted or []:
        if each not in metrics():
            raise UserError(f"--metrics: there is no metric '{each}'{nearest(each, metrics())}")
    return wanted
