"""What the README says of the package is what the package says of itself."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from fastgen.data.toy.captions import caption
from fastgen.data.toy.scenes import render, sample_scenes
from fastgen.training.run import TOY_TEACHER

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


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(3, generator)
    for i, (picture, text) in enumerate(zip(render(scenes, generator), caption(scenes), strict=True)):
        Image.fromarray(((picture + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(text)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    for theirs, ours in (("path/to/my-finetune", str(TOY_TEACHER)), ("steps=1000, batch=16", "steps=2, batch=2")):
        assert theirs in code
        code = code.replace(theirs, ours)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-4-step-lora" / "pytorch_lora_weights.safetensors").is_file()
