"""docs/faults.md, written from the record of `benchmarks.faults`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.training.faults import SAVE_TRIES, SKIP_LIMIT

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "faults.md"
METHOD = "lcm"
STEPS, EVERY, AT = 30, 4, 10
"""Updates of a run, between its checkpoints, and before most faults."""

INTRODUCTION = f"""# What goes wrong, and what a run does about it

Written by `python -m benchmarks.faults`, which does each of these to a real run: {STEPS} updates of the toy recipe of
{METHOD.upper()} on a CPU, a checkpoint every {EVERY} updates. `RUN` stands for the run's directory. "Same bits" means that
the run, gone on with by the same command, ended with every weight, moment, average and random generator equal to those of a
run that nothing happened to. Updates that were lost are done again; they
are counted by the lines of metrics that had been written, of which the one of the last update may be missing.

Exit status 0: trained. 130, 143: ended by SIGINT or SIGTERM after a checkpoint, or at once by a second signal. 2: ended in one
sentence, with the last checkpoint whole. A launcher (torchrun, accelerate) has a status of its own.

What is in the way of a line of metrics, a picture or the report never ends a run; a checkpoint that cannot be written is tried
again when the next is due, and failure number {SAVE_TRIES} in a row, or one at the end, ends the run. A turn of a player whose
gradient is not finite moves nothing and is counted as `PLAYER/skipped`; {SKIP_LIMIT} in a row end the run.

A checkpoint that is broken is named and never passed over in silence: `--resume RUN/checkpoints/step-...` goes on from the one
before, which the sentence names.
"""


def lost(found: dict[str, Any]) -> str:
    """What a fault cost, from what was measured."""
    parts = []
    if found["reached"] > found["kept"]:
        first, final = found["kept"] + 1, found["reached"]
        parts.append(f"updates {first} to {final}" if first < final else f"update {first}")
    if found["skipped"]:
        parts.append(f"{found['skipped']} skipped turns")
    if not parts:
        parts.append("nothing")
    if found.get("same_bits"):
        parts.append("same bits")
    elif found.get("again") is not None:
        parts.append("gone on with" if found["again"] == 0 else f"gone on with: status {found['again']}")
    return "; ".join(parts)


def page(record: dict[str, Any]) -> str:
    rows = ["| fault | what was done | exit status | lost |", "|---|---|---|---|"]
    quotes = []
    for name, found in record.items():
        codes = " and ".join(str(code) for code in found["status"])
        rows.append(f"| {name} | {found['injected']} | {codes} | {lost(found)} |")
        quotes.append(f"**{name}**\n\n" + (f"    {found['said']}\n" if found["said"] else "Nothing: the process was gone.\n"))
    return "\n".join([INTRODUCTION, "## What was done, and what it cost", "", *rows, "", "## What it said", "", *quotes])
