"""A 4-step LoRA of one's own fine-tune, by the very commands of the documentation; and a fine-tuned network as the teacher."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgen.cli import main
from fastgen.config import DataConfig, LoRAConfig, RunConfig
from fastgen.errors import UserError
from fastgen.export.layouts import layout_of, original_weights
from fastgen.methods.dmd2 import DMD2
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.fine_tune import replace_network
from fastgen.training.run import distill, open_pipeline
from tests import tiny_models as tiny

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "turbo-my-fine-tune.md"
SMALL = ["train.steps=5", "train.batch=2", "train.sample_every=0", "lora.rank=4", "lora.alpha=4", "data.cache=cache"]
"""What the test lays over the page's command, so that it takes seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def style_lora(pipeline: Any, path: Path) -> None:
    """A LoRA on the UNet's attention that is not nothing."""
    unet = pipeline.unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), adapter_name="style")
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    layers = get_peft_model_state_dict(unet, adapter_name="style")
    pipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name)
    unet.delete_adapters("style")


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    teacher = tiny.sdxl()
    teacher.save_pretrained(tmp_path / "my-sdxl")
    style_lora(teacher, tmp_path / "my-style.safetensors")
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ring on a floor\n\nmany green things\n")

    for line in [line for block in blocks("sh") for line in block.splitlines()]:
        program, command, *rest = shlex.split(line)
        assert program == "fastgen"
        status = main([command, *rest, *(SMALL if command == "distill" else []), "--device", "cpu", "--quiet"])
        assert status == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "my-turbo"
    assert (run / "samples" / "step-00000005.png").is_file() and list(tmp_path.glob("cache/prompts-*/*.safetensors"))
    weights = load_file(tmp_path / "my-4-step-lora" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in weights.items() if ".lora_B." in key), "the student has not moved"

    [code] = blocks("python")
    calls: list[float] = []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)).flatten()[0]))

    load, sampled, rest = code.partition("image = pipeline")
    space: dict[str, Any] = {}
    exec(load, space)
    space["pipeline"].unet.register_forward_pre_hook(watch, with_kwargs=True)
    space["pipeline"].set_progress_bar_config(disable=True)
    exec(sampled + rest, space)
    assert calls == [999, 749, 499, 249]
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)
    card = (tmp_path / "my-4-step-lora" / "README.md").read_text(encoding="utf-8")
    for line in (
        "num_inference_steps=4, guidance_scale=1.0",
        'load_lora_weights("my-4-step-lora")',
        "LCMScheduler.from_pretrained",
    ):
        assert line in card and line in code


# -- a fine-tuned network ------------------------------------------------------------------------------


def tuned_weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {key: value + 0.5 for key, value in pipeline.unet.state_dict().items()}


def test_a_network_comes_from_a_folder_or_a_file(tmp_path: Path) -> None:
    pipeline = tiny.sdxl()
    tuned = tuned_weights(pipeline)
    other = tiny.sdxl()
    other.unet.load_state_dict(tuned)
    other.unet.save_pretrained(tmp_path / "whole" / "unet", max_shard_size="20KB")
    assert len(list((tmp_path / "whole" / "unet").glob("*.safetensors"))) > 1
    save_file(tuned, tmp_path / "unet.safetensors")
    for place in (tmp_path / "whole", tmp_path / "whole" / "unet", tmp_path / "unet.safetensors"):
        pipeline = tiny.sdxl()
        before, unet = pipeline.unet.state_dict()["conv_in.bias"].clone(), pipeline.unet
        replace_network(pipeline, place)
        assert pipeline.unet is unet and not torch.equal(before, unet.state_dict()["conv_in.bias"])
        assert all(torch.equal(value, tuned[key]) for key, value in unet.state_dict().items())
    half = tiny.sdxl().to(dtype=torch.bfloat16)
    replace_network(half, tmp_path / "unet.safetensors")
    assert half.unet.dtype == torch.bfloat16


