"""What an export tells of its run and sampler, what it refuses, and `fastgen export` of averaged and of raw weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastgen.cli.export
from fastgen.cli import main
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export import FORMATS, export, read_export, require_own_call
from fastgen.export.origin import base_hash, shift_of
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.tiny import transformers
from fastgen.samplers import FewStep, even_times
from tests import tiny_models as tiny


@pytest.fixture(scope="module")
def small() -> tuple[Pipeline, Denoiser]:
    pipeline = Pipeline.wrap(tiny.sd15(), roles={"student": "lora"}, lora=LoraOptions(rank=2))
    return pipeline, pipeline.trainable("student").eval()


def test_a_sampler_that_was_not_trained_is_refused_with_both_named(small: Any, tmp_path: Path) -> None:
    own, other = FewStep((1.0, 0.5), 1.0), FewStep((1.0,), 1.0)
    with pytest.raises(
        UserError, match=r"trained for FewStep, 2 steps, times \(1, 0.5\), gamma 1, .*not for .*1 step, times \(1\)"
    ):
        export(*small, other, tmp_path / "x", format="kohya", trained=own)
    assert not (tmp_path / "x").exists()
    export(*small, own, tmp_path / "x", format="kohya", trained=own)
    assert "Not sampled as it was trained" not in (tmp_path / "x" / "README.md").read_text()
    export(*small, other, tmp_path / "x", format="kohya", trained=own, force=True)
    assert "trained for FewStep, 2 steps, times (1, 0.5)" in (tmp_path / "x" / "README.md").read_text()
    told = read_export(tmp_path / "x")
    require_own_call(told, {"num_inference_steps": 1, "height": 64})
    with pytest.raises(UserError, match="made for num_inference_steps = 1, not for 4"):
        require_own_call(told, {"num_inference_steps": 4})
    with pytest.raises(UserError, match=r"made for guidance_scale = 1.0, not for 7.5"):
        require_own_call(told, {"guidance_scale": 7.5})


def test_the_card_shows_samples_and_evaluation(small: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "grid.png")
    evaluation = {"scores": {"fid": 12.3456, "accuracy": 0.5}, "notes": ["few images"]}
    record = {"samples": str(tmp_path / "grid.png"), "evaluation": evaluation, "updates": 3}
    folder = export(*small, FewStep((1.0,)), tmp_path / "x", format="diffusers-lora", record=record)
    card = (folder / "README.md").read_text()
    assert "](samples.png)" in card and (folder / "samples.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert "| fid | 12.35 |\n| accuracy | 0.5 |" in card and "- few images" in card
    assert str(tmp_path / "grid.png") not in (folder / "fastgen.json").read_text()


def test_the_bases_hash_is_of_its_weights_alone(small: Any) -> None:
    bare = tiny.sd15().unet
    assert base_hash(small[0].network) == base_hash(bare)
    lines, weights = hashlib.sha256(), bare.state_dict()
    for name in sorted(weights):
        lines.update(
            f"{name} torch.float32 {','.join(map(str, weights[name].shape))}\n".encode() + weights[name].numpy().tobytes()
        )
    assert base_hash(bare) == lines.hexdigest()
    with torch.no_grad():
        bare.conv_out.bias[0] += 1e-3
    assert base_hash(bare) != base_hash(small[0].network)
    assert base_hash(bare.bfloat16()) != base_hash(bare.float())


def test_the_shift_is_read_from_the_times() -> None:
    assert [shift_of(even_times(4, None, shift)) for shift in (1.0, 3.0, 11.5)] == [1.0, 3.0, 11.5]
    assert shift_of((1.0, 0.9, 0.2)) is None and shift_of((0.9, 0.4)) is None and shift_of((1.0,)) == 1.0


RUN = """
pipeline = "{teacher}"
roles.student = "lora"
[method]
name = "dmd2"
gan_weight = 0.0
steps = 2
student_every = 1
[lora]
rank = 2
[data]
prompts = "{prompts}"
[train]
steps = 2
batch = 2
lr = 1e-2
threads = 1
ema = {ema}
"""


def test_a_run_is_exported_from_either_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.toy().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ring\n")
    for name, ema in (("run", 0.9), ("plain", 0.0)):
        text = RUN.format(teacher=tmp_path / "teacher", prompts=tmp_path / "prompts.txt", ema=ema)
        (tmp_path / f"{name}.toml").write_text(text)
        assert main(["distill", str(tmp_path / f"{name}.toml"), "--output", str(tmp_path / name), "-q", "--device", "cpu"]) == 0
    (tmp_path / "run" / "evaluation.json").write_text('{"scores": {"accuracy": 0.25}}')
    capsys.readouterr()

    def made(run: str, *flags: str) -> tuple[int, dict[str, Any], str]:
        status = main(["export", str(tmp_path / run), "--device", "cpu", "-q", "--json", *flags])
        told = capsys.readouterr()
        return status, json.loads(told.out) if status == 0 else {}, told.err

    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    files = {}
    for weights in ("ema", "raw"):
        flags = ("--weights", weights, "--checkpoint", checkpoint, "--format", "kohya", "-o", str(tmp_path / weights))
        status, told, _ = made("run", *flags)
        assert (status, told["weights"]) == (0, weights)
        files[weights] = load_file(tmp_path / weights / f"{weights}.safetensors")
    assert any(not torch.equal(files["ema"][key], files["raw"][key]) for key in files["raw"])
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "| accuracy | 0.25 |" in card and "averaged over training" in card
    assert "averaged over training" not in (tmp_path / "raw" / "README.md").read_text()
    measured = {"scores": {"accuracy": 0.25}, "settings": {"updates": 1, "averaged": True}}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(measured))
    assert made("run", "-o", str(tmp_path / "since"))[0] == 0
    assert "accuracy" not in (tmp_path / "since" / "README.md").read_text(), "that was another student"
    new = ("-o", str(tmp_path / "new"))
    for flags, complaint in (
        (("--weights", "best"), "--weights best: must be one of ema, raw"),
        (("--weights", "ema", "--no-ema"), "contradict each other"),
        (("--steps", "1"), r"was trained for FewStep, 2 steps"),
        (("--format", "gguf"), "--format gguf: must be one of diffusers, diffusers-lora, kohya, comfyui, fused, single-file"),
    ):
        status, _, err = made("run", *new, *flags)
        assert status == 2 and complaint in err and err.count("\n") == 1
    status, _, err = made("plain", *new, "--weights", "ema")
    assert status == 2 and "holds no average" in err
    status, told, _ = made("run", *new, "--steps", "1", "--force", "--format", "fused")
    assert status == 0 and told["call"]["num_inference_steps"] == 1
    (tmp_path / "run" / "evaluation.json").write_text('{"scores": [1]}')
    status, _, err = made("run", "-o", str(tmp_path / "other"))
    assert status == 2 and "is not a record of fastgen eval" in err
    assert tuple(FORMATS) == fastgen.cli.export.FORMATS


def test_a_guider_stays_at_home_and_true_guidance_is_told(tmp_path: Path) -> None:
    for diffusers in (transformers.hunyuan_image(), transformers.hunyuan_image(guided=False), transformers.qwen_image()):
        pipeline = Pipeline.wrap(diffusers, height=64, width=64)
        sampler = FewStep(even_times(2, pipeline.process), gamma=0.0, guidance=2.0 if pipeline.embeds_guidance else 1.0)
        folder = export(pipeline, pipeline.trainable("student"), sampler, tmp_path / "export")
        call, index = read_export(folder)["call"], json.loads((folder / "model_index.json").read_text())
        if pipeline.embeds_guidance:
            assert call["distilled_guidance_scale"] == 2.0
        elif "Qwen" in type(diffusers).__name__:
            assert call["true_cfg_scale"] == 1.0 and "guidance_scale" not in call
        else:
            assert index["guider"] == [None, None]
