"""Original names of the networks that followed FLUX.1, by rules: FLUX.2, Qwen-Image, Z-Image, Lumina 2, AuraFlow.

A rule is a regular expression over diffusers' name of a layer and what takes its place; the first that fits is applied. Layers
of diffusers that get the same name are stacked there in the order of `STACKED`.
"""

from __future__ import annotations

import re

Rules = tuple[tuple[str, str], ...]

STACKED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

FLUX2: Rules = (
    (r"^x_embedder$", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1$", "time_in.in_layer"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2$", "time_in.out_layer"),
    (r"^time_guidance_embed\.guidance_embedder\.linear_1$", "guidance_in.in_layer"),
    (r"^time_guidance_embed\.guidance_embedder\.linear_2$", "guidance_in.out_layer"),
    (r"^(.*_stream_modulation.*)\.linear$", r"\1.lin"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj$", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out$", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q$", r"single_blocks.\1.norm.query_norm"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k$", r"single_blocks.\1.norm.key_norm"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_[qkv]$", r"double_blocks.\1.img_attn.qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$", r"double_blocks.\1.txt_attn.qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.txt_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_q$", r"double_blocks.\1.img_attn.norm.query_norm"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_k$", r"double_blocks.\1.img_attn.norm.key_norm"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_q$", r"double_blocks.\1.txt_attn.norm.query_norm"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_k$", r"double_blocks.\1.txt_attn.norm.key_norm"),
    (r"^transformer_blocks\.(\d+)\.ff\.linear_in$", r"double_blocks.\1.img_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.linear_out$", r"double_blocks.\1.img_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.linear_in$", r"double_blocks.\1.txt_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.linear_out$", r"double_blocks.\1.txt_mlp.2"),
)
Z_IMAGE: Rules = (
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"^all_x_embedder\.2-1$", "x_embedder"),
    (r"\.attention\.to_[qkv]$", ".attention.qkv"),
    (r"\.attention\.to_out\.0$", ".attention.out"),
    (r"\.attention\.norm_q$", ".attention.q_norm"),
    (r"\.attention\.norm_k$", ".attention.k_norm"),
)
LUMINA2: Rules = (
    (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
    (r"^time_caption_embed\.timestep_embedder\.linear_1$", "t_embedder.mlp.0"),
    (r"^time_caption_embed\.timestep_embedder\.linear_2$", "t_embedder.mlp.2"),
    (r"^norm_out\.linear_1$", "final_layer.adaLN_modulation.1"),
    (r"^norm_out\.linear_2$", "final_layer.linear"),
    (r"^(context_refiner\.\d+)\.norm1$", r"\1.attention_norm1"),
    (r"\.norm1\.linear$", ".adaLN_modulation.1"),
    (r"\.norm1\.norm$", ".attention_norm1"),
    (r"\.norm2$", ".attention_norm2"),
    (r"\.attn\.to_[qkv]$", ".attention.qkv"),
    (r"\.attn\.to_out\.0$", ".attention.out"),
    (r"\.attn\.norm_q$", ".attention.q_norm"),
    (r"\.attn\.norm_k$", ".attention.k_norm"),
    (r"\.feed_forward\.linear_(\d)$", r".feed_forward.w\1"),
)
AURA_FLOW: Rules = (
    (r"^time_step_proj\.linear_1$", "t_embedder.mlp.0"),
    (r"^time_step_proj\.linear_2$", "t_embedder.mlp.2"),
    (r"^context_embedder$", "cond_seq_linear"),
    (r"^norm_out\.linear$", "modF.1"),
    (r"^proj_out$", "final_linear"),
    (r"^pos_embed\.proj$", "init_x_linear"),
    (r"^joint_transformer_blocks\.(\d+)\.ff\.linear_(\d)$", r"double_layers.\1.mlpX.c_fc\2"),
    (r"^joint_transformer_blocks\.(\d+)\.ff\.out_projection$", r"double_layers.\1.mlpX.c_proj"),
    (r"^joint_transformer_blocks\.(\d+)\.ff_context\.linear_(\d)$", r"double_layers.\1.mlpC.c_fc\2"),
    (r"^joint_transformer_blocks\.(\d+)\.ff_context\.out_projection$", r"double_layers.\1.mlpC.c_proj"),
    (r"^joint_transformer_blocks\.(\d+)\.norm1\.linear$", r"double_layers.\1.modX.1"),
    (r"^joint_transformer_blocks\.(\d+)\.norm1_context\.linear$", r"double_layers.\1.modC.1"),
    (r"^joint_transformer_blocks\.(\d+)\.attn\.to_([qkv])$", r"double_layers.\1.attn.w2\2"),
    (r"^joint_transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_layers.\1.attn.w2o"),
    (r"^joint_transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj$", r"double_layers.\1.attn.w1\2"),
    (r"^joint_transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_layers.\1.attn.w1o"),
    (r"^single_transformer_blocks\.(\d+)\.ff\.linear_(\d)$", r"single_layers.\1.mlp.c_fc\2"),
    (r"^single_transformer_blocks\.(\d+)\.ff\.out_projection$", r"single_layers.\1.mlp.c_proj"),
    (r"^single_transformer_blocks\.(\d+)\.norm1\.linear$", r"single_layers.\1.modCX.1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_([qkv])$", r"single_layers.\1.attn.w1\2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"single_layers.\1.attn.w1o"),
)
RULES: dict[str, Rules] = {
    "AuraFlowTransformer2DModel": AURA_FLOW,
    "Flux2Transformer2DModel": FLUX2,
    "Lumina2Transformer2DModel": LUMINA2,
    "QwenImageTransformer2DModel": (),  # Released under the names that diffusers gives it.
    "ZImageTransformer2DModel": Z_IMAGE,
}
SWAPPED = {
    "AuraFlowTransformer2DModel": frozenset({"modF.1"}),
    "Flux2Transformer2DModel": frozenset({"final_layer.adaLN_modulation.1"}),
}
"""Layers whose output is shift, then scale, where diffusers has scale, then shift."""

LOOSE = {
    "x_pad_token": "x_pad_token",
    "cap_pad_token": "cap_pad_token",
    "register_tokens": "register_tokens",
}
"""Weights that belong to no layer, by diffusers' name, and their original names."""


def stacked_by_name(network: str, places: set[str]) -> dict[str, tuple[str, ...]]:
    """By original name, the layers of a network of this class that are stacked to be that layer."""
    found: dict[str, list[str]] = {}
    for place in sorted(places, key=_order):
        rule = next(((old, new) for old, new in RULES[network] if re.search(old, place)), None)
        found.setdefault(place if rule is None else re.sub(*rule, place), []).append(place)
    return {original: tuple(parts) for original, parts in found.items()}


def _order(place: str) -> tuple[int, str]:
    last = place.rpartition(".")[2]
    return (STACKED.index(last) if last in STACKED else 0, place)
