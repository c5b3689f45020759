"""What the code imports is declared: a base install imports all but what measures, and nothing asks for an unknown package."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgen.cli import EVAL_EXTRA

ROOT = Path(__file__).parents[1]
MEASURING = ("fastgen.eval", "fastgen.data.toy.clip")
"""What needs the extra `eval` to be imported at all; others import it inside functions."""
CALLED = {"PIL": "pillow", "open_clip": "open-clip-torch"}
"""Modules that are not called as the packages that they come with."""
BROUGHT = {"huggingface-hub", "packaging", "tokenizers"}
"""Packages that come with transformers, always."""


def plain(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].replace("_", "-").lower()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {plain(line) for line in PROJECT["dependencies"]} | BROUGHT
EXTRAS = {extra: {plain(line) for line in lines} for extra, lines in PROJECT["optional-dependencies"].items()}


def imports(tree: ast.AST, top: bool = True) -> Iterator[tuple[str, bool]]:
    """Names that a module imports, `from a import b` as `a.b`, and whether that is at its top; none that types alone need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((each.name, top) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{each.name}", top) for each in node.names)
        yield from imports(node, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def measures(name: str) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in MEASURING)


def undeclared(module: str, source: str) -> list[str]:
    """Imports that a user may lack: at the top of a module what is no core dependency, in functions what no extra has."""
    found = []
    for name, top in imports(ast.parse(source)):
        first = name.split(".")[0]
        if first == "fastgen":
            wrong = top and measures(name) and not measures(module)
        else:
            package = CALLED.get(first, first.replace("_", "-"))
            there = CORE.union(*EXTRAS.values()) if not top else CORE | EXTRAS["eval"] if measures(module) else CORE
            wrong = first not in sys.stdlib_module_names and package not in there
            wrong |= top and package in EXTRAS["eval"] and first not in EVAL_EXTRA
        found += [name] if wrong else []
    return found


def test_what_is_imported_is_declared() -> None:
    """Where the extra `eval` is not installed, `EVAL_EXTRA` has commands say so."""
    for path in sorted((ROOT / "fastgen").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert undeclared(module, path.read_text(encoding="utf-8")) == [], path
    needs = importlib.metadata.requires("transformers") or []
    assert {plain(line) for line in needs if "extra ==" not in line} >= BROUGHT


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastgen.process", "import torchvision"),
        ("fastgen.process", "try:\n    import datasets\nexcept ImportError:\n    pass"),
        ("fastgen.process", "class A:\n    from timm import create_model"),
        ("fastgen.process", "def late():\n    import sklearn"),
        ("fastgen.cli.eval", "from fastgen import eval"),
        ("fastgen.cli.eval", "from fastgen.eval.features import embed"),
        ("fastgen.data.source", "from fastgen.data.toy.clip import WEIGHTS"),
        ("fastgen.eval.table", "import datasets"),
        ("fastgen.eval.table", "import scipy"),
    ],
)
def test_what_is_not_declared_is_seen(module: str, line: str) -> None:
    assert undeclared(module, line)
