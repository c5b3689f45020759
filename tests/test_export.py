"""Exports, loaded and sampled by plain diffusers in a process that cannot import fastgen, against our own sampler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.export import export, read_export
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.process import VP
from fastgen.samplers import FewStep, even_times, timesteps_to_times
from tests import tiny_models as tiny

PROMPT = "a red cube"
SEED = 11

# Runs without fastgen: every case is loaded by stock diffusers, called as fastgen.json says, and its latents kept.
STOCK = """
import sys
sys.modules["fastgen"] = None
import json, re, torch, diffusers
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
latents = {}
for case in json.loads(Path(sys.argv[1], "cases.json").read_text()):
    folder = Path(case["folder"])
    told = json.loads((folder / "fastgen.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(case["base"])
    if told["format"] == "diffusers-lora":
        pipeline.load_lora_weights(folder)
        scheduler = getattr(diffusers, told["scheduler"]["class"])
        pipeline.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    assert type(pipeline).__name__ == told["pipeline"] and type(pipeline.scheduler).__name__ == told["scheduler"]["class"]
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(case["seed"])
    generator = torch.Generator().manual_seed(case["seed"])
    noise = load_file(case["noise"])["noise"]
    drawn = pipeline(case["prompt"], latents=noise, generator=generator, output_type="latent", **told["call"]).images
    latents[case["name"]] = drawn.contiguous()
    if case["snippet"]:
        code = re.search("```python\\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
        exec(code.replace("image.png", str(folder / "image.png")), {})
save_file(latents, Path(sys.argv[1], "latents.safetensors"))
assert not any(name.startswith("fastgen.") for name in sys.modules)
"""


@dataclass
class Case:
    """One export: a base, how its student is trained, and how it is sampled."""

    base: Callable[[], Any]
    mode: str
    gamma: float
    steps: int = 4
    guidance: float = 1.0
    timesteps: tuple[int, ...] = ()
    shift: float = 1.0
    size: int | None = None
    embeds: bool = False
    format: str = ""
    scheduler: str = ""
    snippet: bool = False
    tolerance: float = 1e-4


def euler() -> Any:
    return tiny.sd15(scheduler=EulerDiscreteScheduler(**tiny.BETAS, timestep_spacing="trailing"))


CASES = {
    "ddim": Case(tiny.toy, "full", 0.0, scheduler="DDIMScheduler", snippet=True),
    "one_step": Case(tiny.toy, "lora", 0.0, steps=1, scheduler="DDIMScheduler"),
    "lcm_lora": Case(tiny.toy, "lora", 1.0, scheduler="LCMScheduler", snippet=True),
    "lcm_merged": Case(tiny.toy, "lora", 1.0, format="diffusers", scheduler="LCMScheduler"),
    "tcd": Case(tiny.toy, "full", 0.3, scheduler="TCDScheduler"),
    # A squared signal of 2^-24 where the toy's table has none.
    "three_steps": Case(tiny.toy, "lora", 0.0, steps=3, scheduler="EulerDiscreteScheduler", tolerance=1e-3),
    "embedded": Case(tiny.toy, "full", 1.0, guidance=7.0, embeds=True, scheduler="LCMScheduler"),
    "guided_eps": Case(tiny.sd15, "full", 0.0, steps=8, guidance=4.0, scheduler="DDIMScheduler"),
    "from_euler": Case(euler, "lora", 1.0, timesteps=(999, 749, 300), scheduler="LCMScheduler"),
    "sdxl_lora": Case(tiny.sdxl, "lora", 1.0, timesteps=(999, 749, 499, 249), scheduler="LCMScheduler"),
    "sdxl_full": Case(tiny.sdxl, "full", 0.0, timesteps=(999, 480), scheduler="EulerDiscreteScheduler"),
    "sd3_lora": Case(tiny.sd3, "lora", 0.0, shift=3.0, scheduler="FlowMatchEulerDiscreteScheduler"),
    "sd3_full": Case(tiny.sd3, "full", 1.0, steps=2, shift=3.0, scheduler="FlowMatchEulerDiscreteScheduler"),
    "flux_lora": Case(tiny.flux, "lora", 1.0, guidance=3.5, size=64, scheduler="FlowMatchEulerDiscreteScheduler"),
    "flux_full": Case(tiny.flux, "full", 0.0, guidance=2.0, size=64, scheduler="FlowMatchEulerDiscreteScheduler"),
}


def trained(pipeline: Pipeline, *, embeds: bool = False) -> Denoiser:
    """A student that has moved away from its teacher."""
    torch.manual_seed(1)
    student = pipeline.trainable("student", guidance_embedding=embeds)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * torch.randn_like(weight) * max(float(weight.std()) if weight.numel() > 1 else 0.0, 0.1)
    return student.eval()


def wrapped(case: Case) -> Pipeline:
    # Another role on the same base must leave no trace in the export.
    options = LoraOptions(rank=4, alpha=10.0)
    roles = {"student": case.mode, "fake_score": case.mode}
    pipeline = Pipeline.wrap(case.base(), roles=roles, lora=options, height=case.size, width=case.size)
    if case.mode == "lora":
        trained_other = pipeline.trainable("fake_score")
        torch.nn.init.normal_(next(p for n, p in trained_other.named_parameters() if "lora_B" in n))
    return pipeline


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every case exported and sampled here; then all of them sampled by one process without fastgen."""
    root, ours, cases = tmp_path_factory.mktemp("exports"), {}, []
    for name, case in CASES.items():
        pipeline = wrapped(case)
        base = root / f"base-{name}"
        pipeline_format = case.format or {"full": "diffusers", "lora": "diffusers-lora"}[case.mode]
        if pipeline_format == "diffusers-lora":
            case.base().save_pretrained(base)
        student = trained(pipeline, embeds=case.embeds)
        times = timesteps_to_times(pipeline.process, case.timesteps) or even_times(case.steps, pipeline.process, case.shift)
        sampler = FewStep(times, case.gamma, case.guidance)
        record = {"method": "lcm", "base": str(base), "updates": 3, "averaged": True, "prompt": PROMPT}
        folder = export(pipeline, student, sampler, root / name, format=pipeline_format, record=record)
        torch.manual_seed(SEED)
        noise = torch.randn(1, *pipeline.latent_shape)
        save_file({"noise": noise}, root / f"{name}.safetensors")
        # Flow pipelines keep their generator from the scheduler, which then draws from the global one.
        generator = torch.Generator().manual_seed(SEED) if isinstance(pipeline.process, VP) else None
        condition = pipeline.encode_prompts([PROMPT])
        torch.manual_seed(SEED)
        with torch.no_grad():
            ours[name] = sampler.sample(student, noise, condition, generator=generator)
        where = {"folder": str(folder), "base": str(base if pipeline_format == "diffusers-lora" else folder)}
        where |= {"noise": str(root / f"{name}.safetensors"), "prompt": PROMPT, "name": name}
        cases.append(where | {"seed": SEED, "snippet": case.snippet})
    (root / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, "-c", STOCK, str(root)], cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, ours, load_file(root / "latents.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_draws_what_we_draw(name: str, exported: Any) -> None:
    root, ours, theirs = exported
    error = float((theirs[name] - ours[name]).norm() / ours[name].norm())
    assert error < CASES[name].tolerance
    assert read_export(root / name)["scheduler"]["class"] == CASES[name].scheduler


def test_the_students_weights_are_in_the_export(exported: Any) -> None:
    root, _, _ = exported
    student = load_file(root / "lcm_merged" / "unet" / "diffusion_pytorch_model.safetensors")
    teacher = tiny.toy().unet.state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.allclose(student[key], teacher[key]) for key in teacher)
    lora = load_file(root / "lcm_lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and re.search(r"\.lora_[AB]\.weight$", key) for key in lora)


def test_weights_say_where_they_come_from(exported: Any) -> None:
    root, _, _ = exported
    for file in ("ddim/unet/diffusion_pytorch_model.safetensors", "lcm_lora/pytorch_lora_weights.safetensors"):
        with safe_open(root / file, framework="pt") as reader:
            labels = reader.metadata()
        assert labels["fastgen.method"] == "lcm"
        assert labels["format"] == "pt"
        assert json.loads(labels["fastgen.sampler"])["times"] == [1.0, 0.75, 0.5, 0.25]
        assert json.loads(labels["fastgen.call"])["guidance_scale"] == 1.0
        assert "base-" in labels["fastgen.base"]


def test_the_model_cards_lines_draw_a_picture(exported: Any) -> None:
    root, _, _ = exported
    for name in (name for name, case in CASES.items() if case.snippet):
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
