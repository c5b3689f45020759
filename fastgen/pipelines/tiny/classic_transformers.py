"""Tiny random pipelines around a diffusion transformer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3Model, SmolLM3Config, SmolLM3ForCausalLM

from fastgen.pipelines.tiny.encoders import (
    WIDTH,
    clip,
    clip_tokenizer,
    language_model,
    letters,
    qwen_vision,
    t5,
    t5_tokenizer,
    vae,
)


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


def sd3_perturbed() -> StableDiffusion3PAGPipeline:
    known = sd3().components
    return StableDiffusion3PAGPipeline(
        **{name: known[name] for name in known if name not in ("image_encoder", "feature_extractor")}
    )


FLUX_LIKE: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
FLUX_LIKE |= {"in_channels": 16, "axes_dims_rope": (4, 4, 8)}


def packed_vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    """A FLUX-like autoencoder whose channels are packed fourfold; downsamples by 8."""
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(channels, 4, **{"scaling_factor": 0.3611, "shift_factor": 0.1159, **plain, **options})


def bria() -> BriaPipeline:
    """Bria 3: FLUX's transformer under T5 alone, guidance batched."""
    return BriaPipeline(
        transformer=BriaTransformer2DModel(**FLUX_LIKE, patch_size=1, joint_attention_dim=WIDTH, pooled_projection_dim=None),
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": packed_vae(shift_factor=0.0)},
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer(), "image_encoder": None, "feature_extractor": None},
    )


def fibo() -> BriaFiboPipeline:
    """Fibo: prompts in JSON, all layers of SmolLM3, Wan's autoencoder."""
    network = BriaFiboTransformer2DModel(
        **{**FLUX_LIKE, "in_channels": 16}, joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, pooled_projection_dim=None
    )
    autoencoder = AutoencoderKLWan(
        **{"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        **{"scale_factor_spatial": 16, "z_dim": 16, "temperal_downsample": [False, True, True]},
    )
    # An empty prompt becomes the token 128000.
    encoder = language_model(SmolLM3Config, SmolLM3ForCausalLM, vocab_size=128_001)
    return BriaFiboPipeline(
        **{"transformer": network, "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": autoencoder},
        **{"text_encoder": encoder, "tokenizer": letters(model_max_length=64)},
    )


def ovis() -> OvisImagePipeline:
    """Ovis-Image: FLUX's packing under Qwen 3's hidden states."""
    return OvisImagePipeline(
        transformer=OvisImageTransformer2DModel(**FLUX_LIKE, patch_size=1, out_channels=16, joint_attention_dim=WIDTH),
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": packed_vae(), "tokenizer": letters()},
        text_encoder=language_model(Qwen3Config, Qwen3Model),
    )


def longcat() -> LongCatImagePipeline:
    """LongCat-Image: FLUX's packing under Qwen 2.5 VL, which rewrites the prompt first."""
    pipeline = LongCatImagePipeline(
        transformer=LongCatImageTransformer2DModel(
            **{**FLUX_LIKE, "in_channels": 64}, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH
        ),
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": packed_vae(channels=16), "text_encoder": qwen_vision()},
        **{"tokenizer": letters(), "text_processor": letters()},
    )
    pipeline.tokenizer_max_length = 16  # As many tokens are written.
    return pipeline


def hidream() -> HiDreamImagePipeline:
    """HiDream: four text encoders, a mixture of experts."""
    network = HiDreamImageTransformer2DModel(
        **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1},
        **{"attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [WIDTH, WIDTH], "text_emb_dim": 2 * WIDTH},
        **{"num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32)},
        llama_layers=(0, 1),
    )
    pipeline = HiDreamImagePipeline(
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": packed_vae(), "transformer": network},
        **{"text_encoder": clip(projection=True, length=128), "tokenizer": clip_tokenizer()},
        **{"text_encoder_2": clip(projection=True, length=128), "tokenizer_2": clip_tokenizer()},
        **{"text_encoder_3": t5(), "tokenizer_3": t5_tokenizer()},
        text_encoder_4=language_model(LlamaConfig, LlamaForCausalLM, attn_implementation="eager"),
        tokenizer_4=letters(),
    )
    pipeline.default_sample_size = 8  # Whatever is asked for is scaled to this area.
    return pipeline


BUILDERS = {
    "BriaFiboPipeline": fibo,
    "BriaPipeline": bria,
    "ChromaPipeline": chroma,
    "FluxPipeline": flux,
    "HiDreamImagePipeline": hidream,
    "LongCatImagePipeline": longcat,
    "OvisImagePipeline": ovis,
    "StableDiffusion3PAGPipeline": sd3_perturbed,
    "StableDiffusion3Pipeline": sd3,
}
