"""Arrows point one way, and the mathematics knows torch alone (and safetensors, for what it saves)."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastgen"

CORE = {"errors", "process", "denoiser", "samplers"}
MATHS = {*CORE, "losses", "critics", "rollouts", "tangents", "backbones", "rewards", "pipelines", "method", "families"}
MAY_IMPORT = {  # room -> the rooms of fastgen that it may know; a room is a module or a package right under fastgen
    "errors":    set(),
    "schema":    {"errors"},
    "process":   {"errors"},
    "condition": set(),
    "taps":      {"errors", "schema"},
    "denoiser":  {"errors", "process", "condition", "taps"},
    "samplers":  {"errors", "process", "denoiser"},
    "losses":    CORE,
    "rollouts":  CORE,
    "tangents":  CORE | {"losses"},
    "critics":   CORE | {"losses", "backbones"},
    "backbones": {"errors"},
    "rewards":   {"errors"},
    "analytic":  CORE,
    "attention": {"errors"},
    "adapters":  {"errors", "process", "denoiser", "attention"},
    "pipelines": CORE | {"adapters", "attention"},
    "method":    CORE | {"pipelines"},
    "families":  MATHS - {"families"},
    "methods":   MATHS,
    "config":    {"errors", "schema", "method", "methods"},
    "data":      CORE | {"schema", "pipelines", "method", "config"},
    "export":    CORE | {"schema", "adapters", "pipelines", "data"},
    "eval":      CORE | {"schema", "adapters", "pipelines", "data", "export"},
    "training":  MATHS | {"schema", "adapters", "attention", "methods", "data", "config", "export"},
}  # fmt: skip
TORCH_ALONE = {
    "errors",
    "process",
    "condition",
    "taps",
    "denoiser",
    "samplers",
    "losses",
    "rollouts",
    "tangents",
    "critics",
    "method",
    "families",
    "methods",
}
LEAVES = {"__main__", "cli", "plan", "quickstart"}  # see everything; nothing sees them


def imports(source: str) -> Iterator[str]:
    """Every absolute module name that a file imports, wherever in the file; `from a import b` gives `a.b` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def offences(room: str, source: str) -> list[str]:
    """Imports of a file in `room` that point the wrong way."""
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "fastgen":
            if room not in LEAVES and target not in {"__version__", room} and target not in MAY_IMPORT[room]:
                found.append(name)
        elif room in TORCH_ALONE and top not in sys.stdlib_module_names and top not in ("torch", "safetensors"):
            found.append(name)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(each for each in PACKAGE.rglob("*.py") if each != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT or room in LEAVES, f"say in MAY_IMPORT what {room} may know"
    assert offences(room, path.read_text(encoding="utf-8")) == []


def test_the_arrows_have_no_circle() -> None:
    list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("methods", "import diffusers"),
        ("methods", "from fastgen.training.run import distill"),
        ("methods", "def late():\n    from peft import LoraConfig"),
        ("process", "from fastgen.denoiser import Denoiser"),
        ("eval", "from fastgen.methods import find"),
        ("eval", "from fastgen import training"),
        ("export", "import fastgen.training.checkpoint"),
        ("training", "from fastgen.cli import main"),
    ],
)
def test_wrong_arrows_are_seen(room: str, line: str) -> None:
    assert offences(room, line)


@pytest.mark.parametrize("name", ["eval", "pipelines"])
def test_the_links_at_the_root_are_for_browsing_only(name: str) -> None:
    link = ROOT / name
    if not link.is_dir():
        pytest.skip("a checkout without symbolic links")
    assert link.is_symlink() and link.resolve() == (PACKAGE / name).resolve()
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ImportError" in done.stderr and f"fastgen.{name}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("fastgen.cli, fastgen.config", "torch, diffusers"),
        ("fastgen.methods, fastgen.pipelines", "diffusers, peft, transformers"),
    ],
)
def test_imports_load_nothing_heavy(imported: str, heavy: str) -> None:
    code = f"import sys, {imported}; print([each for each in '{heavy}'.split(', ') if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
