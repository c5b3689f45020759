"""Tiny random pipelines around a UNet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from fastgen.pipelines.tiny.encoders import WIDTH, clip, clip_tokenizer, vae

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


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


BUILDERS = {"StableDiffusionPipeline": sd15, "StableDiffusionXLPipeline": sdxl}
