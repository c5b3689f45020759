"""Every method on the toy teacher with one budget: records in benchmarks/results/methods/, and the page docs/methods.md.

    python -m benchmarks.methods --method dmd2 --seed 0      # distil by configs/toy/dmd2.toml, measure, record
    python -m benchmarks.methods --teacher --seed 0          # the teacher and the floor that all are compared with
    python -m benchmarks.methods --page                      # docs/methods.md from the records

The budget is 2,000 updates of the student or 20 minutes of CPU time on one thread, whichever is less; the time of an update is
measured first, so that a learning rate that falls, falls to the end. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.costs import student_every
from fastgen import config, methods
from fastgen.config import RunConfig
from fastgen.denoiser import Predicts
from fastgen.errors import UserError
from fastgen.eval.evaluation import REFERENCE_SEED, real_images, score_images, toy_prompts
from fastgen.eval.generate import noise_seed
from fastgen.eval.images import to_uint8
from fastgen.eval.world import TOY
from fastgen.pipelines import Pipeline
from fastgen.samplers import FewStep, Sampler, even_times
from fastgen.training.loop import Trainer
from fastgen.training.run import distill, load_run, open_pipeline

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "methods"
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "torch-fidelity", "open-clip-torch")
STUDENT_UPDATES, CPU_MINUTES, IMAGES = 2000, 20.0, 600
STEPS, TEACHER_STEPS, GUIDANCE = (1, 2, 4, 8), (50, 8, 4, 2, 1), 3.0
MOVES, WARM_UP = 16, 4
"""Of the short run that tells what an update costs: how often the student moves, and how many updates at first do not count."""


# -- training -------------------------------------------------------------------------------------


def recipe(name: str, seed: int) -> RunConfig:
    """The toy recipe of a method, on one thread, without sample grids and with checkpoints that an interruption needs."""
    own = [f"seed={seed}", "train.threads=1", "train.sample_every=0", "train.checkpoint_every=200", "train.keep_checkpoints=1"]
    return config.load(ROOT / "configs" / "toy" / f"{name}.toml", own)


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def trial(name: str, seed: int) -> tuple[float, int]:
    """CPU seconds of an update, and in which updates the student moves, from a short run."""
    blank, run, spent, update = recipe(name, seed), recipe(name, seed), [], Trainer.update
    blank.method.setup(open_pipeline(blank, offline=True))
    every = student_every(blank.method)
    run.train.steps, run.data.pool = MOVES * every, 256

    def timed(trainer: Trainer) -> None:
        spent.append(cpu_seconds(lambda: update(trainer)))

    with tempfile.TemporaryDirectory(prefix="fastgen-trial-") as folder, patch.object(Trainer, "update", timed):
        distill(run, Path(folder), offline=True, quiet=True, device="cpu")
    return statistics.mean(spent[WARM_UP:]), every


def train(name: str, seed: int, folder: Path, updates: int, minutes: float) -> dict[str, Any]:
    """Distil in `folder` within the budget; what it took. A run that is there already is gone on with, at its own length."""
    plan = folder / "budget.json"
    if plan.is_file():
        budget = json.loads(plan.read_text())
    else:
        cost, every = trial(name, seed)
        steps = min(updates * every, int(60 * minutes / cost))
        budget = {"updates": steps, "student_updates": steps // every, "cpu_seconds_per_update": round(cost, 3), "used": 0.0}
        folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps(budget))
    run = recipe(name, seed)
    run.train.steps = budget["updates"]
    budget["used"] += cpu_seconds(lambda: distill(run, folder / "run", offline=True, quiet=True, device="cpu"))
    plan.write_text(json.dumps(budget))
    return {key: value for key, value in budget.items() if key != "used"} | {"cpu_minutes": round(budget["used"] / 60, 1)}


# -- measuring ------------------------------------------------------------------------------------


@torch.no_grad()
def draw(pipeline: Pipeline, who: Predicts, sampler: Sampler, prompts: list[str], seeds: list[int], batch: int = 100) -> Tensor:
    """uint8 images, each from the noise that its prompt and seed say."""
    images = []
    torch.manual_seed(0)  # for samplers that draw noise between calls
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        generators = [
            torch.Generator().manual_seed(noise_seed(p, s)) for p, s in zip(some, seeds[start : start + batch], strict=True)
        ]
        noise = torch.stack([torch.randn(pipeline.latent_shape, generator=each) for each in generators])
        images.append(to_uint8(pipeline.decode(sampler.sample(who, noise, pipeline.encode_prompts(some)))))
    return torch.cat(images)


def measure(
    pipeline: Pipeline, who: Predicts, samplers: Iterable[tuple[str, int, Sampler]], seed: int, number: int
) -> list[dict[str, Any]]:
    """A row of scores for each sampler, on held-out prompts."""
    prompts, seeds, scenes = toy_prompts(number, seed=seed)
    rows = []
    for name, steps, sampler in samplers:
        began = time.process_time()
        images = draw(pipeline, who, sampler, prompts, seeds)
        spent = time.process_time() - began
        scores = score_images(images, prompts, scenes=scenes, world=TOY)
        rows.append({"name": name, "steps": steps, "cpu_ms_per_image": round(1000 * spent / number, 2), "scores": scores})
    return rows


def student_samplers(method: Any) -> list[tuple[str, int, Sampler]]:
    """The method's samplers for 1, 2, 4 and 8 steps and for its own number, as far as it has them."""
    found = []
    for steps in sorted({*STEPS, method.sampler().steps}):
        try:
            found.append(("student", steps, method.sampler(steps)))
        except UserError:
            continue  # not trained for that many
    return found


