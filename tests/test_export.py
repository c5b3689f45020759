"""Exports, loaded and sampled by plain diffusers in a process that cannot import fastgen, against our own sampler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export import export, read_export
from fastgen.pipelines import Pipeline
from fastgen.samplers import FewStep, timesteps_to_times
from tests import tiny_models as tiny
from tests.exports import Case, Drawn, drawn_elsewhere, trained, wrapped


def euler() -> Any:
    return tiny.sd15(scheduler=EulerDiscreteScheduler(**tiny.BETAS, timestep_spacing="trailing"))


CASES = {
    "ddim": Case(tiny.toy, "diffusers", scheduler="DDIMScheduler", card=True),
    "one_step": Case(tiny.toy, "diffusers-lora", mode="lora", steps=1, scheduler="DDIMScheduler"),
    "lcm_lora": Case(tiny.toy, "diffusers-lora", mode="lora", gamma=1.0, scheduler="LCMScheduler", card=True),
    "lcm_merged": Case(tiny.toy, "diffusers", mode="lora", gamma=1.0, scheduler="LCMScheduler"),
    "tcd": Case(tiny.toy, "diffusers", gamma=0.3, scheduler="TCDScheduler"),
    # A squared signal of 2^-24 where the toy's table has none.
    "three_steps": Case(tiny.toy, "diffusers-lora", mode="lora", steps=3, scheduler="EulerDiscreteScheduler", error=1e-3),
    "embedded": Case(tiny.toy, "diffusers", gamma=1.0, guidance=7.0, embeds=True, scheduler="LCMScheduler"),
    "guided_eps": Case(tiny.sd15, "diffusers", steps=8, guidance=4.0, scheduler="DDIMScheduler"),
    "from_euler": Case(euler, "diffusers-lora", mode="lora", gamma=1.0, timesteps=(999, 749, 300), scheduler="LCMScheduler"),
    "sdxl_lora": Case(
        tiny.sdxl, "diffusers-lora", mode="lora", gamma=1.0, timesteps=(999, 749, 499, 249), scheduler="LCMScheduler"
    ),
    "sdxl_full": Case(tiny.sdxl, "diffusers", timesteps=(999, 480), scheduler="EulerDiscreteScheduler"),
    "sd3_lora": Case(tiny.sd3, "diffusers-lora", mode="lora", shift=3.0, scheduler="FlowMatchEulerDiscreteScheduler"),
    "sd3_full": Case(tiny.sd3, "diffusers", gamma=1.0, steps=2, shift=3.0, scheduler="FlowMatchEulerDiscreteScheduler"),
    "flux_lora": Case(
        tiny.flux, "diffusers-lora", mode="lora", gamma=1.0, guidance=3.5, size=64, scheduler="FlowMatchEulerDiscreteScheduler"
    ),
    "flux_full": Case(tiny.flux, "diffusers", guidance=2.0, size=64, scheduler="FlowMatchEulerDiscreteScheduler"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_elsewhere(CASES, tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_draws_what_we_draw(name: str, exported: Drawn) -> None:
    assert exported.error(name) < CASES[name].error
    assert read_export(exported.root / name)["scheduler"]["class"] == CASES[name].scheduler


def test_the_students_weights_are_in_the_export(exported: Drawn) -> None:
    root = exported.root
    student = load_file(root / "lcm_merged" / "unet" / "diffusion_pytorch_model.safetensors")
    teacher = tiny.toy().unet.state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.allclose(student[key], teacher[key]) for key in teacher)
    lora = load_file(root / "lcm_lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and re.search(r"\.lora_[AB]\.weight$", key) for key in lora)


def test_weights_say_where_they_come_from(exported: Drawn) -> None:
    root = exported.root
    for file in ("ddim/unet/diffusion_pytorch_model.safetensors", "lcm_lora/pytorch_lora_weights.safetensors"):
        with safe_open(root / file, framework="pt") as reader:
            labels = reader.metadata()
        assert labels["fastgen.method"] == "lcm"
        assert labels["format"] == "pt"
        assert json.loads(labels["fastgen.sampler"])["times"] == [1.0, 0.75, 0.5, 0.25]
        assert json.loads(labels["fastgen.call"])["guidance_scale"] == 1.0
        assert "base-" in labels["fastgen.base"]


def test_the_model_cards_lines_draw_a_picture(exported: Drawn) -> None:
    root = exported.root
    for name in (name for name, case in CASES.items() if case.card):
        assert (root / name / "image.png").stat().st_size > 100
    assert "num_inference_steps=4, guidance_scale=1.0" in (root / "sdxl_lora" / "README.md").read_text()
    card = (root / "from_euler" / "README.md").read_text()
    assert "timesteps=[999, 749, 300], guidance_scale=1.0" in card
    assert "Pass `timesteps` as above" in card
    assert "Noise is drawn between the steps" in card
    assert "eta=0.3" in (root / "tcd" / "README.md").read_text()
    assert "guidance_scale=3.5, height=64, width=64" in (root / "flux_lora" / "README.md").read_text()


def test_a_teachers_loras_are_in_the_snippet_of_a_lora(tmp_path: Path) -> None:
    pipeline = wrapped(CASES["lcm_lora"])
    record = {"base": "owner/model", "teacher_loras": ["styles/ink.safetensors"]}
    folder = export(pipeline, trained(pipeline), FewStep((1.0,)), tmp_path / "x", format="diffusers-lora", record=record)
    code = (folder / "README.md").read_text()
    style, student = code.index('"styles", weight_name="ink.safetensors"'), code.index(f'load_lora_weights("{folder}")')
    assert style < code.index("fuse_lora()") < student


def test_exporting_leaves_pipeline_and_student_as_they_were(tmp_path: Path) -> None:
    pipeline = wrapped(CASES["lcm_lora"])
    student, scheduler = trained(pipeline), pipeline.diffusers.scheduler
    before = {key: value.clone() for key, value in pipeline.network.state_dict().items()}
    export(pipeline, student, FewStep((1.0, 0.5), 1.0), tmp_path / "x", record={})
    assert pipeline.diffusers.unet is pipeline.network is student.network
    assert pipeline.diffusers.scheduler is scheduler
    assert pipeline.diffusers.config["scheduler"][1] == "DDIMScheduler"
    after = pipeline.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_base_scheduler_left_at_its_defaults_keeps_its_table(tmp_path: Path) -> None:
    # LCMScheduler's default table is another than DDIMScheduler's, so nothing may be left to defaults.
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    bare = {key: config[key] for key in ("_class_name", "_diffusers_version")}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(bare))
    pipeline = Pipeline.wrap(tiny.sd15(scheduler=DDIMScheduler.from_pretrained(tmp_path / "scheduler")))
    folder = export(pipeline, trained(pipeline), FewStep((1.0, 0.5), 1.0), tmp_path / "x")
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (written["_class_name"], written["beta_schedule"], written["beta_end"]) == ("LCMScheduler", "linear", 0.02)


@pytest.fixture(scope="module")
def small() -> tuple[Pipeline, Denoiser]:
    pipeline = wrapped(CASES["ddim"])
    return pipeline, trained(pipeline)


def test_a_previous_export_is_replaced_and_anything_else_is_kept(small: Any, tmp_path: Path) -> None:
    export(*small, FewStep((1.0,)), tmp_path / "x")
    export(*small, FewStep((1.0, 0.5)), tmp_path / "x")
    assert read_export(tmp_path / "x")["sampler"]["steps"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is not an export"):
        export(*small, FewStep((1.0,)), tmp_path / "mine")
    with pytest.raises(UserError, match="holds something that is not an export"):
        export(*small, FewStep((1.0,)), tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x"]


def test_a_failed_export_leaves_the_previous_one_and_no_scraps(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(*small, FewStep((1.0,)), tmp_path / "x")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgen.export.folder._label", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(*small, FewStep((1.0, 0.5)), tmp_path / "x")
    assert read_export(tmp_path / "x")["sampler"]["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_cannot_be_exported_is_refused_in_one_sentence(small: Any, tmp_path: Path) -> None:
    output = tmp_path / "x"
    with pytest.raises(UserError, match=r"full weights has no LoRA.*format 'diffusers'"):
        export(*small, FewStep((1.0,)), output, format="diffusers-lora")
    with pytest.raises(UserError, match="'gguf' is not known; it must be one of diffusers, diffusers-lora"):
        export(*small, FewStep((1.0,)), output, format="gguf")
    flow = Pipeline.wrap(tiny.sd3(), roles={"student": "lora"})
    with pytest.raises(UserError, match="no stock diffusers scheduler"):
        export(flow, trained(flow), FewStep((1.0, 0.5), gamma=0.3), output, format="diffusers-lora")
    with pytest.raises(UserError, match=r"is not an export: it has no readable fastgen\.json"):
        read_export(output)
    output.mkdir()
    (output / "fastgen.json").write_text('["call"]')
    with pytest.raises(UserError, match="is not an export's description"):
        read_export(output)
    assert list(output.iterdir()) == [output / "fastgen.json"]


def test_a_pipeline_that_takes_no_explicit_times_is_refused(small: Any, tmp_path: Path) -> None:
    pipeline, student = small

    class NoTimes(type(pipeline.diffusers)):
        def __call__(self, prompt: str, num_inference_steps: int = 50, guidance_scale: float = 1.0) -> None: ...

    stock, sampler = pipeline.diffusers.__class__, FewStep(timesteps_to_times(pipeline.process, [999, 100]), 1.0)
    pipeline.diffusers.__class__ = NoTimes
    try:
        with pytest.raises(UserError, match="takes no 'timesteps', which this sampler needs"):
            export(pipeline, student, sampler, tmp_path / "x")
    finally:
        pipeline.diffusers.__class__ = stock
