"""`fastgen methods`: what there is, and one method with its paper, its options and a config to start from."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.cli.options import add_common, emit

CALLS = "network calls with gradient + without, by the method's toy recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", nargs="?", help="explain this one, with a starter config")
    add_common(parser, "file for the listing or the starter config")


def run(args: argparse.Namespace) -> int:
    from fastgen.methods import find, names

    if args.method is None:
        rows = [summary(name, find(name)) for name in names()]
        emit(args, rows, listing(rows), args.output)
        return 0
    about = explained(args.method, find(args.method))
    comment = "".join(f"# {line}".rstrip() + "\n" for line in about["documentation"].splitlines())
    facts = {"needs": ", ".join(about["needs"]), "networks": ", ".join(about["roles"]), "steps": spans(about["steps"])}
    facts["calls"] = f"{calls(about)} an update ({CALLS})" if about["calls"] else ""
    told = "".join(f"# {key}: {value}\n" for key, value in facts.items() if value)
    emit(args, about, f"{comment}#\n{told}\n{about['config']}", args.output)
    return 0


def summary(name: str, cls: type) -> dict[str, Any]:
    """One method in a line: what it is and needs, which networks there are, in how many steps its student is sampled, what
    an update costs. The last three were counted with its toy recipe; of a plugin they are not known.
    """
    counted = costs().get(name, {})
    return {
        "name": name,
        "family": getattr(cls, "family", ""),
        "summary": documentation(cls).split("\n")[0],
        "needs": sorted(cls().needs),
        "roles": counted.get("roles", []),
        "steps": counted.get("steps", []),
        "calls": {key: counted[key] for key in ("trained", "forward") if key in counted},
    }


@functools.cache
def costs() -> dict[str, Any]:
    """What `python -m benchmarks.costs` counted."""
    found: dict[str, Any] = json.loads((Path(__file__).parents[1] / "methods" / "costs.json").read_text(encoding="utf-8"))
    return found


def listing(rows: Sequence[dict[str, Any]]) -> str:
    """The methods by family, as text."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':<{width}}  {'steps':<9} {'calls':<11} {'needs':<15} networks"]
    for family in dict.fromkeys(sorted(row["family"] for row in rows)):
        lines += ["", family or "others"]
        for row in (row for row in rows if row["family"] == family):
            needs, networks = ", ".join(row["needs"]), ", ".join(row["roles"])
            lines.append(f"{row['name']:<{width}}  {spans(row['steps']):<9} {calls(row):<11} {needs:<15} {networks}".rstrip())
            lines.append(f"{'':<{width}}  {row['summary']}")
    lines += ["", f"calls: for an update of the student, {CALLS}"]
    return "\n".join(lines)


def calls(row: dict[str, Any]) -> str:
    """Such as "3 + 4"."""
    return f"{row['calls']['trained']:g} + {row['calls']['forward']:g}" if row["calls"] else ""


def spans(numbers: Sequence[int]) -> str:
    """Such as "1-4, 8"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{some[0]}-{some[-1]}" if len(some) > 1 else str(some[0]) for some in found)


def documentation(cls: type) -> str:
    """The method's own docstring; what a dataclass writes for want of one says nothing."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return text if not text.startswith(f"{cls.__name__}(") else inspect.getdoc(inspect.getmodule(cls)) or ""


def explained(name: str, cls: type) -> dict[str, Any]:
    from fastgen import config, schema

    known = schema.settings(cls)
    helps = config.helps({key: each for key, (each, _) in known.items()})
    options = [
        {"name": key, "type": schema.expected(hint), "default": plain(schema.default(each)), "help": helps[key]}
        for key, (each, hint) in known.items()
    ]
    return {
        **summary(name, cls), "documentation": documentation(cls), "options": options,
        "config": config.starter(name),
    }  # fmt: skip


def plain(value: Any) -> Any:
    """A default as JSON takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return None if value is dataclasses.MISSING else value
