"""`fastgen sample`: pictures from a run, from an export, or from a teacher.

Picture number i of a prompt is drawn with seed `--seed` + i, each by itself, so a run gives the pictures that plain diffusers
gives of its export with `generator=torch.Generator().manual_seed(seed)`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.cli.kernels import add_attention, set_attention
from fastgen.cli.options import add_common, checked_device, emit, say, seed, writable
from fastgen.cli.targets import (
    add_run_options,
    call_with,
    chosen_sampler,
    is_export,
    is_run,
    open_run,
    plain_folder,
    toy_guidance,
)
from fastgen.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from fastgen.denoiser import Denoiser
    from fastgen.pipelines import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help='a run directory, an export or any diffusers folder, or "toy" for the shipped teacher')
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to draw: "a small red circle, dark background"')
    parser.add_argument("--steps", type=int, metavar="N", help="network calls; default: the student's own")
    parser.add_argument("--number", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale, 1 = off; default: the student's own")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="steer away from this, of a student sampled without guidance (NASA)"
    )
    parser.add_argument(
        "--negative-scale",
        type=float,
        default=0.1,
        metavar="A",
        help="how far, 0 to 1: 0.1 for SD 1.5, 0.5 for PixArt (default 0.1)",
    )
    parser.add_argument("--force", action="store_true", help="sample an export or a run otherwise than it was trained to be")
    add_attention(parser)
    add_run_options(parser)
    add_common(parser, "folder for the pictures (default: samples)")


def run(args: argparse.Namespace) -> int:
    if args.number < 1:
        raise UserError(f"--number must be at least 1, not {args.number}")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.negative_scale <= 1:
        raise UserError(f"--negative-scale must be between 0 and 1, not {args.negative_scale:g}")
    first, output = seed(args), writable(args.output or Path("samples"))
    drawn = from_run(args, first) if is_run(args.target) else from_diffusers(args, first)
    pictures = []
    for prompt, number, picture in drawn:
        output.mkdir(parents=True, exist_ok=True)
        path = free_name(output, prompt)
        partial = path.with_suffix(".partial")
        picture.save(partial, format="png")
        partial.rename(path)
        pictures.append({"path": str(path), "prompt": prompt, "seed": number})
        say(args, f"{path}  (seed {number})")
    emit(args, pictures, f"{len(pictures)} pictures in {output}")
    return 0


def free_name(folder: Path, prompt: str) -> Path:
    """A name that tells the prompt and is not taken."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60] or "picture"
    return next(path for path in (folder / f"{words}-{number:03d}.png" for number in count()) if not path.exists())


def from_run(args: argparse.Namespace, first: int) -> Iterator[tuple[str, int, Image.Image]]:
    import torch

    from fastgen.export import require_trained
    from fastgen.samplers import FewStep
    from fastgen.training.sharding import reached

    loaded = open_run(args.target, args)
    (sampler, trained), pipeline = chosen_sampler(loaded, args.steps), loaded.pipeline
    set_attention(args, (each.network for each in reached(loaded.method)[0]))
    if args.guidance is not None:
        if not isinstance(sampler, FewStep):
            raise UserError(f"--guidance: the sampler of {loaded.config.method_name} takes none")
        sampler = replace(sampler, guidance=args.guidance)
    if not args.force:
        require_trained(sampler, trained)
    guidance = 1.0 if loaded.student.embeds_guidance else getattr(sampler, "guidance", 1.0)
    with away(args, pipeline, loaded.student, guidance):
        for prompt in args.prompts:
            condition = pipeline.encode_prompts([prompt])
            for number in range(first, first + args.number):
                generator = torch.Generator().manual_seed(number)
                noise = torch.randn(1, *pipeline.latent_shape, generator=generator).to(pipeline.device)
                with torch.no_grad():
                    latents = sampler.sample(loaded.student, noise, condition, generator=generator)
                    image = pipeline.decode(latents)[0]
                yield prompt, number, as_picture((image.float() + 1) / 2)


def from_diffusers(args: argparse.Namespace, first: int) -> Iterator[tuple[str, int, Image.Image]]:
    import torch

    from fastgen.pipelines import load_pipeline
    from fastgen.pipelines.base import network_name

    where = plain_folder(args.target)
    call = call_with(where, args.steps, toy_guidance(where, args.guidance), force=args.force)
    steered: AbstractContextManager[None] = nullcontext()
    if is_export(where) and args.negative_prompt is None:
        from fastgen.eval.generate import load_pipeline as load_plain

        pipeline = load_plain(where, device=checked_device(args))
    else:
        loaded = load_pipeline(where, device=checked_device(args), offline=args.offline)
        pipeline, scale = loaded.diffusers, call.get("guidance_scale")
        own = loaded.default_guidance if scale is None else scale + loaded.form.guidance_offset
        steered = away(args, loaded, loaded.frozen(), 1.0 if loaded.embeds_guidance else own)
    pipeline.set_progress_bar_config(disable=True)
    set_attention(args, [getattr(pipeline, network_name(pipeline))])
    with steered:
        for prompt in args.prompts:
            for number in range(first, first + args.number):
                generator = torch.Generator().manual_seed(number)
                image = pipeline(prompt=prompt, generator=generator, output_type="pt", **call).images[0]
                yield prompt, number, as_picture(image.float())


def away(args: argparse.Namespace, pipeline: Pipeline, denoiser: Denoiser, guidance: float) -> AbstractContextManager[None]:
    """Within, `denoiser` is steered away from the negative prompt, where there is one."""
    from fastgen.pipelines.negative import steered_away

    if args.negative_prompt is None:
        return nullcontext()
    if guidance > 1:
        raise UserError(
            f"--negative-prompt is for students sampled without guidance, and this one is sampled with guidance {guidance:g}"
        )
    negative = pipeline.encode_prompts([args.negative_prompt])
    return steered_away(denoiser, negative, pipeline.latent_shape, args.negative_scale)


def as_picture(image: Tensor) -> Image.Image:
    """A picture from channels first, 0 to 1."""
    from PIL import Image

    values = (image.clamp(0, 1) * 255).round().to("cpu").byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values)
