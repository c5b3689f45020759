"""Adapters on a base in 8 or 4 bits: near the whole one, with the gradients of one of those weights, exported for the whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastgen import config as configuration
from fastgen.adapters import LoraOptions
from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.export import export
from fastgen.export.origin import base_hash
from fastgen.pipelines import Pipeline, load_pipeline
from fastgen.pipelines.quantization import Format, QuantizedLinear, quantization_of, quantize_network
from fastgen.samplers import FewStep
from fastgen.training.run import distill, load_run
from tests import tiny_models as tiny
from tests.tiny_models import PROMPTS

needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'fastgen-diffusion[quantized]'"
)
FORMATS: tuple[Format, ...] = ("int8", "nf4")
WEIGHT_ERROR = {"int8": 0.008, "nf4": 0.11}
"""Bounds on the relative error of normally distributed weights; evenly spaced and normal quantiles give 0.0065 and 0.092."""
OUTPUT_ERROR = {"int8": 0.01, "nf4": 0.15}
ROLES: dict[str, Any] = {"student": "lora", "fake": "lora"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines of a UNet and of a transformer; their networks are moved off the small values that they start with."""
    made = {}
    for name in ("toy", "sd3"):
        pipeline = getattr(tiny, name)()
        made[name] = tmp_path_factory.mktemp("whole") / name
        pipeline.save_pretrained(made[name])
    return made


def load(folder: Path, quantize: Any = "none", **options: Any) -> Pipeline:
    return load_pipeline(str(folder), quantize=quantize, **({"roles": ROLES, "lora": LoraOptions(rank=3, alpha=6.0)} | options))


def stir(denoiser: Denoiser, seed: int) -> Denoiser:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return denoiser


def question(pipeline: Pipeline) -> tuple[Tensor, Tensor, Condition]:
    xt = torch.randn(2, *pipeline.latent_shape, generator=torch.Generator().manual_seed(5))
    return xt, torch.tensor([0.4, 0.9]), pipeline.encode_prompts(PROMPTS)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def quantized_layers(network: nn.Module) -> list[QuantizedLinear]:
    return [each for each in network.modules() if isinstance(each, QuantizedLinear)]


