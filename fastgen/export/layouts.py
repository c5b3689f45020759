"""The names that a family's first release gave its network, from those that diffusers gives it.

Stable Diffusion 1, 2 and XL follow CompVis' and Stability's UNet (`input_blocks`, `middle_block`, `output_blocks`), SD3
Stability's MMDiT (`joint_blocks`), FLUX.1 and Chroma the transformer of Black Forest Labs (`double_blocks`, `single_blocks`).
Those names are what single-file checkpoints hold, what ComfyUI's networks are called, and, but for SD 1 and 2, what kohya-ss'
sd-scripts trains. A layer there can be several of diffusers' layers stacked: queries, keys and values. Newer families, of which
single files alone are written, are in `fastgen.export.renaming`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.export.renaming import LOOSE, RULES, SWAPPED, stacked_by_name
from fastgen.pipelines import Pipeline

Parts = tuple[str, ...]

UNET_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
SUPPORTED = "Stable Diffusion 1, 2 and XL, SD3, FLUX.1 and Chroma"
WHOLE = "Stable Diffusion 1 and XL, SD3, FLUX.1 and 2, Chroma, Qwen-Image, Z-Image, Lumina 2 and AuraFlow"
"""Of which families LoRAs, and single files, are written under original names."""


UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

FLUX_TOP: dict[str, Parts] = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
FLUX_DOUBLE: dict[str, Parts] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
FLUX_SINGLE: dict[str, Parts] = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*QKV, "proj_mlp"),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "linear2": ("proj_out",),
}
CHROMA_GUIDANCE: dict[str, Parts] = {"in_layer": ("linear_1",), "out_layer": ("linear_2",)}

SD3_TOP: dict[str, Parts] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
SD3_BLOCK: dict[str, Parts] = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.attn.qkv": QKV,
    "context_block.attn.qkv": ADDED_QKV,
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
BLOCKS: dict[str, dict[tuple[str, str], dict[str, Parts]]] = {
    "FluxTransformer2DModel": {
        ("double_blocks", "transformer_blocks"): FLUX_DOUBLE,
        ("single_blocks", "single_transformer_blocks"): FLUX_SINGLE,
    },
    "ChromaTransformer2DModel": {
        ("double_blocks", "transformer_blocks"): FLUX_DOUBLE,
        ("single_blocks", "single_transformer_blocks"): FLUX_SINGLE,
        ("distilled_guidance_layer.layers", "distilled_guidance_layer.layers"): CHROMA_GUIDANCE,
        ("distilled_guidance_layer.norms", "distilled_guidance_layer.norms"): {"": ("",)},
    },
    "SD3Transformer2DModel": {("joint_blocks", "transformer_blocks"): SD3_BLOCK},
}
TOPS = {"FluxTransformer2DModel": FLUX_TOP, "ChromaTransformer2DModel": FLUX_TOP, "SD3Transformer2DModel": SD3_TOP}


@dataclass(frozen=True)
class Layout:
    """The original names of one network's layers.

    `modules`: by original name, the layers of diffusers that are stacked along their outputs to be that layer. `swapped`:
    original layers whose output is shift, then scale, where diffusers has scale, then shift. `kohya_original`: whether
    sd-scripts trains the network under its original names.
    """

    network: str
    modules: dict[str, Parts]
    swapped: frozenset[str]
    kohya_original: bool


def layout_of(pipeline: Pipeline, network: nn.Module, wanted: str) -> Layout:
    """The layout of `network`, the denoiser of `pipeline`.

    Raises UserError, naming the export format `wanted`, for a family whose original names are not known here.
    """
    name, family = type(network).__name__, type(pipeline.diffusers).__name__
    places = {place for place, _ in named_places(network)}
    if name in TOPS:
        return Layout(name, dict(_transformer_modules(name, places)), _swapped(name, network), True)
    if name == "UNet2DConditionModel" and family in UNET_PIPELINES and isinstance(_layers_per_block(network), int):
        renamed = {place: _unet_name(place, _layers_per_block(network), places) for place in places}
        modules: dict[str, Parts] = {original: (place,) for place, original in renamed.items() if original is not None}
        return Layout(name, modules, frozenset(), family == "StableDiffusionXLPipeline")
    if wanted == "single-file" and name in RULES:
        return Layout(name, stacked_by_name(name, places - {""}), SWAPPED.get(name, frozenset()), False)
    known = WHOLE if wanted == "single-file" else SUPPORTED
    raise UserError(f"the format {wanted!r} is known for {known}, not for {family}; export it as 'diffusers'")


def named_places(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer with weights of its own under the name that it has without adapters."""
    for name, module in network.named_modules():
        if "lora_" not in name and any(True for _ in module.parameters(recurse=False)):
            yield name.replace(".base_layer", ""), module


