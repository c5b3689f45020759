"""What goes wrong before a run begins, on the command line: one clear sentence, status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from fastgen.cli import main
from fastgen.eval.generate import load_pipeline as load_plainly
from fastgen.export import export
from fastgen.pipelines import LoraOptions, Pipeline, load_pipeline
from fastgen.pipelines.gamma_flow import FILE
from fastgen.samplers import FewStep
from tests import tiny_models as tiny

ROOT = Path(__file__).parents[1]
RUN = """
pipeline = "{teacher}"
[method]
name = "{method}"
[data]
prompts = "{folder}/prompts.txt"
cache = "none"
[train]
steps = 1
batch = 2
threads = 1
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, prompts, and recipes for methods that learn from prompts, from pictures, from either."""
    folder = tmp_path_factory.mktemp("bad-input")
    tiny.toy().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red cube\na blue ring\n")
    for method, options in (("dmd2", "gan_weight = 0.0\n"), ("lcm", ""), ("ladd", "")):
        text = RUN.format(teacher=folder / "teacher", method=method, folder=folder)
        (folder / f"{method}.toml").write_text(text.replace("[data]", f"{options}[data]"))
    return folder


@pytest.fixture
def wrong(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a distillation with these overrides complains of."""

    def told(*overrides: str, method: str = "dmd2") -> str:
        argv = ["distill", str(root / f"{method}.toml"), *overrides, "--output", str(tmp_path / "run"), "-q", "--device", "cpu"]
        return complaint(capsys, argv, tmp_path / "run")

    return told


def complaint(capsys: pytest.CaptureFixture[str], argv: list[str], output: Path) -> str:
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    assert status == 2, err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and "Traceback" not in err and not output.exists()
    return line


def changed(root: Path, to: Path, **index: Any) -> Path:
    """A copy of the teacher with another index; None takes an entry out."""
    folder = Path(shutil.copytree(root / "teacher", to / "changed"))
    path = folder / "model_index.json"
    told = json.loads(path.read_text()) | index
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return folder


# -- pipelines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["distill", "sample", "plan", "pipelines"])
def test_a_wrong_repository(command: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = {
        "distill": ["distill", str(root / "dmd2.toml"), "pipeline=nobody/none", "-o", str(tmp_path / "x")],
        "sample": ["sample", "nobody/none", "a cube", "-o", str(tmp_path / "x")],
        "plan": ["plan", str(root / "dmd2.toml"), "pipeline=nobody/none"],
        "pipelines": ["pipelines", "nobody/none"],
    }[command]
    told = complaint(capsys, [*argv, "--offline", "-q"], tmp_path / "x")
    assert "pipeline 'nobody/none' is no local folder and not in the hub's cache" in told


@pytest.mark.slow
def test_no_network(root: Path, tmp_path: Path) -> None:
    """Of a hub that does not answer."""
    argv = [
        "distill",
        str(root / "dmd2.toml"),
        "pipeline=nobody/none",
        "--output",
        str(tmp_path / "x"),
        "-q",
        "--device",
        "cpu",
    ]
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "fastgen", *argv]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **away}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "pipeline 'nobody/none' is not a local folder and cannot be loaded from the hub" in done.stderr


def test_a_missing_component(root: Path, tmp_path: Path, wrong: Callable[..., str]) -> None:
    for place, gone in (("a", "vae"), ("b", "scheduler")):
        folder = changed(root, tmp_path / place)
        shutil.rmtree(folder / gone)
        assert f"lacks the component '{gone}' that its model_index.json names" in wrong(f"pipeline={folder}")
    folder = changed(root, tmp_path / "c", unet=[None, None])
    assert "lacks the component 'unet', which a StableDiffusionPipeline needs" in wrong(f"pipeline={folder}")
    folder = changed(root, tmp_path / "d")
    (folder / "unet" / "config.json").unlink()
    assert "no file named config.json" in wrong(f"pipeline={folder}")
    folder = changed(root, tmp_path / "e")
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    assert "this StableDiffusionPipeline does not run from prompts alone" in wrong(f"pipeline={folder}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionImg2ImgPipeline", "this StableDiffusionImg2ImgPipeline does not run from prompts alone"),
        ("StableDiffusionInpaintPipeline", "this StableDiffusionInpaintPipeline does not run from prompts alone"),
        ("DDPMPipeline", "DDPMPipeline takes no prompt; only text-conditioned pipelines can be distilled"),
        ("FluxPipeline", "lacks the component 'text_encoder_2', which a FluxPipeline needs"),
        ("UNet2DConditionModel", "has _class_name 'UNet2DConditionModel', which is no pipeline"),
        ("NoSuchPipeline", "which diffusers"),
    ],
)
def test_an_unsupported_class(name: str, message: str, root: Path, tmp_path: Path, wrong: Callable[..., str]) -> None:
    assert message in wrong(f"pipeline={changed(root, tmp_path, _class_name=name)}")


def test_a_size_that_does_not_fit(tmp_path: Path, wrong: Callable[..., str]) -> None:
    assert "[data] height = 100 must be a multiple of 16, as autoencoders and networks need it: 96 or 112" in wrong(
        "data.height=100"
    )
    assert "data.width must be at least 16, not -16" in wrong("data.width=-16")
    assert "data.height must be a whole number, not 'tall'" in wrong("data.height=tall")
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    told = wrong(f"pipeline={tmp_path / 'sd3'}", "data.height=256", "data.width=64")
    assert "height = 256 is more than the 128 pixels that the network" in told