def test_a_run_lays_weights_and_then_loras_over_its_teacher(tmp_path: Path) -> None:
    teacher = tiny.sdxl()
    teacher.save_pretrained(tmp_path / "base")
    tuned = {key: value * 1.5 for key, value in teacher.unet.state_dict().items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    style_lora(teacher, tmp_path / "style.safetensors")
    base, style = str(tmp_path / "base"), [str(tmp_path / "style.safetensors")]

    def run(**options: Any) -> RunConfig:
        return RunConfig("dmd2", DMD2(gan_weight=0), data=DataConfig(prompts="none.txt", **options.pop("data", {})), **options)

    def unet(**options: Any) -> dict[str, torch.Tensor]:
        return open_pipeline(run(pipeline=base, **options)).network.state_dict()

    plain, styled = unet(), unet(teacher_loras=style)
    both = unet(teacher_loras=style, teacher_weights=str(tmp_path / "tuned.safetensors"))
    moved = [key for key in plain if not torch.equal(plain[key], styled[key])]
    assert moved and all(key.endswith(("to_q.weight", "to_v.weight")) for key in moved)
    for key in plain:
        torch.testing.assert_close(both[key], tuned[key] + styled[key] - plain[key], rtol=1e-5, atol=1e-5)
    assert run(teacher_weights="x.safetensors").to_toml().splitlines()[1] == 'teacher_weights = "x.safetensors"'
    with pytest.raises(UserError, match=r"teacher_weights = 'none\.safetensors': there is no such file"):
        unet(teacher_weights="none.safetensors")
    lora = LoRAConfig(rank=3, alpha=6.0, targets=["to_q"], init="gaussian", dora=True, ranks={"fake_score": 2})
    opened = open_pipeline(run(pipeline=base, lora=lora, data={"height": 32, "width": 96}))
    assert opened.latent_shape == (4, 4, 12) and opened.lora == LoraOptions(
        3, 6.0, ("to_q",), "gaussian", True, {"fake_score": 2}
    )


@pytest.mark.parametrize(("content", "message"), [(b"\n", "is empty"), (b"\xff\n", "line 1 is not text in UTF-8")])
def test_bad_prompts_are_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr("fastgen.training.run.open_pipeline", lambda *args, **options: pytest.fail("loaded a model"))
    (tmp_path / "prompts.txt").write_bytes(content)
    config = RunConfig("dmd2", DMD2(gan_weight=0), data=DataConfig(prompts=str(tmp_path / "prompts.txt")))
    with pytest.raises(UserError, match=rf"prompts\.txt: {message}"):
        distill(config, tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run").exists(), "nothing is left"


def test_a_file_in_the_original_layout_is_converted(tmp_path: Path) -> None:
    pipeline = tiny.sdxl()
    tuned = tuned_weights(pipeline)
    names = layout_of(Pipeline.wrap(pipeline), pipeline.unet, "single-file")
    original = {f"model.diffusion_model.{key}": value for key, value in original_weights(names, tuned).items()}
    assert not original.keys() & tuned.keys()
    save_file(original | {"first_stage_model.encoder.conv_in.bias": torch.zeros(1)}, tmp_path / "whole.safetensors")
    replace_network(pipeline, tmp_path / "whole.safetensors")
    assert all(torch.equal(value, tuned[key]) for key, value in pipeline.unet.state_dict().items())
    missing = {key: value for key, value in original.items() if not key.endswith("input_blocks.0.0.bias")}
    save_file(missing, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"less\.safetensors: does not fit .*conv_in\.bias"):
        replace_network(pipeline, tmp_path / "less.safetensors")


def test_a_network_of_another_architecture_names_the_first_key(tmp_path: Path) -> None:
    pipeline = tiny.sdxl()
    own = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}

    def told(weights: dict[str, torch.Tensor]) -> str:
        save_file(weights, tmp_path / "unet.safetensors")
        with pytest.raises(UserError) as caught:
            replace_network(pipeline, tmp_path / "unet.safetensors")
        assert all(torch.equal(value, own[key]) for key, value in pipeline.unet.state_dict().items())
        return str(caught.value)

    tuned = tuned_weights(pipeline)
    assert "has no 'down_blocks.9.extra'" in told(tuned | {"down_blocks.9.extra": torch.zeros(1)})
    assert "'conv_in.bias' is [3] in the file and [16] in the pipeline" in told(tuned | {"conv_in.bias": torch.zeros(3)})
    assert "lacks 'conv_in.bias'" in told({key: value for key, value in tuned.items() if key != "conv_in.bias"})
    message = told({"double_blocks.0.img_mod.lin.weight": torch.zeros(4, 4)})
    assert "does not fit a UNet2DConditionModel, beginning with 'double_blocks.0.img_mod.lin.weight'" in message
    (tmp_path / "unet.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"unet\.safetensors: is not a readable safetensors file"):
        replace_network(pipeline, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match=r"must be an existing \.safetensors file, or a folder with a fine-tuned unet"):
        replace_network(pipeline, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        replace_network(pipeline, tmp_path / "empty")
    tiny.sd3().transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match="is a SD3Transformer2DModel, but the pipeline's unet is a UNet2DConditionModel"):
        replace_network(pipeline, tmp_path / "transformer")
