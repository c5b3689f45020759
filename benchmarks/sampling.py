"""Exported students in plain diffusers against fastgen's own sampler, and against their teacher: the record sampling.json.

    python -m benchmarks.sampling [--steps 1 2 4 8] [--batches 1 8] [--rounds 7]

The toy teacher and a student of it, trained in full or as LoRA, exported as a diffusers folder and as a LoRA, and loaded by
plain diffusers into the same process. In turns, CPU seconds on one thread: diffusers' pipeline called with prompts and noise,
as the export says; fastgen from the same prompts and noise (`encode_prompts`, the sampler, `decode`); both once more with
prompts encoded before and without decoding, so that only the calls of the network and what is around them is left; encoding
alone (fastgen also encodes what guidance leads away from); and the teacher's pipeline with guidance at 50 steps. Every other
round goes backwards. Ratios are medians of the ratios within a round, and the latents of the two must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor

from benchmarks.methods import ROOT, environment, write
from fastgen.denoiser import Denoiser
from fastgen.export import export
from fastgen.pipelines import LoraOptions, Pipeline, load_pipeline
from fastgen.samplers import FewStep, even_times
from fastgen.training.run import TOY_TEACHER

RECORD = ROOT / "benchmarks" / "results" / "sampling.json"
LAYOUTS = {"diffusers": "full", "diffusers-lora": "lora"}
TEACHER_STEPS, GUIDANCE = 50, 3.0
PROMPTS = ("a small red circle", "a large blue ring", "a green square left of a red circle")
ALIKE = 1e-3
"""How far apart the latents of the two may be, relative to their size."""


def make_student(mode: str) -> tuple[Pipeline, Denoiser]:
    """The toy teacher and a student that has moved a little."""
    roles: Any = {"student": mode}
    pipeline = load_pipeline(str(TOY_TEACHER), roles=roles, lora=LoraOptions(rank=16), offline=True)
    torch.manual_seed(1)
    student = pipeline.trainable("student")
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    return pipeline, student.requires_grad_(False).eval()


def plain(folder: Path, layout: str) -> Any:
    """What a user of diffusers makes of the export."""
    if layout == "diffusers":
        found = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    else:
        found = DiffusionPipeline.from_pretrained(str(TOY_TEACHER), local_files_only=True)
        found.load_lora_weights(str(folder))
        found.scheduler = type(found.scheduler).from_pretrained(str(folder), subfolder="scheduler")
    found.set_progress_bar_config(disable=True)
    return found


def ways(
    pipeline: Pipeline, student: Denoiser, theirs: Any, steps: int, batch: int
) -> tuple[dict[str, Callable[[], object]], Callable[[], float]]:
    """What is timed, and the relative difference of the latents that the two make."""
    sampler = FewStep(even_times(steps, pipeline.process))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    noise = torch.randn(batch, *pipeline.latent_shape, generator=torch.Generator().manual_seed(batch))
    condition = pipeline.encode_prompts(prompts)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0}
    embeddings = theirs.encode_prompt(prompts, torch.device("cpu"), 1, False)[0]

    @torch.no_grad()
    def own_whole() -> Tensor:
        return (pipeline.decode(sampler.sample(student, noise, pipeline.encode_prompts(prompts))) + 1) / 2

    @torch.no_grad()
    def own_calls() -> Tensor:
        return sampler.sample(student, noise, condition)

    def plain_whole() -> Tensor:
        return theirs(prompts, latents=noise, output_type="pt", **call).images

    def plain_calls() -> Tensor:
        return theirs(prompt_embeds=embeddings, latents=noise, output_type="latent", **call).images

    def apart() -> float:
        one, other = own_calls(), plain_calls()
        return float((one - other).norm() / other.norm())

    return {
        "fastgen": own_whole,
        "diffusers": plain_whole,
        "fastgen, calls": own_calls,
        "diffusers, calls": plain_calls,
        "fastgen, encoding": lambda: pipeline.encode_prompts(prompts),
        "diffusers, encoding": lambda: theirs.encode_prompt(prompts, torch.device("cpu"), 1, False),
    }, apart


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way in each round, to and fro; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for place in range(rounds + 1):
        for name in list(ways)[:: 1 if place % 2 else -1]:
            start = time.process_time()
            ways[name]()
            if place:
                seconds[name].append(time.process_time() - start)
    return seconds


def teacher_seconds(batch: int, rounds: int) -> float:
    """CPU seconds of the teacher's pipeline, guided."""
    teacher: Any = DiffusionPipeline.from_pretrained(str(TOY_TEACHER), local_files_only=True)
    teacher.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    call: dict[str, Any] = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return statistics.median(in_turns({"teacher": lambda: teacher(prompts, **call)}, rounds)["teacher"])


def over(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def measure(layout: str, folder: Path, teacher: dict[int, float], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of steps and batch of one layout; `teacher` has the teacher's seconds at each batch."""
    pipeline, student = make_student(LAYOUTS[layout])
    where = export(pipeline, student, FewStep(even_times(4, pipeline.process)), folder / layout, format=layout)
    theirs, rows = plain(where, layout), []
    for batch in args.batches:
        for steps in args.steps:
            each, apart = ways(pipeline, student, theirs, steps, batch)
            if (difference := apart()) > ALIKE:
                raise SystemExit(f"{layout}, {steps} steps: fastgen's latents and diffusers' differ by {difference:.1e}")
            seconds = in_turns(each, args.rounds)
            row = {
                "layout": layout,
                "batch": batch,
                "steps": steps,
                "difference": difference,
                "ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
                "fastgen_over_diffusers": over(seconds, "fastgen", "diffusers"),
                "fastgen_over_diffusers_calls": over(seconds, "fastgen, calls", "diffusers, calls"),
                "ms_teacher": 1000 * teacher[batch],
                "teacher_over_student": teacher[batch] / statistics.median(seconds["diffusers"]),
            }
            rows.append(row)
            print(
                f"{layout:<15} batch {batch:<3}{steps:>2} steps {row['ms']['diffusers']:8.1f} ms   fastgen / diffusers"
                f" {row['fastgen_over_diffusers']:.3f}, calls alone {row['fastgen_over_diffusers_calls']:.3f}"
                f"   teacher / student {row['teacher_over_student']:.1f}",
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher-rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    teacher = {batch: teacher_seconds(batch, args.teacher_rounds) for batch in args.batches}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastgen-sampling-") as folder:
        for layout in args.layouts:
            rows += measure(layout, Path(folder), teacher, args)
    record = {
        "command": f"python -m benchmarks.sampling --steps {' '.join(map(str, args.steps))} --rounds {args.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        "teacher_steps": TEACHER_STEPS,
        "teacher_guidance": GUIDANCE,
        "rows": rows,
    }
    write(args.output, record)
    return record


if __name__ == "__main__":
    main()
