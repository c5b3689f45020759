"""The LoRA and single-file formats: names against the documented ones, and read back by plain diffusers elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file

from fastgen.errors import UserError
from fastgen.export import export, read_export
from fastgen.export.folder import merged
from fastgen.export.layouts import layout_of, original_weights
from fastgen.export.lora import lora_weights
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.samplers import FewStep, even_times
from tests import tiny_models as tiny
from tests.exports import Case, Drawn, drawn_elsewhere, sdxl, trained, wrapped

CASES = {
    "kohya_sd15": Case(tiny.sd15, "kohya", gamma=1.0, mode="lora", steps=2, card=True),
    "kohya_sdxl": Case(sdxl, "kohya", gamma=1.0, mode="lora", steps=2, card=True),
    "kohya_flux": Case(tiny.flux, "kohya", shift=3.0, guidance=3.5, size=64, mode="lora", steps=2, card=True),
    "comfyui_sdxl": Case(sdxl, "comfyui", mode="lora", steps=2, card=True),
    "comfyui_flux": Case(tiny.flux, "comfyui", guidance=3.5, size=64, rank=3, mode="lora", steps=2, card=True),
    "comfyui_chroma": Case(tiny.chroma, "comfyui", size=64, mode="lora", steps=2, card=True),
    "single_sd15": Case(tiny.sd15, "single-file", steps=2, card=True),
    "single_sdxl": Case(sdxl, "single-file", gamma=1.0, mode="lora", steps=2, card=True),
    "single_sd3": Case(tiny.sd3, "single-file", shift=3.0, mode="lora", steps=2, card=True),
    "single_flux": Case(tiny.flux, "single-file", guidance=3.5, size=64, steps=2, card=True),
    "single_chroma": Case(tiny.chroma, "single-file", size=64, mode="lora", steps=2, card=True),
    "custom_sd3": Case(tiny.sd3, "fused", gamma=0.3, shift=3.0, steps=3, mode="lora", card=True),
    "custom_flux": Case(tiny.flux, "diffusers", gamma=0.7, size=64, steps=3, card=True),
    "fused_toy": Case(tiny.toy, "fused", gamma=1.0, mode="lora", steps=2, card=True),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_elsewhere(CASES, tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_draws_what_we_draw(name: str, exported: Drawn) -> None:
    assert exported.error(name) < 1e-4


def test_kohyas_keys_of_sd15_are_diffusers_own_helpers(exported: Drawn) -> None:
    file = exported.file("kohya_sd15")
    torch.manual_seed(0)
    pipeline = wrapped(CASES["kohya_sd15"])
    weights = lora_weights(trained(pipeline).own, torch.float32)
    expected = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in weights.items()})
    assert file.keys() == expected.keys()
    assert all(torch.equal(file[key].float(), expected[key].float()) for key in expected)
    assert all(float(file[key]) == 4.0 for key in file if key.endswith(".alpha"))


def test_kohyas_keys_of_sdxl_and_flux_are_the_original_names(exported: Drawn) -> None:
    sdxl_keys, flux_keys = exported.file("kohya_sdxl"), exported.file("kohya_flux")
    assert sdxl_keys["lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_down.weight"].shape == (4, 32)
    for part in ("input_blocks_1_0_in_layers_2", "input_blocks_2_0_op", "middle_block_1_proj_in", "output_blocks_1_2_conv"):
        assert f"lora_unet_{part}.lora_up.weight" in sdxl_keys
    assert not any("down_blocks" in key or "resnets" in key for key in sdxl_keys)
    # Three layers of rank 4 in one: queries, keys and values of width 32.
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    assert flux_keys[f"{qkv}.lora_down.weight"].shape == (12, 32)
    assert flux_keys[f"{qkv}.lora_up.weight"].shape == (96, 12)
    assert float(flux_keys[f"{qkv}.alpha"]) == 12.0
    assert flux_keys["lora_unet_single_blocks_1_linear1.lora_up.weight"].shape == (32 * 3 + 128, 16)
    for name in ("kohya_sd15", "kohya_sdxl", "kohya_flux"):
        keys = exported.file(name)
        layers = {key.partition(".")[0] for key in keys}
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        assert keys.keys() == {f"{layer}.{part}" for layer in layers for part in parts}
        assert all(layer.startswith("lora_unet_") for layer in layers)


def test_comfyuis_keys_are_its_layers_names(exported: Drawn) -> None:
    keys = exported.file("comfyui_flux")
    assert keys["diffusion_model.double_blocks.1.txt_attn.qkv.lora_up.weight"].shape == (96, 9)
    assert all(key.startswith(("diffusion_model.double_blocks.", "diffusion_model.single_blocks.")) for key in keys)
    assert all(key.startswith("lora_unet_input_blocks_") or "_block" in key for key in exported.file("comfyui_sdxl"))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("single_")])
def test_a_single_file_holds_every_weight(name: str, exported: Drawn) -> None:
    root = exported.root
    every = load_file(root / "weights.safetensors")
    found = {key.removeprefix(f"{name}/"): value for key, value in every.items() if key.startswith(f"{name}/")}
    torch.manual_seed(0)
    pipeline = wrapped(CASES[name])
    whole: Any = pipeline.diffusers
    parts = {each: part for each, part in whole.components.items() if isinstance(part, torch.nn.Module)}
    parts[pipeline.network_name] = merged(trained(pipeline))
    wanted = {f"{each}/{key}": value for each, part in parts.items() for key, value in part.state_dict().items()}
    wanted = {key: value for key, value in wanted.items() if key in found or not key.endswith("embed_tokens.weight")}
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    assert not any("lora" in key or "base_layer" in key for key in exported.file(name))


def test_a_lora_under_original_names_adds_what_the_students_adds(tmp_path: Path) -> None:
    """Of SD3, whose LoRA diffusers reads under its own names alone: added to the teacher's single file, it is the student's."""
    files = {}
    pipeline = wrapped(CASES["single_sd3"])
    student, sampler = trained(pipeline), FewStep((1.0, 0.75))
    for format in ("kohya", "comfyui", "single-file"):
        export(pipeline, student, sampler, tmp_path / format, format=format)
        files[format] = load_file(tmp_path / format / f"{format}.safetensors")
    layout = layout_of(pipeline, student.network, "kohya")
    teacher = original_weights(layout, tiny.sd3().transformer.state_dict())
    for format, key in (
        ("kohya", lambda name: "lora_unet_" + name.replace(".", "_")),
        ("comfyui", "diffusion_model.{}".format),
    ):
        lora, touched = files[format], 0
        for name, weight in files["single-file"].items():
            layer = key(name.removesuffix(".weight"))
            expected = teacher[name].clone()
            if name.endswith(".weight") and f"{layer}.alpha" in lora:
                down, up = lora[f"{layer}.lora_down.weight"], lora[f"{layer}.lora_up.weight"]
                expected += up @ down * lora[f"{layer}.alpha"] / len(down)
                touched += 1
            assert torch.allclose(expected, weight, atol=1e-6), name
        assert touched == len([name for name in lora if name.endswith(".alpha")]) > 10
    assert "joint_blocks.3.context_block.attn.qkv" in {name.removeprefix("diffusion_model.")[:37] for name in files["comfyui"]}
    card = (tmp_path / "kohya" / "README.md").read_text()
    assert "```python" not in card and "ModelSamplingSD3 with shift 3" in card


def test_a_lora_says_what_it_is_and_how_it_is_sampled(exported: Drawn) -> None:
    root = exported.root
    with safe_open(root / "kohya_flux" / "kohya_flux.safetensors", framework="pt") as reader:
        labels = reader.metadata()
    assert (labels["ss_network_module"], labels["ss_network_dim"], labels["ss_network_alpha"]) == (
        "networks.lora_flux",
        "4",
        "4",
    )
    assert json.loads(labels["fastgen.timesteps"]) == [1000.0, 750.0]
    assert (labels["fastgen.steps"], labels["fastgen.shift"], labels["fastgen.guidance"]) == ("2", "3.0", "3.5")
    assert labels["fastgen.base_sha256"] == read_export(root / "kohya_flux")["base"]["sha256"]
    card = (root / "kohya_flux" / "README.md").read_text()
    assert 'weight_name="kohya_flux.safetensors"' in card and "strength 1.0" in card
    assert "FluxGuidance 3.5" in card and "both shifts 1.099" in card
    assert "sampler `lcm`, scheduler `simple`, steps 2, cfg 1 " in (root / "kohya_sdxl" / "README.md").read_text()
    assert "the LoRA merged into the weights" in (root / "fused_toy" / "README.md").read_text()


def test_a_pipeline_file_comes_where_no_stock_scheduler_does(exported: Drawn) -> None:
    root = exported.root
    card = (root / "custom_sd3" / "README.md").read_text()
    assert "No stock scheduler of diffusers samples with gamma 0.3, so `pipeline.py`" in card
    source = (root / "custom_flux" / "pipeline.py").read_text()
    assert "GAMMA = 0.7" in source and "fastgen" not in source
    index = json.loads((root / "custom_flux" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "GammaFluxPipeline"]
    assert not (root / "fused_toy" / "pipeline.py").exists()


def test_what_has_no_such_format_is_refused_in_one_sentence(tmp_path: Path) -> None:
    full = Pipeline.wrap(tiny.toy())
    student = trained(full)
    for format in ("kohya", "comfyui", "fused", "diffusers-lora"):
        with pytest.raises(UserError, match=rf"full weights has no LoRA for the format '{format}'"):
            export(full, student, FewStep((1.0,)), tmp_path / "x", format=format)
    with pytest.raises(UserError, match=r"'gguf' is not known; it must be one of diffusers.*kohya.*single-file"):
        export(full, student, FewStep((1.0,)), tmp_path / "x", format="gguf")
    full.diffusers.__class__ = type("KolorsPipeline", (type(full.diffusers),), {})
    with pytest.raises(
        UserError, match=r"'single-file' is known for .*XL, SD3, FLUX.1 and 2, Chroma, .* and AuraFlow, not for KolorsPipeline"
    ):
        export(full, student, FewStep((1.0,)), tmp_path / "x", format="single-file")
    lora = wrapped(CASES["kohya_sd15"])
    adapted = trained(lora)
    lora.diffusers.__class__ = type("KolorsPipeline", (type(lora.diffusers),), {})
    for format in ("kohya", "comfyui"):
        with pytest.raises(UserError, match=rf"'{format}' is known for .*, not for KolorsPipeline; export it as 'diffusers'"):
            export(lora, adapted, FewStep((1.0,)), tmp_path / "x", format=format)
    wide = Pipeline.wrap(tiny.sd15())
    wide.diffusers.unet.register_to_config(cross_attention_dim=1024)
    with pytest.raises(UserError, match="not for Stable Diffusion 2; export it as 'diffusers'"):
        export(wide, trained(wide), FewStep((1.0,)), tmp_path / "x", format="single-file")
    embeds = full.trainable("student", guidance_embedding=True)
    full.diffusers.__class__ = type(tiny.toy())
    with pytest.raises(UserError, match=r"has time_embedding\.cond_proj\.weight, for which the original layout has no name"):
        export(full, embeds, FewStep((1.0,)), tmp_path / "x", format="single-file")
    assert list(tmp_path.iterdir()) == []


def test_a_dora_keeps_its_magnitudes_in_diffusers_format_alone(tmp_path: Path) -> None:
    pipeline = Pipeline.wrap(tiny.sd15(), roles={"student": "lora"}, lora=LoraOptions(rank=4, alpha=8, dora=True))
    student = pipeline.trainable("student")
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    sampler = FewStep(even_times(2, pipeline.process))
    export(pipeline, student, sampler, tmp_path / "dora", format="diffusers-lora")
    plain = tiny.sd15()
    plain.load_lora_weights(tmp_path / "dora")
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([900, 500])}
    call["encoder_hidden_states"] = torch.randn(2, 8, 32)
    with torch.no_grad(), student.activate():
        ours = student.network(**call).sample
        bare = tiny.sd15().unet(**call).sample
        theirs = plain.unet(**call).sample
    assert (ours - bare).norm() > 1e-2 * bare.norm()
    assert (theirs - ours).norm() < 1e-5 * ours.norm()
    with pytest.raises(UserError, match="magnitudes"):
        export(pipeline, student, sampler, tmp_path / "kohya", format="kohya")
