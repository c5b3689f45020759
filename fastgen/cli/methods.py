"""`fastgen methods`: what there is, and one method with its paper, its options and a config to start from."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from fastgen.cli.options import add_common, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", nargs="?", help="explain this one, with a starter config")
    add_common(parser, "file for the listing or the starter config")


def run(args: argparse.Namespace) -> int:
    from fastgen.methods import find, names

    if args.method is None:
        rows = [summary(name, find(name)) for name in names()]
        width = max(len(row["name"]) for row in rows)
        lines = [f"{row['name']:<{width}}  {row['summary']}" for row in rows]
        emit(args, rows, "\n".join(lines), args.output)
        return 0
    about = explained(args.method, find(args.method))
    comment = "".join(f"# {line}".rstrip() + "\n" for line in about["documentation"].splitlines())
    emit(args, about, f"{comment}#\n# needs: {', '.join(about['needs'])}\n\n{about['config']}", args.output)
    return 0


def summary(name: str, cls: type) -> dict[str, Any]:
    needs: Any = getattr(cls, "needs", ())
    needs = () if isinstance(needs, property) else needs  # decided by its options
    return {"name": name, "summary": documentation(cls).split("\n")[0], "needs": sorted(needs)}


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
    instance_needs = sorted(cls().needs)
    return {
        **summary(name, cls), "needs": instance_needs, "documentation": documentation(cls), "options": options,
        "config": config.starter(name),
    }  # fmt: skip


def plain(value: Any) -> Any:
    """A default as JSON takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return None if value is dataclasses.MISSING else value
