"""What a run saves by sharing a base, computing blocks again, smaller moments and a smaller base: the record roles.json.

    python -m benchmarks.roles [--model sdxl] [--method dmd2]

Peak memory as in benchmarks/memory.py, whose models, runs and measure these are: each run is a process of its own, forked,
and what counts is its largest resident set over two updates beyond that of the imports. All in one run, so that ratios may be
taken; what the plan predicts of the same methods is in results/memory.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import ALLOCATOR, KERNELS, WARM, apart, make_model, measure, measure_warm, write_run
from benchmarks.methods import ROOT, environment, write

RECORD = ROOT / "benchmarks" / "results" / "roles.json"
CASES: dict[str, tuple[str, dict[str, str], str]] = {
    "three networks": ("full", {}, ""),
    "three networks, 8-bit AdamW": ("full", {"optimizer": '"adamw8bit"'}, "three networks"),
    "one base, adapters": ("lora", {}, "three networks"),
    "one base, adapters, checkpointing": ("lora", {"gradient_checkpointing": "true"}, "one base, adapters"),
    "one base in 8 bits, adapters": ("int8", {}, "one base, adapters"),
    "one base in 4 bits, adapters": ("nf4", {}, "one base, adapters"),
}
"""Roles as benchmarks.memory knows them, keys of [train], and with which case it is compared."""
NEEDS_KERNELS = ("8-bit", "in 8 bits", "in 4 bits")


def write_case(folder: Path, model: str, method: str, name: str) -> Path:
    """The run of a case."""
    roles, train, _ = CASES[name]
    file = write_run(folder, model, method, roles)
    own = file.with_name(f"{name.replace(' ', '-')}.toml")
    lines = "".join(f"{key} = {value}\n" for key, value in train.items())
    own.write_text(file.read_text() + lines)  # [train] is the last table
    return own


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sdxl", "sd3"), default="sdxl")
    parser.add_argument("--method", default="dmd2")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args(arguments)
    cases = [name for name in args.cases if KERNELS or not any(word in name for word in NEEDS_KERNELS)]
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="fastgen-roles-") as name:
        folder = Path(name)
        make_model("warm", folder / "warm")
        measure(write_run(folder, "warm", "lcm", "lora").rename(folder / f"{WARM}.toml"))
        make_model(args.model, folder / args.model)
        for case in cases:
            found[case] = apart(measure_warm, write_case(folder, args.model, args.method, case))["measured"]
            print(f"{case:<36}{found[case] / 1e6:8.1f} MB", flush=True)
    rows = [{"case": case, "peak": peak} | compared(case, found) for case, peak in found.items()]
    record = {
        "command": f"python -m benchmarks.roles --model {args.model} --method {args.method}",
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        "model": args.model,
        "method": args.method,
        "rows": rows,
    }
    write(args.output, record)
    return record


def compared(case: str, found: dict[str, int]) -> dict[str, Any]:
    """The share of its peak that a case takes of the one it is compared with, and of three networks."""
    other = CASES[case][2]
    shares = {"over": other, "ratio": found[case] / found[other]} if other in found else {}
    first = next(iter(CASES))
    return shares | ({"of_three_networks": found[case] / found[first]} if first in found else {})


if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.roles", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    main()
