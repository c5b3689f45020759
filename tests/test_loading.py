"""Loading pipeline folders: what works, and one sentence for each thing that cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.errors import UserError
from fastgen.pipelines import LoraOptions, Pipeline, load_pipeline
from tests import tiny_models as tiny
from tests.test_pipelines import relative
from tests.tiny_models import PROMPTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "toy"
    tiny.toy().save_pretrained(path)
    return path


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_loading_a_folder(folder: Path) -> None:
    pipeline = load_pipeline(str(folder), offline=True, roles={"student": "lora"}, lora=LoraOptions(rank=2))
    condition = pipeline.encode_prompts(PROMPTS)
    original = Pipeline.wrap(tiny.toy())
    xt, t = torch.randn(2, 6, 8, 8), torch.tensor([0.4, 1.0])
    expected = original.frozen()(xt, t, original.encode_prompts(PROMPTS)).output
    assert relative(pipeline.frozen()(xt, t, condition).output, expected) < 1e-5
    assert sum(p.numel() for p in pipeline.trainable("student").parameters()) < 50_000


def broken_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    change(index)
    (folder / "model_index.json").write_text(json.dumps(index))


def test_paths_that_are_no_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    for path, message in [
        (str(tmp_path / "nowhere"), "does not exist"),
        ("./nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        (str(file), "is a file"),
        (str(tmp_path), "no model_index.json"),
    ]:
        with pytest.raises(UserError, match=message):
            load_pipeline(path)


def test_a_hub_name_offline() -> None:
    with pytest.raises(UserError, match="offline mode forbids a download"):
        load_pipeline("nobody/no-such-model", offline=True)


def test_a_missing_component(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="lacks the component 'vae'"):
        load_pipeline(str(broken))


def test_a_component_without_weights(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(broken))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path, component: str) -> None:
    broken = copy(folder, tmp_path)
    weights = next((broken / component).glob("*.safetensors"))
    weights.with_name(weights.stem.replace("model", "pytorch_model", component == "text_encoder") + ".bin").write_bytes(b"\x80")
    weights.unlink()
    with pytest.raises(UserError, match="is pickled and is not read"):
        load_pipeline(str(broken))


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(broken))


def test_indexes_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    for change, message in [
        (lambda index: index.update(_class_name="NoSuchPipeline"), "NoSuchPipeline"),
        (lambda index: index.update(_class_name=["my_code", "Mine"]), "does not know"),
        (lambda index: index.pop("_class_name"), "must be a JSON object with a _class_name"),
        (lambda index: index.update(unet=["my_code", "UNet"]), "loads unet from 'my_code'"),
    ]:
        shutil.copy(folder / "model_index.json", broken)
        broken_index(broken, change)
        with pytest.raises(UserError, match=message):
            load_pipeline(str(broken))
    (broken / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is not a pipeline's index"):
        load_pipeline(str(broken))
