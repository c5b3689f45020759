"""Original names at the true sizes, on no memory: what diffusers' own converters make of them is where we began."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils as converters
from diffusers.utils import convert_unet_state_dict_to_peft

from fastgen.errors import UserError
from fastgen.export.layouts import layout_of, original_lora, original_weights
from fastgen.pipelines.base import lora_targets

SDXL = {
    **{"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10)},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 2048},
    **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True},
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}
SD35_MEDIUM = {
    "num_attention_heads": 24,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
NETWORKS: dict[str, tuple[str, Callable[[], Any], Callable[..., Any]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        lambda: UNet2DConditionModel(cross_attention_dim=768),
        converters.convert_ldm_unet_checkpoint,
    ),
    "sdxl": ("StableDiffusionXLPipeline", lambda: UNet2DConditionModel(**SDXL), converters.convert_ldm_unet_checkpoint),
    "sd3": ("", SD3Transformer2DModel, converters.convert_sd3_transformer_checkpoint_to_diffusers),
    "sd35": ("", lambda: SD3Transformer2DModel(**SD35_MEDIUM), converters.convert_sd3_transformer_checkpoint_to_diffusers),
    "flux": (
        "",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        converters.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "chroma": ("", ChromaTransformer2DModel, converters.convert_chroma_transformer_checkpoint_to_diffusers),
    "flux2": ("", Flux2Transformer2DModel, converters.convert_flux2_transformer_checkpoint_to_diffusers),
    "qwen-image": ("", QwenImageTransformer2DModel, lambda weights, config: weights),
    "z-image": ("", ZImageTransformer2DModel, converters.convert_z_image_transformer_checkpoint_to_diffusers),
    "lumina2": ("", Lumina2Transformer2DModel, converters.convert_lumina2_to_diffusers),
    "aura-flow": ("", AuraFlowTransformer2DModel, converters.convert_auraflow_transformer_checkpoint_to_diffusers),
}


def of(name: str, wanted: str = "kohya") -> tuple[Any, Any]:
    """A network without memory, and its layout."""
    family, build, _ = NETWORKS[name]
    with torch.device("meta"):
        network = build()
    pipeline: Any = SimpleNamespace(diffusers=type(family or "Any", (), {})())
    return network, layout_of(pipeline, network, wanted)


def factors(network: Any, targets: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Rank 2 for each layer that is adapted by default."""
    torch.manual_seed(0)
    layers = {}
    for name, module in network.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in targets)) and hasattr(module, "weight"):
            outputs, *inputs = module.weight.shape
            layers[name] = (torch.randn(2, *inputs), torch.randn(outputs, 2, *[1] * (len(inputs) - 1)))
    return layers


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_converter_finds_every_weight(name: str) -> None:
    network, layout = of(name, "single-file")
    weights = network.state_dict()
    original = original_weights(layout, weights)
    prefix = "model.diffusion_model." if isinstance(network, UNet2DConditionModel) else ""
    back = NETWORKS[name][2]({f"{prefix}{key}": value for key, value in original.items()}, config=network.config)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_diffusers_reads_kohyas_keys_back_bit_for_bit(name: str) -> None:
    network, layout = of(name)
    layers = factors(network, lora_targets(network))
    assert len(layers) > 200
    renamed = original_lora(layout, network, layers) if layout.kohya_original else layers
    file = {}
    for layer, (down, up) in renamed.items():
        key = f"lora_unet_{layer.replace('.', '_')}"
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(len(down)))}
    if name == "flux":
        back = FluxPipeline.lora_state_dict(file)
    else:
        whole = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
        read, alphas = whole.lora_state_dict(file, unet_config=network.config)[:2]
        assert set(alphas.values()) == {2.0}
        back = convert_unet_state_dict_to_peft(read)
    component = "transformer" if name == "flux" else "unet"
    wanted = {f"{component}.{layer}.lora_A.weight": down for layer, (down, _) in layers.items()}
    wanted |= {f"{component}.{layer}.lora_B.weight": up for layer, (_, up) in layers.items()}
    back = {key.replace(".processor", ""): value for key, value in back.items()}
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)


def test_queries_alone_are_stacked_with_zeros() -> None:
    network, layout = of("flux")
    (down, up) = original_lora(layout, network, factors(network, ("single_transformer_blocks.7.attn.to_q",)))[
        "single_blocks.7.linear1"
    ]
    change = up @ down
    assert change.shape == (3 * 3072 + 12288, 3072)
    assert change[:3072].abs().sum() > 0 and change[3072:].abs().sum() == 0


def test_a_layer_without_an_original_name_is_named() -> None:
    network, layout = of("sd15")
    with pytest.raises(UserError, match="the LoRA adapts elsewhere, for which the original layout has no name"):
        original_lora(layout, network, {"elsewhere": (torch.zeros(1, 1), torch.zeros(1, 1))})


@pytest.mark.parametrize("name", ["flux2", "qwen-image", "z-image", "lumina2", "aura-flow"])
def test_a_lora_is_known_under_fewer_original_names_than_a_checkpoint(name: str) -> None:
    for wanted in ("kohya", "comfyui"):
        with pytest.raises(UserError, match=f"'{wanted}' is known for .*, not for Any; export it as 'diffusers'"):
            of(name, wanted)
