"""`fastgen pipelines`: families with a line of their own, what fastgen sees in one pipeline, which classes it understands."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from fastgen.cli.options import add_common, checked_device, emit, say
from fastgen.cli.targets import plain_folder
from fastgen.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", nargs="?", help='a diffusers folder, a hub id, or "toy": load it and say what fastgen sees')
    parser.add_argument(
        "--check", action="store_true", help="try every text-to-image class of diffusers on a tiny random model"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="check these classes alone")
    add_common(parser, "file for the listing")


def run(args: argparse.Namespace) -> int:
    if args.check:
        return checked(args)
    if args.only:
        raise UserError("--only says which classes to check; give it together with --check")
    result = families() if args.pipeline is None else seen(args)
    if args.pipeline is None:
        lines = [f"{name}: {about['summary']}\n    {', '.join(about['classes'])}" for name, about in result.items()]
    else:
        width = max(map(len, result))
        plain = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in result.items()}
        lines = [f"{key:<{width}}  {value}" for key, value in plain.items()]
    emit(args, result, "\n".join(lines), args.output)
    return 0


def checked(args: argparse.Namespace) -> int:
    """The table of what fastgen understands of diffusers' classes."""
    if args.pipeline is not None:
        raise UserError(f"--check tries diffusers' own classes, not {args.pipeline!r}; name classes with --only")
    from fastgen.pipelines.check import check_all, summary, table

    rows = []
    for row in check_all(args.only):
        rows.append(row)
        say(args, f"{row.name}: {row.verdict}")
    result = {"classes": [asdict(row) for row in rows], "summary": summary(rows)}
    emit(args, result, f"{table(rows)}\n\n{summary(rows)}", args.output)
    return 0


def families() -> dict[str, Any]:
    from fastgen.pipelines import Pipeline
    from fastgen.pipelines.base import families as below

    rest = "whatever looks the same from outside: one denoising network, guidance batched, in two calls, embedded or none"
    known = {
        family.__name__: {"summary": (family.__doc__ or "").strip().split("\n")[0], "classes": list(family.handles)}
        for family in sorted(below(Pipeline), key=lambda family: family.__name__)
    }
    some = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
    return {**known, "Pipeline": {"summary": rest, "classes": [*some, "QwenImagePipeline", "..."]}}


def seen(args: argparse.Namespace) -> dict[str, Any]:
    """What the wrapped pipeline says of itself."""
    from fastgen.pipelines import load_pipeline

    pipeline = load_pipeline(plain_folder(args.pipeline), device=checked_device(args), offline=args.offline)
    weights = sum(each.numel() for each in pipeline.network.parameters())
    return {
        "class": type(pipeline.diffusers).__name__,
        "family": type(pipeline).__name__,
        "network": f"{type(pipeline.network).__name__}, {weights / 1e6:.1f} million weights",
        "process": type(pipeline.process).__name__,
        "predicts": pipeline.kind,
        "latent shape": list(pipeline.latent_shape),
        "default guidance": pipeline.default_guidance,
        "guidance is an input": pipeline.embeds_guidance,
        "feature layers": list(pipeline.feature_layers),
        "LoRA targets": list(pipeline.lora_targets),
    }
