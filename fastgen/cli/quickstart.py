"""`fastgen quickstart`: the whole story on a laptop's CPU, without a download.

Distils the toy teacher that ships, exports the students as folders that plain diffusers loads, measures all through plain
diffusers on held-out prompts, and writes one report. An interrupted quickstart goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.cli.options import add_common, emit, say, seed, writable
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.eval.results import Row

RECIPE = "toy/quickstart.toml"
IMAGES = 600
GUIDANCE = 3.0
STUDENT_STEPS = (4, 2, 1)
TEACHER_STEPS = (50, 4, 2, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"laid over configs/{RECIPE}: train.steps=200")
    parser.add_argument("--number", type=int, default=IMAGES, metavar="N", help=f"pictures a measurement (default {IMAGES})")
    add_common(parser, "folder for run, students and report (default: runs/quickstart)")


def run(args: argparse.Namespace) -> int:
    from fastgen import config
    from fastgen.cli.targets import plain_folder

    if args.number < 20:
        raise UserError(f"--number {args.number}: at least 20 pictures are needed for a comparison")
    began = time.monotonic()
    output = writable(args.output or Path("runs/quickstart"))
    wanted = config.load(recipe(RECIPE), [*args.overrides, f"seed={seed(args)}"])
    say(args, f"1 of 4  distil the toy teacher with {wanted.method_name}, {wanted.train.steps} updates, into {output}/run")
    from fastgen.training.run import distill

    status = distill(wanted, output / "run", device="cpu", offline=True, quiet=args.quiet)
    if status:
        return status
    trained = time.monotonic() - began

    from fastgen.eval.figure import write_figure
    from fastgen.eval.report import write_report
    from fastgen.eval.results import load_results
    from fastgen.eval.sweep import student, sweep, teacher

    say(args, f"2 of 4  export the students to {output}/student-*, folders that plain diffusers loads")
    folders = export_students(output)
    say(args, f"3 of 4  draw and measure {args.number} pictures for each of {len(TEACHER_STEPS) + len(folders)} settings")
    rows = sweep(
        [
            teacher(plain_folder(wanted.pipeline), steps=TEACHER_STEPS, guidance=GUIDANCE),
            *(student(folder, name="student") for folder in folders.values()),
        ],
        output / "sweep",
        images=args.number,
        seed=seed(args),
        progress=Progress(args, [0, *(2 * steps for steps in TEACHER_STEPS), *folders]),
    )
    say(args, "4 of 4  write the report")
    report = write_report(output / "sweep")
    shutil.copyfile(report, output / "report.html")
    figure = write_figure(load_results(output / "sweep"), output / "tradeoff.png")
    checks = verdicts(rows)
    result = {
        "seconds": {"train": round(trained, 1), "all": round(time.monotonic() - began, 1)},
        "rows": json.loads(json.dumps([asdict(row) for row in rows], default=str)),
        "checks": checks,
        "report": str(output / "report.html"),
    }
    (output / "quickstart.json").write_text(json.dumps(result, indent=2) + "\n")
    emit(args, result, summary(rows, checks, output, figure, result["seconds"]["all"]))
    return 0


def export_students(output: Path) -> dict[int, Path]:
    """One export for each of `STUDENT_STEPS`: of the newest student whose own number of steps it is, or else of the last."""
    from fastgen.cli.targets import export_run
    from fastgen.training import checkpoint
    from fastgen.training.run import load_run

    run, found = output / "run", {}
    for path in checkpoint.find(run):
        loaded = load_run(run, checkpoint=path, offline=True)
        found[loaded.method.sampler().steps] = loaded
    last = loaded
    return {
        steps: export_run(found.get(steps, last), output / f"student-{steps}", steps=steps) for steps in STUDENT_STEPS
    }


def recipe(name: str) -> Path:
    """A recipe of ours: inside the package where it was installed as a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    places = [package / "configs" / name, package.parent / "configs" / name]
    return next((place for place in places if place.is_file()), places[0])


class Progress:
    """Says what the sweep is at and how long it will take, every tenth of the way.

    A setting's share of the way is its network calls, and three more for decoding and measuring.
    """

    def __init__(self, args: argparse.Namespace, calls: Sequence[int]):
        self.args, self.said, self.start = args, -1, time.monotonic()
        self.ends = list(accumulate((number + 3 for number in calls), initial=0))

    def __call__(self, what: str, done: int, total: int) -> None:
        place = done / total * (len(self.ends) - 1)
        whole = min(int(place), len(self.ends) - 2)
        share = (self.ends[whole] + (place - whole) * (self.ends[whole + 1] - self.ends[whole])) / self.ends[-1]
        if int(10 * share) > self.said:
            self.said = int(10 * share)
            left = (time.monotonic() - self.start) * (1 / share - 1) if share else None
            say(self.args, f"        {100 * share:3.0f} %  {what}" + (f", about {left:.0f} s left" if left is not None else ""))


def verdicts(rows: Sequence[Row]) -> list[dict[str, object]]:
    """What the quickstart promises, each with the value reached and its bar."""
    by = {(row.role, row.steps): row.scores for row in rows}
    best = by["teacher", 50]["accuracy"]
    distance = {steps: by["student", steps]["fd"] / by["teacher", steps]["fd"] for steps in STUDENT_STEPS}
    bars = [
        ("1 step: Frechet distance over the teacher's at 1 step", distance[1], 0.4, True),
        ("1 step: strict accuracy over the teacher's at 50 steps", by["student", 1]["accuracy"] / best, 0.9, False),
        ("2 steps: Frechet distance over the teacher's at 2 steps", distance[2], 0.8, True),
        ("4 steps, half the network calls: Frechet distance over the teacher's at 4 steps", distance[4], 1.0, True),
    ]
    return [
        {"what": what, "value": round(value, 3), "bar": bar, "met": value <= bar if below else value >= bar}
        for what, value, bar, below in bars
    ]


def summary(rows: Sequence[Row], checks: Sequence[dict[str, object]], output: Path, figure: Path, seconds: float) -> str:
    """The end of the story on a terminal."""
    from fastgen.eval.table import terminal

    lines = [terminal(rows), ""]
    for check in checks:
        lines.append(f"{'met   ' if check['met'] else 'missed'}  {check['what']}: {check['value']} (bar {check['bar']})")
    lines += [
        "",
        f"report   {output}/report.html",
        f"figure   {figure}",
        f"students {output}/student-4, -2 and -1   (each README.md has the snippet that samples it with plain diffusers)",
        f"done in {seconds / 60:.1f} minutes",
        f"next     fastgen sample {output}/student-1 'a small red circle above a large blue ring on a black background'",
    ]
    return "\n".join(lines)
