"""What the README says of the package is what the package says of itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_benchmark", ROOT / "benchmarks" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_the_registry() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    module = benchmark()
    assert module.put(text, "methods", module.methods_table()) == text, "run python -m benchmarks.quickstart"


def test_every_file_of_the_layout_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Layout")[2].partition("One training step")[0]
    named = [word for word in text.split() if word.startswith("fastgen/") or word in ("configs/", "tests/", "benchmarks/")]
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_marks_survive_a_rewrite() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    once = benchmark().put(text, "x", "new")
    assert once == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb" == benchmark().put(once, "x", "new")