# -- what is laid over a pipeline ------------------------------------------------------------------


def test_a_lora_of_another_architecture(root: Path, tmp_path: Path, wrong: Callable[..., str]) -> None:
    fits = "does not fit the unet of StableDiffusionPipeline"
    for base, format in ((tiny.sdxl, "diffusers-lora"), (tiny.sdxl, "kohya"), (tiny.sd3, "diffusers-lora")):
        pipeline = Pipeline.wrap(base(), roles={"student": "lora"}, lora=LoraOptions(rank=2))
        folder = tmp_path / f"{base.__name__}-{format}"
        export(pipeline, pipeline.trainable("student").eval(), FewStep((1.0,)), folder, format=format)
        [file] = folder.glob("*.safetensors")
        told = wrong(f'teacher_loras=["{file}"]')
        assert f"teacher LoRA '{file}' {fits}: " in told
    assert told.endswith("the file holds nothing for a unet")
    unet = root / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    assert fits in wrong(f'teacher_loras=["{unet}"]')
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "junk.safetensors" in wrong(f'teacher_loras=["{tmp_path / "junk.safetensors"}"]')
    assert "is not a readable safetensors file" in wrong(f"teacher_weights={tmp_path / 'junk.safetensors'}")


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "is empty; it must hold one prompt a line"),
        (b"fine\nbl\xe4u\n", "line 2 is not text in UTF-8; save the file as UTF-8"),
        ("a red cube\n".encode("utf-16"), "line 1 is not text in UTF-8; save the file as UTF-8"),
        (b"fine\n\x00\x01PNG\n", "line 2 is not text; it must be a text file in UTF-8"),
    ],
)
def test_prompts_that_are_none(
    content: bytes, message: str, root: Path, tmp_path: Path, wrong: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert f"{file}: {message}" in wrong(f"data.prompts={file}")
    argv = ["eval", str(root / "teacher"), "--prompts", str(file), "-q", "--number", "2", "--offline"]
    assert f"{file}: {message.removesuffix(' one prompt a line')}" in complaint(capsys, argv, tmp_path / "x")


def test_pictures_that_are_none(tmp_path: Path, wrong: Callable[..., str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    here = f"data.images={folder}"
    assert "data.images is missing; this method needs a folder of pictures" in wrong(method="lcm")
    assert "(method.gan_weight = 0.005 shows a critic real pictures; 0 does without)" in wrong("method.gan_weight=0.005")
    assert "(method.real = \"images\" asks for them;" in wrong("method.real=\"images\"", method="ladd")
    assert "holds no pictures" in wrong(here, method="lcm")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    assert "a.png: has no caption; it must be in a.txt beside it" in wrong(here, method="lcm")
    (folder / "a.txt").write_text("a thing")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    for options in ([], ["data.buckets=true"], [f"data.cache={tmp_path / 'cache'}"]):
        assert "a.png: is not a readable picture" in wrong(here, *options, method="lcm")
    (folder / "a.txt").write_bytes(b"\xff")
    assert "a.txt: line 1 is not text in UTF-8" in wrong(here, method="lcm")


# -- code that comes with a pipeline ---------------------------------------------------------------


def test_only_our_own_pipeline_file_is_taken(
    tmp_path: Path, wrong: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline.wrap(tiny.sd3())
    student = pipeline.trainable("student").eval()
    folder = export(pipeline, student, FewStep((1.0, 0.5), gamma=0.3), tmp_path / "student")
    loaded = load_pipeline(str(folder)).diffusers
    assert isinstance(loaded, DiffusionPipeline) and type(loaded).__name__ == "GammaStableDiffusion3Pipeline"
    assert type(loaded.scheduler).__name__ == "FlowMatchGammaScheduler"
    common = ["-q", "--device", "cpu", "--offline"]
    assert main(["sample", str(folder), "a red cube", "-o", str(tmp_path / "out"), *common]) == 0
    assert type(load_plainly(folder)).__name__ == "GammaStableDiffusion3Pipeline", "which fastgen eval measures"
    assert "which can be sampled and measured but not be a teacher" in wrong(f"pipeline={folder}")
    own = (folder / FILE).read_text()
    assert "fastgen" not in own
    sign = tmp_path / "it-ran"
    for text in (own + "\n", own.replace("GAMMA = 0.3", "GAMMA = 0.4 - 0.1"), f"open({str(sign)!r}, 'w')\n{own}", ""):
        (folder / FILE).write_text(text)
        for argv in (["sample", str(folder), "x", "-o", str(tmp_path / "no")], ["eval", str(folder), "--number", "2"]):
            told = complaint(capsys, [*argv, *common], tmp_path / "no")
            assert f"{folder / FILE} is code that comes with the pipeline, not what fastgen writes" in told
    assert not sign.exists()
    (folder / FILE).write_text(own)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["other", "Other"]}))
    told = complaint(capsys, ["sample", str(folder), "x", "-o", str(tmp_path / "no"), *common], tmp_path / "no")
    assert "which diffusers" in told
