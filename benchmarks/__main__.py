"""`make bench`: the quick form of every benchmark of speed and memory, one after another, and a table of their ratios.

    python -m benchmarks                             # all: under 20 minutes on two cores
    python -m benchmarks --only step sampling
    python -m benchmarks --page                      # the tables of docs/fast.md, from the records

Each writes its record to benchmarks/results/NAME.json, and has an account of itself and more options: python -m benchmarks.NAME
--help. Benchmarks of other things are run by themselves: costs, eval, faults, health, methods, quickstart.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec

from benchmarks.fast_page import PAGE, ratios, write_page

QUICK: dict[str, list[str]] = {
    "step": ["--network", "transformer", "--rounds", "20"],
    "switches": [],
    "attention": [],
    "jvp": ["--rounds", "5"],
    "overhead": ["--updates", "30"],
    "roles": [],
    "memory": ["--models", "sdxl", "--methods", "lcm", "dmd2", "--roles", "full", "lora"],
    "sampling": ["--steps", "1", "4", "--rounds", "5"],
    "scaling": [],
}
"""What each is called with here."""


def known() -> list[str]:
    """The benchmarks that are there."""
    return [name for name in QUICK if find_spec(f"benchmarks.{name}") is not None]


def table() -> str:
    """The ratios of all records, by benchmark."""
    lines = [f"{'benchmark':<12}{'what':<62}{'ratio':>7}  goal"]
    for name, what, ratio, goal in ratios():
        lines.append(f"{name:<12}{what:<62}{ratio:7.3f}  {goal}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=known(), metavar="NAME", help=f"of {', '.join(known())}")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/fast.md anew, and measure nothing")
    args = parser.parse_args(arguments)
    if args.page:
        print(write_page(PAGE))
        return 0
    failed = []
    for name in args.only or known():
        command = [sys.executable, "-m", f"benchmarks.{name}", *QUICK[name]]
        print(f"==> python {' '.join(command[1:])}", flush=True)
        start, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processes of their own: each needs another allocator, number of threads or state of accelerate.
        if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode:
            failed.append(name)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
        print(f"    {time.monotonic() - start:.0f} s, {cpu:.0f} s of CPU time\n", flush=True)
    print(table())
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
