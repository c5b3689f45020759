"""Tiny random pipelines around a diffusion transformer."""

from __future__ import annotations

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from fastgen.pipelines.tiny.encoders import WIDTH, clip, clip_tokenizer, t5, t5_tokenizer, vae


def sd3(seed: int = 0, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: a flow transformer with CLIP, CLIP and T5, time shift 3."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 4, "pos_embed_max_size": 8},
        **{"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32},
        **{"joint_attention_dim": WIDTH * 2, "pooled_projection_dim": 2 * WIDTH},
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(16, 4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


def flux(seed: int = 0, guidance: bool = True) -> FluxPipeline:
    """FLUX.1 "dev", or "schnell" without guidance: packed latents, dynamic shift; call it with height and width 64."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
        **{
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": guidance,
        },
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=vae(4, 4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def chroma(seed: int = 0) -> ChromaPipeline:
    """Chroma: FLUX's packing with guidance as two calls; call it with height and width 64."""
    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 8)},
        **{"approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 64},
    )
    return ChromaPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, 4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


BUILDERS = {"StableDiffusion3Pipeline": sd3, "FluxPipeline": flux, "ChromaPipeline": chroma}