def restored(network: nn.Module) -> nn.Module:
    """The network with ordinary layers that hold the quantised weights' values."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).requires_grad_(False)
            plain.weight.copy_(layer.weight)
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
            network.set_submodule(name, plain)
    network.__dict__.pop("quantized")
    return network


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out", "into"), [(64, 320), (7, 9), (32, 48)])
def test_a_layer_is_near_the_whole_one_and_differentiable(format: Format, out: int, into: int) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(into, out)
    nn.init.normal_(whole.weight)
    layer = QuantizedLinear(whole, format, "cpu")
    assert relative(layer.weight, whole.weight) < WEIGHT_ERROR[format] and not list(
        p for p in layer.parameters() if p.requires_grad
    )
    plain = nn.Linear(into, out)
    plain.load_state_dict({"weight": layer.weight, "bias": whole.bias})
    plain.requires_grad_(False)

    def derivatives(answer: nn.Module) -> list[Tensor]:
        x = torch.randn(3, 2, into, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = answer(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        tangent = torch.func.jvp(answer, (x.detach(),), (torch.ones_like(x),))[1]
        return [y, first, second, tangent]

    for mine, expected in zip(derivatives(layer), derivatives(plain), strict=True):
        assert relative(mine, expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, into)).dtype == torch.bfloat16


@needs_kernels
def test_the_unpacked_weight_is_not_kept_for_the_backward_pass() -> None:
    layer, kept = QuantizedLinear(nn.Linear(320, 64), "nf4", "cpu"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
        layer(torch.randn(2, 320, requires_grad=True)).sum()
    assert torch.Size((64, 320)) not in kept and torch.Size((320, 64)) not in kept
    assert layer.packed.numel() == 64 * 320 // 2 and layer.packed.dtype == torch.uint8


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["toy", "sd3"])
def test_the_teacher_is_near_the_whole_one(folders: dict[str, Path], name: str, format: Format) -> None:
    whole, reduced = load(folders[name]), load(folders[name], format)
    layers = quantized_layers(reduced.network)
    assert len(layers) > 10 and quantization_of(reduced.network) == format and quantization_of(whole.network) is None
    expected = whole.frozen()(*question(whole)).output
    assert 1e-4 < relative(reduced.frozen()(*question(reduced)).output, expected) < OUTPUT_ERROR[format]
    student = reduced.trainable("student")
    assert torch.equal(student(*question(reduced)).output, reduced.frozen()(*question(reduced)).output)
    assert base_hash(reduced.network) == base_hash(whole.network)


@needs_kernels
@pytest.mark.parametrize(("name", "format"), [("toy", "nf4"), ("sd3", "int8"), ("sd3", "nf4")])
@pytest.mark.parametrize(("checkpointing", "dora"), [(False, False), (True, False), (True, True)])
def test_roles_have_the_gradients_of_those_on_an_ordinary_base(
    folders: dict[str, Path], name: str, format: Format, checkpointing: bool, dora: bool
) -> None:
    def run(pipeline: Pipeline) -> Tensor:
        torch.manual_seed(0)
        student, fake = stir(pipeline.trainable("student"), 1), stir(pipeline.trainable("fake"), 2)
        xt, t, condition = question(pipeline)
        with torch.no_grad():  # The order that bitsandbytes' own layers do not survive on some CPUs.
            target = pipeline.frozen()(xt, t, condition).x0
        x0 = student(xt, t, condition).x0
        prediction = fake(x0 * 0.9, t * 0.7, condition, features=pipeline.feature_layers)
        terms = [(x * x).mean() for x in (prediction.features or {}).values()]
        (sum(terms) + (prediction.x0 - target).square().mean()).backward()
        own = [*student.parameters(), *fake.parameters()]
        mine = set(own)
        assert all(p.grad is None and not p.requires_grad for p in pipeline.network.parameters() if p not in mine)
        assert not any(b.requires_grad for b in pipeline.network.buffers())
        return torch.cat([p.grad.flatten() for p in own if p.grad is not None])

    lora = LoraOptions(rank=3, alpha=6.0, dora=dora)
    reduced = load(folders[name], format, gradient_checkpointing=checkpointing, lora=lora)
    ordinary = load(folders[name], lora=lora)
    quantize_network(ordinary.network, format, "cpu")
    with torch.no_grad():
        restored(ordinary.network)
    assert not quantized_layers(ordinary.network)
    mine, expected = run(reduced), run(ordinary)
    assert mine.norm() > 0 and relative(mine, expected) < 1e-5


def written(folder: Path, at: Path, steps: int, **options: Any) -> configuration.RunConfig:
    at.mkdir(exist_ok=True)
    (at / "prompts.txt").write_text("a red cube\na blue ball\n")
    file = at / "run.toml"
    file.write_text(
        f'pipeline = "{folder}"\nquantize = "nf4"\n[method]\nname = "lcm"\n[roles]\nstudent = "lora"\n[lora]\nrank = 2\n'
        f'[data]\nprompts = "{at / "prompts.txt"}"\nimages = "toy"\npool = 4\ncache = "none"\n'
        f"[train]\nsteps = {steps}\nbatch = 2\nlr = 1e-2\ncheckpoint_every = 2\nthreads = 1\n"
    )
    return configuration.load(file, [f"{key}={value}" for key, value in options.items()])


RELOAD = """
import sys
sys.modules["fastgen"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.load_lora_weights(sys.argv[2], adapter_name="student")
layers = [m for m in pipeline.unet.modules() if hasattr(m, "lora_A")]
assert layers and all(type(m.base_layer).__module__.startswith("torch.nn") for m in layers)
xt, condition = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(pipeline.unet(xt, 499, condition).sample, sys.argv[3])
"""


@needs_kernels
def test_a_run_resumes_and_its_lora_is_for_the_whole_base(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, through, apart = folders["toy"], tmp_path / "through", tmp_path / "apart"
    assert distill(written(folder, tmp_path, 4), through, device="cpu", quiet=True) == 0
    shutil.copytree(through, apart)
    shutil.rmtree(apart / "checkpoints" / "step-00000004")
    assert distill(written(folder, tmp_path, 4), apart, device="cpu", quiet=True) == 0
    one, other = load_run(through), load_run(apart)
    weights = one.student.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in other.student.state_dict().items())
    assert any(bool(value.any()) for key, value in weights.items() if "lora_B" in key)
    assert one.config.quantize == "nf4" and quantization_of(one.pipeline.network) is None

    reduced = load(folder, "nf4", lora=LoraOptions(rank=2, alpha=64.0))
    student = reduced.trainable("student")
    student.load_state_dict(weights)
    sampler = FewStep((1.0, 0.5))
    with pytest.raises(UserError, match="quantised to nf4, and its weights can be neither trained nor written"):
        export(reduced, student, sampler, tmp_path / "whole", format="fused")
    exports = {tmp_path / "a": (one.pipeline, one.student), tmp_path / "b": (reduced, student)}
    for output, (pipeline, role) in exports.items():
        export(pipeline, role, sampler, output, format="diffusers-lora", record={"quantize": "nf4"})
    described = [json.loads((output / "fastgen.json").read_text())["base"] for output in exports]
    assert described[0] == described[1] == {"name": "", "sha256": base_hash(load(folder).network), "trained_on": "nf4"}
    file = next((tmp_path / "a").glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["fastgen.base_trained_on"] == "nf4"

    xt, _, condition = question(one.pipeline)
    torch.save((xt, condition.inputs["encoder_hidden_states"]), tmp_path / "exchange.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RELOAD, str(folder), str(tmp_path / "a"), str(tmp_path / "exchange.pt")],
        check=True,
    )
    theirs = torch.load(tmp_path / "exchange.pt", weights_only=True)
    with torch.no_grad():
        mine = one.student(xt, torch.full((2,), 0.5), condition).output
    assert relative(theirs, mine) < 1e-5


@needs_kernels
def test_a_fine_tuned_network_is_reduced_too(folders: dict[str, Path], tmp_path: Path) -> None:
    tuned = load(folders["sd3"])
    with torch.no_grad():
        for weight in tuned.network.parameters():
            weight.mul_(1.1)
    tuned.network.save_pretrained(tmp_path / "tuned")
    reduced = load(folders["sd3"], "int8", teacher_weights=str(tmp_path / "tuned"))
    assert base_hash(reduced.network) == base_hash(tuned.network)
    assert relative(reduced.frozen()(*question(reduced)).output, tuned.frozen()(*question(tuned)).output) < OUTPUT_ERROR["int8"]


def test_mistakes(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = 'quantize = "nf4" is for a base that is not trained, but roles.{} = "full"; set roles.{} = "lora"'
    for roles, role in (({}, "student"), ({"student": "lora", "fake_score": "full"}, "fake_score")):
        with pytest.raises(UserError, match=sentence.format(role, role)):
            load(folders["toy"], "nf4", roles=roles)
    with pytest.raises(UserError, match=r"`roles.fake_score=full`|quantize = \"nf4\" is for a base") as told:
        written(folders["toy"], tmp_path, 2, **{"roles.fake_score": "full"})
    assert 'roles.fake_score = "full"' in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match="quantize must be one of 'none', 'int8', 'nf4', not 'int4'"):
        written(folders["toy"], tmp_path, 2, quantize="int4")
    with pytest.raises(UserError, match='quantize must be "none", "int8" or "nf4", not \'int4\''):
        load(folders["toy"], "int4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(
        UserError, match=r"needs bitsandbytes, which is not installed; pip install 'fastgen-diffusion\[quantized\]'"
    ):
        load(folders["toy"], "nf4")
