"""`fastgen eval`: measure a run, an export or a teacher, always through plain diffusers."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.kernels import add_attention, set_attention
from fastgen.cli.options import add_common, checked_device, emit, say, seed
from fastgen.cli.targets import add_run_options, call_with, export_run, is_run, open_run, plain_folder, toy_guidance
from fastgen.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastgen.eval import Evaluation, World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help='a run directory, an export or any diffusers folder, or "toy" for the shipped teacher')
    parser.add_argument("--steps", type=int, metavar="N", help="network calls; default: the student's own")
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="1 = off; default: the student's own, 3 for the toy teacher"
    )
    add_protocol(parser)
    parser.add_argument("--force", action="store_true", help="sample an export or a run otherwise than it was trained to be")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="keep the pictures here, and the record beside them")
    parser.add_argument(
        "--geneval", type=Path, metavar="FOLDER", help="the pictures in GenEval's layout too, for its own scorer"
    )
    parser.add_argument(
        "--latency", action="store_true", help="seconds and memory too, at batch 1 and 8, with nothing else running"
    )
    add_attention(parser)
    add_run_options(parser)
    add_common(parser, "JSON file for the whole record")


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The flags that say on which pictures candidates are compared, and by which networks."""
    protocol = parser.add_argument_group("what is measured")
    protocol.add_argument("--number", type=int, default=1000, metavar="N", help="pictures (default 1000); scores depend on it")
    protocol.add_argument(
        "--prompts", metavar="NAME_OR_FILE", help="a set that ships, or a file; default: held-out prompts of the toy world"
    )
    protocol.add_argument(
        "--reference", type=Path, metavar="FOLDER_OR_NPZ", help="real pictures to compare with, or statistics of their features"
    )
    protocol.add_argument("--seeds-per-prompt", type=int, default=2, metavar="N", help="pictures of one prompt (default 2)")
    protocol.add_argument("--metrics", metavar="all|A,B", help="only these; default: the usual ones that there is evidence for")
    protocol.add_argument("--batch", type=int, default=64, metavar="N", help="pictures computed at once (default 64)")
    protocol.add_argument(
        "--weights", type=Path, metavar="FOLDER", help="where weights of measuring networks are looked for first"
    )
    protocol.add_argument("--features", metavar="NAME", help="features of distances: inception-v3-compat, dinov2-vit-b-14, ...")
    protocol.add_argument("--clip", metavar="MODEL/WEIGHTS", help="open_clip's network of the CLIP score (ViT-B-32/openai)")


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments common to `evaluate` and `sweep`. Raises UserError for what neither can take."""
    from fastgen.eval.prompt_sets import read_prompt_set

    for flag in ("number", "seeds_per_prompt", "batch"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    if args.reference is not None and not args.reference.exists():
        raise UserError(f"--reference {args.reference}: is neither a folder of pictures nor a file of statistics")
    prompts: dict[str, Any] = {"prompts": None}
    if args.prompts is not None:
        chosen = read_prompt_set(args.prompts).subset(-(-args.number // args.seeds_per_prompt))
        prompts = {"prompts": list(chosen.prompts), "prompts_from": chosen.name}
    return {
        **prompts,
        **{"reference": args.reference, "seed": seed(args), "seeds_per_prompt": args.seeds_per_prompt, "batch": args.batch},
        **{"device": checked_device(args), "world": world(args)},
    }


def world(args: argparse.Namespace) -> World:
    """The measuring networks that are asked for. Raises UserError for a folder of weights that does not exist."""
    from fastgen.eval import PHOTO, TOY

    if args.weights is not None and not args.weights.is_dir():
        raise UserError(f"--weights {args.weights}: is not a folder")
    chosen = TOY if args.prompts is None else PHOTO
    named = {name: value for name in ("features", "clip", "weights") if (value := getattr(args, name)) is not None}
    return replace(chosen, offline=args.offline, **named)


def run(args: argparse.Namespace) -> int:
    from fastgen.eval import evaluate

    if args.output is not None and args.output.exists():
        raise UserError(f"--output {args.output}: exists already; name a new file or remove it")
    if args.geneval is not None and (args.prompts is None or args.geneval.exists()):
        problem = "needs GenEval's prompts (--prompts)" if args.prompts is None else "exists already; name a new folder"
        raise UserError(f"--geneval {args.geneval}: {problem}")
    asked = protocol(args)
    with tempfile.TemporaryDirectory(prefix="fastgen-eval-") as aside:
        folder, loaded = plain_folder(args.target), None
        if is_run(args.target):
            say(args, f"exporting {args.target}, so that plain diffusers is measured")
            place = Path(aside) / Path(args.target).resolve().name
            loaded = open_run(args.target, args)
            folder = str(export_run(loaded, place, steps=args.steps, force=args.force))
        call = call_with(folder, args.steps, toy_guidance(folder, args.guidance), force=args.force)
        guidance, steps = call.pop("guidance_scale", None), call.pop("num_inference_steps", None)
        pictures: Path | None = args.images
        if pictures is None and args.geneval is not None:
            pictures = Path(aside) / "pictures"
        evaluation = evaluate(
            folder, number=args.number, steps=steps, guidance=guidance, call=call, only=names(args.metrics),
            progress=lambda done, total: say(args, f"{done} of {total} pictures"), images_folder=pictures,
            prepare=lambda pipeline: attend(args, pipeline), **asked,
        )  # fmt: skip
        if args.geneval is not None and pictures is not None:
            arrange(pictures, evaluation.prompts, args)
        latency = None
        if args.latency:
            say(args, "latency")
            prompt = evaluation.prompts[0]
            latency = latency_of(args, folder, asked["device"], steps=steps, guidance=guidance, call=call, prompt=prompt)
    evaluation.settings["target"] = evaluation.protocol["model"]["name"] = args.target
    if loaded is not None:
        evaluation.settings |= {"updates": loaded.step, "averaged": loaded.averaged}
    if latency is not None:
        evaluation.settings["latency"] = latency
    kept = None if args.images is None else args.images / "evaluation.json"
    for record in (each for each in (args.output, kept) if each is not None):
        evaluation.save(record)
    lines = [*scores_as_lines(evaluation), *([] if latency is None else latency_as_lines(latency))]
    emit(args, evaluation.record(), "\n".join([*lines, *(f"note: {each}" for each in evaluation.notes)]))
    return 0


def arrange(pictures: Path, prompts: list[str], args: argparse.Namespace) -> None:
    """The pictures in GenEval's layout, with its own records where the file of prompts holds them."""
    from fastgen.eval.geneval import write_geneval
    from fastgen.eval.images import PictureFolder
    from fastgen.eval.prompt_sets import read_prompt_set

    known = read_prompt_set(args.prompts)
    records = [extra | {"prompt": text} for text, extra in zip(known.prompts, known.extra, strict=True)]
    own = records if all("tag" in record for record in records) else None
    count = write_geneval(PictureFolder(pictures), prompts, args.geneval, records=own)
    say(args, f"{count} prompts in GenEval's layout: {args.geneval}")


