"""Tiny random diffusers pipelines of real classes, made on the spot: no downloads, milliseconds a call."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH = 32
LENGTH = 32
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PROMPTS = ["a red cube", "two blue rings on a dark floor"]


def clip_tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    letters = string.ascii_lowercase + string.digits
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """One token a letter."""
    letters = "▁" + string.ascii_lowercase
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def clip(projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        **{"vocab_size": len(clip_tokenizer()), "hidden_size": WIDTH, "intermediate_size": 37, "projection_dim": WIDTH},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": LENGTH},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def vae(channels: int, levels: int, **options: Any) -> AutoencoderKL:
    """Downsamples by 2 ** (levels - 1)."""
    return AutoencoderKL(
        **{"block_out_channels": (8,) * levels, "latent_channels": channels, "norm_num_groups": 4, "sample_size": 32},
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **options,
    ).eval()


def unet(channels: int = 4, size: int = 8, **options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        **{"sample_size": size, "in_channels": channels, "out_channels": channels, "layers_per_block": 1},
        **{"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": WIDTH, "attention_head_dim": 4},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    }
    return UNet2DConditionModel(**settings | options).eval()


def toy_scheduler() -> DDIMScheduler:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1}
    return DDIMScheduler(**BETAS, prediction_type="v_prediction", **options)


def sd15(seed: int = 0, scheduler: Any = None, **unet_options: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: an epsilon UNet on 4 x 8 x 8 latents of 64 px images, PNDM unless told otherwise."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=vae(4, 4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(**unet_options),
        scheduler=scheduler or PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def toy(seed: int = 0) -> StableDiffusionPipeline:
    """The shipped teacher's combination: v-prediction, zero terminal SNR, 6 x 8 x 8 latents of 32 px images."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=vae(6, 3, scaling_factor=0.7),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(channels=6),
        scheduler=toy_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(seed: int = 0, scheduler: Any = None) -> StableDiffusionXLPipeline:
    """SDXL: two text encoders, pooled embeddings, time ids; a zero embedding as the null condition."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 2 * WIDTH},
        **{"projection_class_embeddings_input_dim": 6 * 8 + WIDTH, "use_linear_projection": True},
    }
    return StableDiffusionXLPipeline(
        vae=vae(4, 4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(**options),
        scheduler=scheduler or DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def sd3(seed: int = 0, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: a flow transformer with CLIP, CLIP and T5, time shift 3."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 4, "pos_embed_max_size": 8},
        **{"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32},
        **{"joint_attention_dim": WIDTH * 2, "pooled_projection_dim": 2 * WIDTH},
    )
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(16, 4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder.eval(),
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
