"""`fastgen sweep`: step-quality curves of teacher and students on the same prompts and seeds.

Into the same folder again, it goes on where it stopped and adds what is new. Several processes share the drawing:
`accelerate launch --num_processes 8 -m fastgen sweep ...`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.eval import add_protocol, attend, names, protocol
from fastgen.cli.kernels import add_attention
from fastgen.cli.options import add_common, emit, say, writable
from fastgen.cli.targets import add_run_options, export_run, is_export, is_run, open_run, plain_folder, steps_list, toy_guidance
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.eval.sweep import Candidate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run directories and exports: the students")
    parser.add_argument("--teacher", metavar="PATH", help='a diffusers folder, "toy" or "none"; default: the first student\'s')
    parser.add_argument("--steps", type=steps_list, metavar="1,2,4", help="of the students; default: what each was made for")
    parser.add_argument("--teacher-steps", type=steps_list, metavar="50,8,4,2,1", help="of the teacher (default 50,8,4,2,1)")
    parser.add_argument(
        "--guidance", type=scales, metavar="SCALE,SCALE", help="of the teacher, 1 = off; default: its pipeline's own, toy: 3"
    )
    add_protocol(parser)
    add_attention(parser)
    add_run_options(parser)
    add_common(parser, "folder for results, pictures, report.html and tradeoff.png", required=True)


def run(args: argparse.Namespace) -> int:
    from fastgen.eval.drawing import processes
    from fastgen.eval.figure import write_figure
    from fastgen.eval.report import write_report
    from fastgen.eval.results import load_results
    from fastgen.eval.sweep import sweep, teacher
    from fastgen.eval.table import terminal

    writable(args.output)
    asked = protocol(args)
    wanted = names(args.metrics)
    team, _ = processes(asked["device"])
    if not team.first:
        team.wait()  # until the first process has exported the runs
    students = [student_of(target, args, export=team.first) for target in args.targets]
    if team.first:
        team.wait()
    candidates = list(students)
    base = args.teacher or base_of(students[0])
    if base not in (None, "none"):
        chosen = {"steps": args.teacher_steps} if args.teacher_steps else {}
        folder = plain_folder(base)
        candidates.insert(0, teacher(folder, guidance=args.guidance or toy_guidance(folder, None), **chosen))
    rows = sweep(
        candidates, args.output, images=args.number, metrics=wanted, prepare=lambda pipeline: attend(args, pipeline), **asked,
        progress=lambda what, done, total: say(args, f"{100 * done // total:3d} %  {what}"),
    )  # fmt: skip
    if not team.first:
        return 0
    report = write_report(args.output)
    figure = write_figure(load_results(args.output), args.output / "tradeoff.png")
    result: dict[str, Any] = {"report": str(report), "figure": str(figure)}
    result["rows"] = json.loads(json.dumps([asdict(row) for row in rows], default=str))
    emit(args, result, f"{terminal(rows)}\n\nreport  {report}\nfigure  {figure}")
    return 0


def scales(text: str) -> list[float]:
    """`1,3,7.5` as guidance scales; the type of an argument."""
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [0.0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"guidance scales are numbers from 1, such as 1,3,7.5; not {text!r}")
    return found


def student_of(target: str, args: argparse.Namespace, *, export: bool = True) -> Candidate:
    """A run, by way of an export beside the results (made now, or by the first process), or an export as it is."""
    from fastgen.eval.sweep import student

    if is_run(target):
        name = Path(target).resolve().name
        folder = args.output / "exports" / name
        if export:
            say(args, f"exporting {target}, so that plain diffusers is measured")
            export_run(open_run(target, args), folder)
        return student(folder, steps=args.steps, name=name)
    if not is_export(target):
        raise UserError(f"{target}: is neither a run directory nor an export; a teacher is given with --teacher")
    return student(target, steps=args.steps)


def base_of(student: Candidate) -> str | None:
    """The teacher that an export was distilled from, if it tells."""
    from fastgen.export import read_export

    base = read_export(Path(str(student.source))).get("record", {}).get("base")
    return str(base) if base else None
