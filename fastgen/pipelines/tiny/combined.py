"""Tiny random pipelines in two stages: a prior turns the prompt into the embedding of a picture, a second model draws it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyCombinedPipeline,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastgen.pipelines.tiny.encoders import LENGTH, SYMBOLS, WIDTH, clip, clip_tokenizer, letters
from fastgen.pipelines.tiny.unets import BETAS


def _prior() -> dict[str, Any]:
    """The first stage of Kandinsky 2."""
    prior = PriorTransformer(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": WIDTH, "num_layers": 1},
        num_embeddings=LENGTH,
    )
    torch.nn.init.ones_(prior.clip_std)
    vision = CLIPVisionConfig(
        **{"hidden_size": WIDTH, "image_size": 32, "projection_dim": WIDTH, "intermediate_size": 37, "patch_size": 16},
        **{"num_attention_heads": 4, "num_hidden_layers": 2},
    )
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return {
        **{"prior_prior": prior, "prior_image_encoder": CLIPVisionModelWithProjection(vision), "prior_scheduler": scheduler},
        **{"prior_text_encoder": clip(projection=True), "prior_tokenizer": clip_tokenizer()},
        "prior_image_processor": CLIPImageProcessor(size=32, crop_size=32),
    }


def kandinsky_unet(**options: Any) -> UNet2DConditionModel:
    """Kandinsky 2's UNet, which predicts its variance too."""
    return UNet2DConditionModel(
        **{"in_channels": 4, "out_channels": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8},
        **{"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "attention_head_dim": 4},
        **{"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "encoder_hid_dim": WIDTH},
        **{"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": WIDTH},
        **{"resnet_time_scale_shift": "scale_shift", **options},
    )


def movq() -> VQModel:
    """Kandinsky's autoencoder; downsamples by 8."""
    return VQModel(
        **{"block_out_channels": (32, 32, 32, 64), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8},
        **{"norm_type": "spatial", "num_vq_embeddings": 12, "vq_embed_dim": 4},
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    )


def kandinsky21() -> KandinskyCombinedPipeline:
    """Kandinsky 2.1: the second stage reads the prompt too."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = MCLIPConfig(transformerDimSize=WIDTH, imageDimSize=WIDTH, vocab_size=len(SYMBOLS), **shape)
    network = kandinsky_unet(
        addition_embed_type="text_image", addition_embed_type_num_heads=2, encoder_hid_dim_type="text_image_proj"
    )
    return KandinskyCombinedPipeline(
        **{"text_encoder": MultilingualCLIP(config), "tokenizer": letters(model_max_length=77), "unet": network},
        **{"scheduler": DDPMScheduler(**BETAS, steps_offset=1, clip_sample=False), "movq": movq(), **_prior()},
    )


def kandinsky22() -> KandinskyV22CombinedPipeline:
    """Kandinsky 2.2: the second stage knows the embedding alone."""
    network = kandinsky_unet(addition_embed_type="image", encoder_hid_dim_type="image_proj")
    scheduler = DDPMScheduler(**BETAS, steps_offset=1, clip_sample=False, variance_type="learned_range")
    return KandinskyV22CombinedPipeline(unet=network, scheduler=scheduler, movq=movq(), **_prior())


BUILDERS = {
    "KandinskyCombinedPipeline": kandinsky21,
    "KandinskyV22CombinedPipeline": kandinsky22,
}