def scores_as_lines(evaluation: Evaluation) -> list[str]:
    """Every score with half the width of its 95 % interval, where it has one."""
    width = max(map(len, evaluation.scores), default=0)
    lines = []
    for name, value in evaluation.scores.items():
        low, high = evaluation.intervals.get(name, (value, value))
        lines.append(f"{name:<{width}}  {value:.4g}" + (f" ± {(high - low) / 2:.2g}" if high > low else ""))
    return lines


def attend(args: argparse.Namespace, pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline whose network has the attention kernel that is asked for."""
    from fastgen.pipelines.base import network_name

    set_attention(args, [getattr(pipeline, network_name(pipeline))])
    return pipeline


def latency_of(args: argparse.Namespace, folder: str, device: str, **options: Any) -> dict[str, Any]:
    """Latency and memory of the pipeline in `folder`, called as it was measured."""
    from fastgen.eval.generate import load_pipeline
    from fastgen.eval.latency import measure_latency

    return measure_latency(attend(args, load_pipeline(folder, device=device)), **options)


def latency_as_lines(latency: dict[str, Any]) -> list[str]:
    """A line for each batch size."""
    lines = [f"latency on {latency['device']}, {latency['precision']}, {latency['attention']} attention"]
    for each in latency["batches"]:
        told = each.get("failed") or f"{each['seconds']:.3g} s, {each['images_per_second']:.3g} pictures a second"
        lines.append(f"  batch {each['batch']}: {told}")
    return lines


def names(text: str | None) -> list[str] | None:
    """The metrics in `a,b`. Raises UserError for one that does not exist."""
    from fastgen.eval import metrics
    from fastgen.schema import nearest

    wanted = None if text is None else [each.strip() for each in text.split(",")]
    for each in [] if wanted == ["all"] else wanted or []:
        if each not in metrics():
            raise UserError(f"--metrics: there is no metric '{each}'{nearest(each, metrics())}")
    return wanted
