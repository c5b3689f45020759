"""A new user's walk through docs/turbo-my-fine-tune.md: its lines as they are written, on a tiny SDXL made on the spot."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgen.cli import main
from fastgen.export import export, read_export
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.samplers import FewStep
from tests import tiny_models as tiny

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "turbo-my-fine-tune.md"
SHORT = ["train.steps=2", "train.batch=2", "train.sample_every=2", "lora.rank=4", "data.cache=cache", "--device", "cpu", "-q"]


def blocks(language: str) -> list[str]:
    return re.findall(f"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def command(line: str) -> list[str]:
    name, *rest = shlex.split(line)
    assert name == "fastgen"
    return rest


@pytest.mark.slow
def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    tiny.sdxl().save_pretrained("my-sdxl")
    style = Pipeline.wrap(tiny.sdxl(), roles={"student": "lora"}, lora=LoraOptions(rank=2))
    drawn = style.trainable("student")
    with torch.no_grad():
        for weight in drawn.parameters():
            weight += 0.05 * torch.randn_like(weight)
    export(style, drawn, FewStep((1.0,)), tmp_path / "style", format="diffusers-lora")
    shutil.move("style/pytorch_lora_weights.safetensors", "my-style.safetensors")
    Path("prompts.txt").write_text("a red cube\na blue ring\ntwo green stars\n", encoding="utf-8")

    distill, plan, exported = (command(block) for block in blocks("sh"))
    assert main([*plan, "--offline", "-q"]) == 0
    assert main([*distill, *SHORT, "--offline"]) == 0
    assert list(Path("runs/my-turbo/samples").glob("*.png")), "grids to look at"
    assert main([*distill, *SHORT, "--offline"]) == 0, "an interrupted run goes on with the same command"
    assert main([*exported, "--offline", "-q", "--device", "cpu"]) == 0
    told = read_export(Path("my-4-step-lora"))
    assert told["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0} and told["scheduler"]["class"] == "LCMScheduler"
    assert load_file("my-4-step-lora/pytorch_lora_weights.safetensors")

    [code] = blocks("python")
    Path("use.py").write_text(f"import sys\nsys.modules['fastgen'] = None\n{code}", encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "use.py"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open("image.png") as picture:
        assert picture.size == (64, 64)
    for format in ("kohya", "comfyui"):
        assert main(["export", "runs/my-turbo", "--format", format, "-o", format, "--offline", "-q", "--device", "cpu"]) == 0
        assert Path(format, f"{format}.safetensors").is_file()
