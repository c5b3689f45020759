"""The quickstart over several seeds: the record in benchmarks/results/quickstart.json, and the table of the README.

    python -m benchmarks.quickstart --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "quickstart.json"
PACKAGES = ("torch", "diffusers", "transformers", "torch-fidelity", "open-clip-torch")
COLUMNS = {
    "fd": "Fréchet distance ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "clip_score": "CLIP score ↑",
    "accuracy": "strict accuracy ↑",
    "diversity_ratio": "diversity over real ↑",
}


def run_seed(seed: int, output: Path) -> dict[str, Any]:
    """One quickstart in a process of its own; a finished one in `output` is read back."""
    if not (output / "quickstart.json").exists():
        command = [sys.executable, "-m", "fastgen", "quickstart", "--seed", str(seed), "--output", str(output)]
        subprocess.run(command, check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads((output / "quickstart.json").read_text())
    return {"seed": seed, **{key: result[key] for key in ("seconds", "checks", "rows")}}


def record(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured, with what could change it."""
    return {
        "command": "python -m benchmarks.quickstart --seeds " + " ".join(str(run["seed"]) for run in runs),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
        "runs": runs,
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and, for several values, half the range."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def readme_section(runs: list[dict[str, Any]]) -> str:
    """The table and the promises, as Markdown."""
    shown = [key for key in COLUMNS if all(key in row["scores"] for row in runs[0]["rows"])]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    several = f"seeds {seeds}, mean ± half the range" if len(runs) > 1 else f"seed {seeds}"
    # The first seed's alone: the others may have shared the machine.
    minutes = f"{runs[0]['seconds']['all'] / 60:.1f}"
    lines = [
        f"`make quickstart` on {os.cpu_count()} CPU cores, {minutes} minutes after the install, held-out prompts "
        f"({several}; `{record(runs)['command']}`):",
        "",
        "| | network calls | " + " | ".join(COLUMNS[key] for key in shown) + " |",
        "|---|" + "---:|" * (len(shown) + 1),
    ]
    for i, row in enumerate(runs[0]["rows"]):
        same = [run["rows"][i]["scores"] for run in runs]
        name = row["name"] if row["role"] == "real" else f"{row['name']}, {row['steps']} step{'s' * (row['steps'] != 1)}"
        calls = "" if row["role"] == "real" else f"{row['calls']:g}"
        lines.append(f"| {name} | {calls} | " + " | ".join(spread([scores[key] for scores in same]) for key in shown) + " |")
    lines += ["", "| promise | reached | bar | |", "|---|---:|---:|---|"]
    for i, check in enumerate(runs[0]["checks"]):
        same_checks = [run["checks"][i] for run in runs]
        met = "met" if all(each["met"] for each in same_checks) else "missed"
        lines.append(f"| {check['what']} | {spread([each['value'] for each in same_checks])} | {check['bar']} | {met} |")
    return "\n".join(lines)


def put(text: str, mark: str, section: str) -> str:
    """`text` with what stands between two marks replaced."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, _, rest = text.partition(begin)
    return before + begin + "\n" + section + "\n" + end + rest.partition(end)[2]


def methods_table() -> str:
    """The methods as Markdown, from their own declarations."""
    from fastgen import methods
    from fastgen.cli.methods import summary

    rows = [summary(name, methods.find(name)) for name in methods.names()]
    needs = [sorted(methods.find(row["name"])().needs) for row in rows]
    body = [f"| `{row['name']}` | {row['summary']} | {', '.join(need)} |" for row, need in zip(rows, needs, strict=True)]
    return "\n".join(["| method | what | needs |", "|---|---|---|", *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quickstart"), help="folder for the runs")
    args = parser.parse_args()
    runs = [run_seed(seed, args.output / f"seed-{seed}") for seed in args.seeds]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record(runs), indent=1) + "\n")
    readme = ROOT / "README.md"
    text = put(readme.read_text(encoding="utf-8"), "quickstart", readme_section(runs))
    readme.write_text(put(text, "methods", methods_table()), encoding="utf-8")
    figure = args.output / f"seed-{args.seeds[0]}" / "tradeoff.png"
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "tradeoff.png").write_bytes(figure.read_bytes())
    print(readme_section(runs))


if __name__ == "__main__":
    main()
