"""The tables of docs/fast.md, made from the records in benchmarks/results; the sentences between them are written by hand."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "fast.md"
Record = dict[str, Any]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING = "There is no record yet."


def record(name: str, folder: Path = RESULTS) -> Record | None:
    """The record of one benchmark."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown: the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def made_by(found: Record) -> str:
    """Command, machine, versions and date, as far as a record has them."""
    machine = found.get("machine", {})
    processor = found.get("processor") or machine.get("processor") or machine.get("cpu", "")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name in ("torch", "diffusers"))
    parts = [f"`{found['command']}`", processor, versions, found.get("date", "")]
    return "; ".join(part for part in parts if part) + "."


def mb(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


# -- tables ---------------------------------------------------------------------------------------


def step(found: Record) -> list[str]:
    lines = []
    for network in found["networks"]:
        weights, batch = network["parameters"] / 1e6, network["batch"]
        lines += [f"Network `{network['network']}`, {weights:.1f} million weights, batch {batch}, {found['precision']}:", ""]
        heads = ["method", "updates a second", "calls of the network a sample", "floor, ms", "measured, ms", "ratio", "peak"]
        rows = []
        for row in network["methods"]:
            numbers = [f"{row['samples_through_the_network']:.1f}", f"{row['ms_floor']:.0f}", f"{row['ms_per_round']:.0f}"]
            ends = [f"**{row['ratio']:.3f}**", mb(row["peak"])]
            rows.append([f"`{row['method']}`", f"{row['updates_a_second']:.2f}", *numbers, *ends])
        lines += [*table(heads, rows), ""]
    return lines[:-1]


def calls(found: Record) -> list[str]:
    """What one call of each kind took, for the methods that show the kinds."""
    network, kinds = found["networks"][0], {}
    for row in network["methods"]:
        for name, each in row["calls"].items():
            if name.startswith(f"network, batch {network['batch']}:"):
                kinds.setdefault(name.split(": ")[1], []).append(each["ms_each"])
    plain = min(kinds["forward"])
    rows = [[name, f"{min(times):.1f}", f"{min(times) / plain:.2f}"] for name, times in sorted(kinds.items())]
    heads = [f"one call, {network['network']}, batch {network['batch']}", "ms", "over a forward"]
    return table(heads, rows)


def scaling(found: Record) -> list[str]:
    rows = []
    for row in found["rows"]:
        if "giga_operations" in row and "trained_weights" not in row:
            work, ms = row["giga_operations"], row["ms"]
            each, fixed = statistics.linear_regression(work, ms)
            numbers = [f"{row['exponent']:.2f}", f"{row['expected']:.2f}", f"{fixed:.0f}", f"{each:.1f}"]
            rows.append([row["what"], sizes(row), *numbers, f"{statistics.correlation(work, ms):.4f}"])
    heads = ["an update of LCM against", "sizes", "exponent", "of the operations", "fixed, ms"]
    lines = table([*heads, "ms for each 10^9 operations", "correlation with the operations"], rows)
    slopes = []
    for row in found["rows"]:
        for key in ("step", "rank"):
            if f"ms_a_{key}" in row:
                numbers = [f"{row[f'ms_a_{key}']:.2f}", f"{row[f'expected_ms_a_{key}']:.2f}"]
                slopes.append([row["what"], sizes(row), *numbers])
    lines += ["", *table(["cost against", "sizes", "ms each, measured", "expected"], slopes)] if slopes else []
    for row in found["rows"]:
        if row["what"] == "processes":
            lines += ["", *processes(row)]
    return lines


def sizes(row: Record) -> str:
    return ", ".join(map(str, row["sizes"]))


def processes(row: Record) -> list[str]:
    names = {"one": "1 process", "two_weak": "2 processes, the same batch each", "two_strong": "2 processes, half of it each"}
    rows = [[name, *(f"{row[key][unit]:.0f}" for unit in ("cpu_ms", "wall_ms"))] for key, name in names.items()]
    load = f"load {row['load_before']:.1f} to {row['load_after']:.1f} on {row['cores']} cores"
    return table(["an update of LCM", "CPU ms of a process", f"wall ms ({load})"], rows)


def roles(found: Record) -> list[str]:
    rows = []
    for row in found["rows"]:
        other = f"{row['ratio']:.2f} of {row['over']}" if "ratio" in row else ""
        rows.append([row["case"], mb(row["peak"]), f"{row['of_three_networks']:.2f}", other])
    heads = [f"{found['method']}, {found['model']}-shaped", "peak", "of three networks", "beside"]
    return table(heads, rows)


def sampling(found: Record) -> list[str]:
    heads = ["export", "batch", "steps", "diffusers, ms", "fastgen / diffusers", "the calls alone", "teacher / student"]
    rows = [
        [
            f"`{row['layout']}`",
            str(row["batch"]),
            str(row["steps"]),
            f"{row['ms']['diffusers']:.0f}",
            f"{row['fastgen_over_diffusers']:.2f}",
            f"{row['fastgen_over_diffusers_calls']:.2f}",
            f"{row['teacher_over_student']:.1f}",
        ]
        for row in found["rows"]
    ]
    return table(heads, rows)


def jvp(found: Record) -> list[str]:
    rows = []
    for name, network in found["networks"].items():
        over = network["over_forward"]
        rows.append([f"{name}, one derivative over a forward", f"{over['plain']:.2f}", f"{over['exact']:.2f}"])
    for name, update in found["updates"].items():
        seconds = [f"{1000 * update[f'{way}_seconds']:.0f} ms" for way in ("plain", "exact")]
        rows.append([f"`{name}`, an update's loss and gradient", *seconds])
    return table(["", "torch's forward mode", "ours"], rows)


def attention(found: Record) -> list[str]:
    rows = []
    for preset in found["presets"].values():
        for kernel, row in preset["kernels"].items():
            if "left_out" in row:
                continue
            less = f", 1/{preset['shrink']} of the tokens" if preset["shrink"] > 1 else ""
            numbers = [f"{row[key]:.2f}" if key in row else "" for key in ("forward_ratio", "forward_backward_ratio")]
            errors = [f"{row[key]:.0e}" if key in row else "" for key in ("output_error", "gradient_error")]
            rows.append([preset["about"] + less, f"`{kernel}`", *numbers, *errors])
    heads = ["shapes", "kernel", "forward over native", "with backward", "error", "of gradients"]
    return [f"On {found['device']}, {found['dtype']}:", "", *table(heads, rows)]


def switches(found: Record) -> list[str]:
    """A row for every two ways that the record compares, and for what passes keep."""
    rows = [
        [" ".join(path).rstrip(","), ratio.replace("_", " "), f"**{each[ratio]:.2f}**", milliseconds(each), difference(each)]
        for path, each in nested(found)
        for ratio in each
        if "_over_" in ratio
    ]
    if kept := found.get("passes", {}).get("bytes_kept"):
        sizes = ", ".join(mb(kept[name]) for name in ("on", "off"))
        rows.append(["passes, kept for the backward pass", "on over off", f"**{kept['on'] / kept['off']:.2f}**", sizes, ""])
    return table(["switch", "ways", "ratio", "ms of each", "difference"], rows)


def nested(record: Record, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Record]]:
    """Every dictionary in a record, with the keys that lead to it, its underscores blank."""
    yield path, record
    for key, value in record.items():
        if isinstance(value, dict):
            yield from nested(value, (*path, key.replace("_", " ") if path else f"{key},"))


