"""`fastgen viz`: what a model takes the finished image for at each step, and what a teacher's first steps do for diversity."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.cli.options import add_common, checked_device, emit, say, seed, writable
from fastgen.cli.targets import add_run_options, chosen_sampler, is_export, is_run, open_run, plain_folder, toy_guidance
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.eval.visualize import Actor, HandedOver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="TARGET", help='runs, exports, diffusers folders, or "toy"')
    parser.add_argument("--steps", type=int, metavar="N", help="network calls; default: a student's own, of others 8")
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="of teachers, 1 = off; default: the pipeline's own, toy 3"
    )
    parser.add_argument("--prompts", metavar="NAME_OR_FILE", help="a set that ships, or a file; default: the toy world's")
    parser.add_argument("--number", type=int, default=6, metavar="N", help="prompts to show (default 6)")
    parser.add_argument("--handover", metavar="TEACHER", help="measure the first target with this teacher's first steps")
    parser.add_argument("--handover-images", type=int, default=200, metavar="N", help="pictures for that (default 200)")
    parser.add_argument("--handover-steps", type=int, default=50, metavar="N", help="of the teacher by itself (default 50)")
    add_run_options(parser)
    add_common(parser, "folder for viz.html and the pictures (default: viz)")


def run(args: argparse.Namespace) -> int:
    from fastgen.eval.report import write_page
    from fastgen.eval.results import write_json
    from fastgen.eval.visualize import page, predictions, write_grid

    for flag in ("number", "handover_images", "handover_steps"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    output = writable(args.output or Path("viz"))
    prompts, first = prompts_of(args, args.number), seed(args)
    actors = [actor_of(target, args, args.steps) for target in args.targets]
    tracks = []
    for actor in actors:
        say(args, f"{actor.name}: {actor.sampler.steps} steps")
        tracks.append(predictions(actor, prompts, [first] * len(prompts)))
    found = [] if args.handover is None else measured(actors[0], args)
    files = [write_grid(track, output / f"predictions-{slug}.png") for track, slug in zip(tracks, slugs(tracks), strict=True)]
    report = write_page(output / "viz.html", page(tracks, found))
    result = {
        "report": str(report),
        "grids": [str(file) for file in files],
        "models": [{"name": each.name, "times": each.times, "distance_to_last": each.settled()} for each in tracks],
        "handovers": [each.record() for each in found],
    }
    write_json(output / "viz.json", result)
    lines = []
    for track in tracks:
        lines.append(f"{track.name}: distance to the last estimate {', '.join(f'{value:.3f}' for value in track.settled())}")
    for each in found:
        scores = ", ".join(f"{key} {value:.3g}" for key, value in each.measured.scores.items() if key in KEYS)
        lines.append(f"teacher makes {each.first} of {each.steps} steps, {each.calls} network calls: {scores}")
    emit(args, result, "\n".join([*lines, f"report  {report}"]))
    return 0


KEYS = ("fd", "accuracy", "clip_score", "diversity_ratio", "diversity_teacher_ratio")


def slugs(tracks: list) -> list[str]:
    """A file name for each track."""
    names = ["-".join(re.findall(r"\w+", track.name)) or "model" for track in tracks]
    return [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


def prompts_of(args: argparse.Namespace, number: int) -> list[str]:
    """The prompts to show."""
    from fastgen.eval.evaluation import toy_prompts
    from fastgen.eval.prompt_sets import read_prompt_set

    if args.prompts is not None:
        return list(read_prompt_set(args.prompts).subset(number).prompts)
    return toy_prompts(number, seeds_per_prompt=1, seed=seed(args))[0]


def actor_of(target: str, args: argparse.Namespace, steps: int | None) -> Actor:
    """A run, an export or a diffusers folder with the sampler that belongs to it.

    Raises UserError for an export whose sampler is not one of few steps.
    """
    from fastgen.eval.visualize import Actor
    from fastgen.export import read_export
    from fastgen.pipelines import load_pipeline
    from fastgen.samplers import FewStep, even_times

    name = Path(target).resolve().name if Path(target).exists() else target
    if is_run(target):
        loaded = open_run(target, args)
        sampler, _ = chosen_sampler(loaded, steps)
        return Actor(name, loaded.pipeline, loaded.student, sampler)
    folder = plain_folder(target)
    pipeline = load_pipeline(folder, device=checked_device(args), offline=args.offline)
    if not is_export(target):
        scale = toy_guidance(folder, args.guidance) or pipeline.default_guidance
        if pipeline.embeds_guidance:
            scale = max(1.0, scale)
        return Actor(name, pipeline, pipeline.frozen(), FewStep(even_times(steps or 8, pipeline.process), guidance=scale))
    described = read_export(Path(target))["sampler"]
    if described.get("class") != "FewStep" or not described.get("times"):
        raise UserError(f"{target}: its sampler is {described.get('class')}; name the run that it was exported from")
    times = tuple(described["times"]) if steps in (None, described["steps"]) else even_times(steps or 1, pipeline.process)
    return Actor(name, pipeline, pipeline.frozen(), FewStep(times, described["gamma"], described["guidance"]))


def measured(student: Actor, args: argparse.Namespace) -> list[HandedOver]:
    """Quality and diversity against the number of steps that the teacher makes."""
    from fastgen.eval.evaluation import toy_prompts
    from fastgen.eval.visualize import handovers
    from fastgen.eval.world import PHOTO, TOY

    teacher = actor_of(args.handover, args, args.handover_steps)
    say(args, f"{student.name}: the first steps by {teacher.name}, {args.handover_images} pictures each")
    if args.prompts is None:
        prompts, seeds, scenes = toy_prompts(args.handover_images, seed=seed(args))
        world = TOY
    else:
        prompts = [text for text in prompts_of(args, -(-args.handover_images // 2)) for _ in range(2)]
        seeds, scenes, world = [seed(args) + i % 2 for i in range(len(prompts))], None, PHOTO
    world = world if args.offline else world.online()
    guidance = getattr(teacher.sampler, "guidance", 1.0)
    return handovers(student, teacher, prompts, seeds, guidance=guidance, scenes=scenes, world=world)
