"""`fastgen sweep`: step-quality curves of teacher and students on the same prompts and seeds.

Into the same folder again, it goes on where it stopped and adds what is new.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.cli.eval import add_protocol, names, protocol
from fastgen.cli.options import add_common, emit, say, writable
from fastgen.cli.targets import add_run_options, export_run, is_export, is_run, open_run, plain_folder, steps_list
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.eval.results import Row
    from fastgen.eval.sweep import Candidate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run directories and exports: the students")
    parser.add_argument("--teacher", metavar="PATH", help='a diffusers folder, "toy" or "none"; default: the first student\'s')
    parser.add_argument("--steps", type=steps_list, metavar="1,2,4", help="of the students; default: what each was made for")
    parser.add_argument("--teacher-steps", type=steps_list, metavar="50,8,4,2,1", help="of the teacher (default 50,8,4,2,1)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="of the teacher, 1 = off; default: the pipeline's own")
    add_protocol(parser)
    add_run_options(parser)
    add_common(parser, "folder for tables, pictures and report.html", required=True)


def run(args: argparse.Namespace) -> int:
    from fastgen.eval.report import write_report
    from fastgen.eval.sweep import sweep, teacher

    writable(args.output)
    asked = protocol(args)
    wanted = names(args.metrics)
    students = [student_of(target, args) for target in args.targets]
    candidates = list(students)
    base = args.teacher or base_of(students[0])
    if base not in (None, "none"):
        chosen = {"steps": args.teacher_steps} if args.teacher_steps else {}
        candidates.insert(0, teacher(plain_folder(base), guidance=args.guidance, **chosen))
    rows = sweep(
        candidates, args.output, images=args.number, metrics=wanted, **asked,
        progress=lambda what, done, total: say(args, f"{100 * done // total:3d} %  {what}"),
    )  # fmt: skip
    report = write_report(args.output)
    result = {"report": str(report), "rows": json.loads(json.dumps([asdict(row) for row in rows], default=str))}
    emit(args, result, f"{table(rows)}\nreport: {report}")
    return 0


def table(rows: Sequence[Row]) -> str:
    """A line a row, columns aligned."""
    keys = sorted({key for row in rows for key in row.scores})
    lines = [["name", "steps", "seconds", *keys]]
    for row in rows:
        scores = [f"{row.scores[key]:.4g}" if key in row.scores else "-" for key in keys]
        lines.append([row.name, str(row.steps), f"{row.seconds:.3g}", *scores])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def student_of(target: str, args: argparse.Namespace) -> Candidate:
    """A run, by way of an export beside the results, or an export as it is."""
    from fastgen.eval.sweep import student

    if is_run(target):
        name = Path(target).resolve().name
        say(args, f"exporting {target}, so that plain diffusers is measured")
        folder = export_run(open_run(target, args), args.output / "exports" / name)
        return student(folder, steps=args.steps, name=name)
    if not is_export(target):
        raise UserError(f"{target}: is neither a run directory nor an export; a teacher is given with --teacher")
    return student(target, steps=args.steps)


def base_of(student: Candidate) -> str | None:
    """The teacher that an export was distilled from, if it tells."""
    from fastgen.export import read_export

    base = read_export(Path(str(student.source))).get("record", {}).get("base")
    return str(base) if base else None