def teacher_record(seed: int, number: int) -> dict[str, Any]:
    """The teacher at each of its step counts, and real images against others at the same number."""
    run = RunConfig("progressive", methods.find("progressive")())
    pipeline = open_pipeline(run, offline=True)
    samplers = [("teacher", steps, FewStep(even_times(steps, pipeline.process), guidance=GUIDANCE)) for steps in TEACHER_STEPS]
    prompts, _, scenes = toy_prompts(number, seed=seed)
    real = score_images(real_images(scenes, REFERENCE_SEED + 2), prompts, scenes=scenes, world=TOY)
    rows = measure(pipeline, pipeline.frozen(), samplers, seed, number)
    return {"name": "teacher", "rows": [{"name": "real", "steps": 0, "scores": real}, *rows]}


def environment() -> dict[str, Any]:
    processor = next((line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.machine())
    return {"processor": processor, "python": platform.python_version(), "versions": {name: version(name) for name in PACKAGES}}


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rounded(record), indent=1) + "\n")
    partial.replace(path)


def rounded(nest: Any) -> Any:
    """Floats to 5 significant digits: what is below is noise."""
    if isinstance(nest, dict):
        return {key: rounded(value) for key, value in nest.items()}
    if isinstance(nest, list):
        return [rounded(value) for value in nest]
    return float(f"{nest:.5g}") if isinstance(nest, float) else nest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=methods.names(), metavar="NAME")
    what.add_argument("--teacher", action="store_true")
    what.add_argument("--page", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=STUDENT_UPDATES, help="of the student, at most")
    parser.add_argument("--minutes", type=float, default=CPU_MINUTES, help="of CPU time, at most")
    parser.add_argument("--images", type=int, default=IMAGES, help="a measurement")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-methods"), help="folder for the runs")
    args = parser.parse_args()
    if args.page:
        from benchmarks.methods_page import write_page

        print(write_page(RECORDS, ROOT / "docs" / "methods.md", ROOT / "docs" / "methods-findings.json"))
        return
    torch.set_num_threads(1)
    if args.teacher:
        name, record = "teacher", teacher_record(args.seed, args.images)
    else:
        name, folder = args.method, args.output / f"{args.method}-seed{args.seed}"
        spent = train(name, args.seed, folder, args.updates, args.minutes)
        run = load_run(folder / "run", offline=True)
        rows = measure(run.pipeline, run.student, student_samplers(run.method), args.seed, args.images)
        record = {
            "name": name,
            "budget": spent,
            "own_steps": run.method.sampler().steps,
            "config": run.config.to_toml(),
            "rows": rows,
        }
    flags = "".join(
        f" --{key} {getattr(args, key):g}"
        for key in ("updates", "minutes", "images")
        if getattr(args, key) != parser.get_default(key)
    )
    command = f"python -m benchmarks.methods {'--teacher' if args.teacher else f'--method {name}'} --seed {args.seed}{flags}"
    where = RECORDS / f"{name}-seed{args.seed}.json"
    write(
        where,
        {
            "command": command,
            "seed": args.seed,
            "images": args.images,
            **environment(),
            "threads": str(torch.get_num_threads()),
            **record,
        },
    )
    for row in record["rows"]:
        shown = {key: row["scores"][key] for key in ("fd", "precision", "recall", "clip_score", "accuracy", "diversity_ratio")}
        print(f"{row['name']} {row['steps']:>2}  " + "  ".join(f"{key} {value:.3f}" for key, value in shown.items()))


if __name__ == "__main__":
    main()
