"""What a command is pointed at: a run, an export, a diffusers folder, the shipped teacher; runs are exported on the way."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.options import checked_device
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.samplers import Sampler
    from fastgen.training.run import LoadedRun

__all__ = ["add_run_options", "export_run", "is_export", "is_run", "open_run", "plain_folder", "steps_list", "toy_guidance"]


TOY_GUIDANCE = 3.0
"""The scale at which the shipped teacher is best; its pipeline's own, diffusers' 7.5, burns its colours."""


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="of a run: this checkpoint, or best; default: newest")
    parser.add_argument("--no-ema", action="store_true", help="of a run: the weights themselves, not their average")
    parser.add_argument(
        "--ema-sigma-rel", type=float, metavar="WIDTH", help="of a run with train.ema_posthoc: the average of this width"
    )


def is_run(target: str | Path) -> bool:
    return (Path(target) / "config.toml").is_file()


def is_export(target: str | Path) -> bool:
    return (Path(target) / "fastgen.json").is_file()


def open_run(target: str | Path, args: argparse.Namespace) -> LoadedRun:
    from fastgen.training.run import load_run

    device = checked_device(args)
    width = args.ema_sigma_rel
    if width is not None and args.no_ema:
        raise UserError(f"--ema-sigma-rel {width:g} and --no-ema contradict each other; leave one of them out")
    ema = not args.no_ema
    return load_run(Path(target), checkpoint=args.checkpoint, ema=ema, sigma_rel=width, device=device, offline=args.offline)


def export_run(
    loaded: LoadedRun,
    output: Path,
    *,
    format: str = "diffusers",
    steps: int | None = None,
    force: bool = False,
    more: dict[str, Any] | None = None,
) -> Path:
    """Export a run that was read back, with what its model card should tell and `more` of it.

    Raises UserError as `fastgen.export.export`.
    """
    from fastgen.export import export

    config = loaded.config
    record = {
        **{"method": config.method_name, "base": plain_folder(config.pipeline), "teacher_loras": config.teacher_loras},
        **({"teacher_weights": config.teacher_weights} if config.teacher_weights else {}),
        **({"quantize": config.quantize} if config.quantize != "none" else {}),
        **{"updates": loaded.step, "averaged": loaded.averaged, "config": config.to_toml()},
        **({"prompt": config.train.sample_prompts[0]} if config.train.sample_prompts else {}),
        **(more or {}),
    }
    sampler, trained = chosen_sampler(loaded, steps)
    return export(
        *(loaded.pipeline, loaded.student, sampler, output), format=format, record=record, trained=trained, force=force
    )


def chosen_sampler(loaded: LoadedRun, steps: int | None) -> tuple[Sampler, Sampler]:
    """The sampler for the number of steps that is asked for, and the one that the student was trained with.

    They differ where the method has none for that number: then the trained one's times are spread anew.
    """
    from fastgen.export.origin import shift_of
    from fastgen.samplers import FewStep, even_times

    own = loaded.method.sampler()
    try:
        asked = loaded.method.sampler(steps)
    except UserError:
        if steps is None or steps < 1 or not isinstance(own, FewStep):
            raise
        return replace(own, times=even_times(steps, loaded.student.process, shift_of(own.times) or 1.0)), own
    return asked, asked


def plain_folder(target: str) -> str:
    """The folder or hub id of a pipeline; "toy" is the one that ships."""
    from fastgen.training.run import TOY_TEACHER

    return str(TOY_TEACHER) if target == "toy" else target


def toy_guidance(folder: str, guidance: float | None) -> float | None:
    """The guidance scale asked for, or for the shipped teacher the one that it is good at; None: the pipeline's own."""
    if guidance is None and Path(folder).resolve() == Path(plain_folder("toy")).resolve():
        return TOY_GUIDANCE
    return guidance


def own_call(folder: str | Path) -> dict[str, Any]:
    """The arguments that a pipeline must be called with: those an export lists, none for other pipelines.

    Raises UserError for an export that is a LoRA, which is no pipeline by itself.
    """
    from fastgen.export import read_export

    if not is_export(folder):
        return {}
    description = read_export(Path(folder))
    if "phases" in description:
        raise UserError(
            f"{folder} is a student of several networks, one for each phase, and no pipeline by itself: its card says how to "
            "sample it; `fastgen sample RUN` draws with it, but it cannot be measured"
        )
    if (format := description.get("format")) not in ("diffusers", "fused"):
        raise UserError(
            f"{folder} is an export of format {format}, not a pipeline; name the run instead, "
            "or export it with --format diffusers"
        )
    return dict(description["call"])


def call_with(folder: str | Path, steps: int | None, guidance: float | None, *, force: bool = False) -> dict[str, Any]:
    """The arguments of a pipeline's call, with steps and guidance as asked for.

    Raises UserError where an export is asked for another call than it was made for and it is not forced, and where it lists
    its timesteps one by one and another number of steps is asked for.
    """
    from fastgen.export import read_export, require_own_call

    call = own_call(folder)
    if steps is not None and steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}")
    listed = next((key for key in ("timesteps", "sigmas") if key in call), None)
    if listed and steps not in (None, len(call[listed])):
        own = len(call[listed])
        raise UserError(f"--steps {steps}: {folder} lists its {listed} for {own} steps; export the run again for others")
    if steps is not None and not listed:
        call["num_inference_steps"] = steps
    if guidance is not None:
        call[guidance_key(folder, call)] = guidance
    if is_export(folder) and not force:
        require_own_call(read_export(Path(folder)), call)
    return call


def guidance_key(folder: str | Path, call: dict[str, Any]) -> str:
    """The argument that carries the guidance scale. Raises UserError for an export whose pipeline is called without one."""
    known = ("true_cfg_scale", "distilled_guidance_scale", "guidance_scale")
    if not is_export(folder):
        return known[-1]
    if (key := next((each for each in known if each in call), None)) is None:
        raise UserError(f"--guidance: {folder} is an export whose pipeline is called without a guidance scale; leave it out")
    return key


def steps_list(text: str) -> list[int]:
    """`1,2,4` as numbers; the type of an argument."""
    numbers = [int(each) if each.strip().isdigit() else 0 for each in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"steps are whole numbers from 1, such as 1,2,4; not {text!r}")
    return numbers