def _transformer_modules(name: str, places: set[str]) -> Iterator[tuple[str, Parts]]:
    for original, parts in TOPS[name].items():
        if all(part in places for part in parts):
            yield original, parts
    for (to, where), table in BLOCKS[name].items():
        numbers = {place.removeprefix(f"{where}.").split(".")[0] for place in places if place.startswith(f"{where}.")}
        for i in sorted(numbers, key=int):
            for original, parts in table.items():
                full = tuple(f"{where}.{i}.{part}".rstrip(".") for part in parts)
                if all(part in places for part in full):
                    yield f"{to}.{i}.{original}".rstrip("."), full


def _swapped(name: str, network: nn.Module) -> frozenset[str]:
    last = {"final_layer.adaLN_modulation.1"}
    if name == "SD3Transformer2DModel":
        # The last block keeps no text, so diffusers makes its modulation another class, which puts the scale first.
        blocks: Any = network.get_submodule("transformer_blocks")
        last.add(f"joint_blocks.{len(blocks) - 1}.context_block.adaLN_modulation.1")
    return frozenset(last)


def _layers_per_block(network: Any) -> Any:
    return network.config.layers_per_block


def _unet_name(place: str, layers: int, places: set[str]) -> str | None:
    """The original name of a UNet's layer; None for one that the original has not."""
    if place in UNET_TOP:
        return UNET_TOP[place]
    stack, *rest = place.split(".")
    if stack == "mid_block":
        kind, index, inner = rest[0], int(rest[1]), ".".join(rest[2:])
        return (
            f"middle_block.{2 * index}.{UNET_RESNET[inner]}" if kind == "resnets" else f"middle_block.{2 * index + 1}.{inner}"
        )
    if stack not in ("down_blocks", "up_blocks") or len(rest) < 4:
        return None
    block, kind, index, inner = int(rest[0]), rest[1], int(rest[2]), ".".join(rest[3:])
    start = block * (layers + 1) + (stack == "down_blocks")
    blocks = "input_blocks" if stack == "down_blocks" else "output_blocks"
    if kind == "resnets":
        return f"{blocks}.{start + index}.0.{UNET_RESNET[inner]}"
    if kind == "attentions":
        return f"{blocks}.{start + index}.1.{inner}"
    if kind == "downsamplers":
        return f"{blocks}.{start + layers}.0.op"
    if kind == "upsamplers":
        # The last of a list: behind the attention where there is one.
        attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in places)
        return f"{blocks}.{start + layers}.{2 if attends else 1}.conv"
    return None


def original_weights(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights, named as diffusers names them, under their original names and stacked as there.

    Raises UserError where a weight has no original name.
    """
    left, result = dict(weights), {}
    for original, parts in layout.modules.items():
        for leaf in ("weight", "bias"):
            if f"{parts[0]}.{leaf}" not in left:
                continue
            stacked = torch.cat([left.pop(f"{part}.{leaf}") for part in parts])
            name = "scale" if layout.network != "SD3Transformer2DModel" and _is_root_mean_square(original) else leaf
            result[f"{original}.{name}"] = _swap(stacked) if original in layout.swapped else stacked
    loose = LOOSE | {"pos_embed.pos_embed": "pos_embed" if layout.network == "SD3Transformer2DModel" else "positional_encoding"}
    result |= {original: left.pop(name) for name, original in loose.items() if name in left}
    if left:
        raise UserError(f"this {layout.network} has {min(left)}, for which the original layout has no name")
    return result


def _is_root_mean_square(original: str) -> bool:
    return original.endswith(("query_norm", "key_norm")) or ".norms." in original


def _swap(weight: Tensor) -> Tensor:
    """The two halves of a modulation's outputs the other way round."""
    first, second = weight.chunk(2)
    return torch.cat([second, first])


Factors = tuple[Tensor, Tensor]


def original_lora(layout: Layout, network: nn.Module, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """LoRA factors (down [r, in], up [out, r]) of diffusers' layers as factors of the original layers.

    A stacked layer gets the downs stacked and the ups in a block diagonal matrix, so its rank is the sum; that is exact. Parts
    without LoRA get zeros. Raises UserError for a layer that the original has not.
    """
    left, result = dict(layers), {}
    for original, parts in layout.modules.items():
        if not any(part in left for part in parts):
            continue
        some = next(left[part] for part in parts if part in left)
        factors = [left.pop(part) if part in left else _nothing(network.get_submodule(part), some) for part in parts]
        down = torch.cat([each for each, _ in factors])
        up = torch.block_diag(*(each for _, each in factors)) if len(factors) > 1 else factors[0][1]
        result[original] = (down, _swap(up) if original in layout.swapped else up)
    if left:
        raise UserError(f"the LoRA adapts {min(left)}, for which the original layout has no name; leave it out of lora.targets")
    return result


def _nothing(layer: Any, like: Factors) -> Factors:
    down, _ = like
    return torch.zeros_like(down), down.new_zeros(layer.out_features, down.shape[0])
