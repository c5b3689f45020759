"""`fastgen compare`: is B better than A? Paired by prompt and seed, with a statement of significance for each metric."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from fastgen.cli.options import add_common, emit

WHAT = "a row of a sweep (FOLDER::NAME/STEPS), or what `fastgen eval` wrote: its JSON file, or the folder of its images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=WHAT)
    parser.add_argument("b", metavar="B", help="the same; ::NAME/STEPS is another row of A's sweep")
    parser.add_argument("--scores", metavar="A,B", help="look at these alone; fewer questions get sharper answers")
    parser.add_argument("--despite", metavar="FIELD,FIELD", help="compare although the protocols differ there")
    add_common(parser, "file for the result")


def run(args: argparse.Namespace) -> int:
    from fastgen.eval.compare import compare, open_subject

    a, sweep = open_subject(args.a)
    b, _ = open_subject(args.b, sweep=sweep)
    despite = [] if args.despite is None else [each.strip() for each in args.despite.split(",")]
    only = None if args.scores is None else [each.strip() for each in args.scores.split(",")]
    found = compare(a, b, ignore=despite, only=only)
    lines = [
        f"A  {found.a}",
        f"B  {found.b}",
        f"{found.images} images of {found.prompts} prompts, paired by prompt and seed",
        "",
    ]
    for verdict in found.verdicts:
        lines.append(f"{'*' if verdict.seen else ' '} {verdict.sentence} (p = {verdict.corrected:.2g})")
    if found.verdicts:
        lines += ["", f"* a difference can be seen; p values are Holm's, for {len(found.verdicts)} scores looked at"]
    emit(args, asdict(found), "\n".join([*lines, *found.notes]), args.output)
    return 0