def milliseconds(row: Record) -> str:
    return ", ".join(f"{1000 * value:.3g}" for key, value in row.items() if key.endswith("_seconds") and "call" not in key)


def difference(row: Record) -> str:
    return next((f"{value:.0e}" for key, value in row.items() if key.startswith("difference")), "")


TABLES: dict[str, tuple[str, Callable[[Record], list[str]]]] = {
    "step": ("step", step),
    "calls": ("step", calls),
    "scaling": ("scaling", scaling),
    "roles": ("roles", roles),
    "sampling": ("sampling", sampling),
    "jvp": ("jvp", jvp),
    "attention": ("attention", attention),
    "switches": ("switches", switches),
}
"""By their names on the page: the record that each is made from, and how."""


def block(name: str, folder: Path) -> str:
    """A table with what made it."""
    source, make = TABLES[name]
    found = record(source, folder)
    if found is None:
        return f"{MISSING}\n"
    return "\n".join([*make(found), "", made_by(found)]) + "\n"


def filled(text: str, folder: Path = RESULTS) -> str:
    """The page with every table as the records have it. Raises KeyError for a table that is not known."""
    return BLOCK.sub(lambda found: found[1] + block(found[2], folder) + found[3], text)


def write_page(path: Path, folder: Path = RESULTS) -> Path:
    path.write_text(filled(path.read_text(encoding="utf-8"), folder), encoding="utf-8")
    return path


# -- ratios ---------------------------------------------------------------------------------------


def ratios(folder: Path = RESULTS) -> list[tuple[str, str, float, str]]:
    """Benchmark, what, ratio and goal, of every record that is there."""
    found: list[tuple[str, str, float, str]] = []
    if one := record("step", folder):
        for network in one["networks"]:
            for row in network["methods"]:
                what = f"{network['network']}, {row['method']}: update over its floor"
                found.append(("step", what, row["ratio"], f"{one['goal']:.2f} or less"))
    if one := record("jvp", folder):
        for name, update in one["updates"].items():
            found.append(("jvp", f"{name}: plain forward mode over ours", update["times_as_fast"], "more is better"))
    if one := record("overhead", folder):
        found.append(("overhead", f"{one['method']}: share outside networks and optimiser", one["outside"], f"{one['goal']}"))
    if one := record("roles", folder):
        found += [("roles", f"{row['case']}: of {row['over']}", row["ratio"], "") for row in one["rows"] if "ratio" in row]
    if one := record("memory", folder):
        for row in one["runs"]:
            found.append(
                ("memory", f"{row['model']} {row['method']} {row['role']}: predicted over measured", row["ratio"], "1")
            )
    if one := record("sampling", folder):
        for row in one["rows"]:
            what = f"{row['layout']}, batch {row['batch']}, {row['steps']} steps: calls, fastgen over diffusers"
            found.append(("sampling", what, row["fastgen_over_diffusers_calls"], "1.00 or less"))
    if one := record("scaling", folder):
        for row in one["rows"]:
            if "expected" in row:
                found.append(("scaling", f"{row['what']}: exponent", row["exponent"], f"{row['expected']:.2f}"))
            if "weak_cpu_over_one" in row:
                found.append(("scaling", "2 processes: CPU time of each over 1", row["weak_cpu_over_one"], "1"))
    return found
