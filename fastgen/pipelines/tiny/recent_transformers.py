"""Tiny random pipelines of the flow transformers that diffusers got last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage21,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    ZImageOmniPipeline,
)
from transformers import Qwen3Config, Qwen3Model

from fastgen.pipelines.tiny.encoders import WIDTH, Letters, awake, language_model, letters, qwen_vision
from fastgen.pipelines.tiny.transformers import z_image


def normalising_vae() -> AutoencoderKLFlux2:
    """FLUX.2's autoencoder, with statistics of each patch's channels."""
    autoencoder = AutoencoderKLFlux2(
        **{"block_out_channels": (8,) * 4, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1},
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    )
    autoencoder.bn.running_mean.normal_(std=0.2)
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return autoencoder


def ernie() -> ErnieImagePipeline:
    """ERNIE-Image: prompts padded together with the empty ones, FLUX.2's patches as channels."""
    network = ErnieImageTransformer2DModel(
        **{"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48, "in_channels": 16},
        **{"out_channels": 16, "text_in_dim": WIDTH, "rope_axes_dim": (8, 4, 4)},
    )
    return ErnieImagePipeline(
        **{"transformer": awake(network), "vae": normalising_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
        **{"text_encoder": language_model(Qwen3Config, Qwen3Model), "tokenizer": letters(model_max_length=600)},
    )


class _Processor(Letters):
    """Also a processor, whose tokenizer it is itself."""

    @property
    def tokenizer(self) -> Any:
        return self

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        return [super().apply_chat_template(*args, **options)]


def qwen_image_21() -> QwenImage21Pipeline:
    """Qwen-Image 2.1: one sequence of prompt and picture, pictures with transparency."""
    network = QwenImage21Transformer2DModel(
        **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"context_in_dim": WIDTH, "axes_dims_rope": (8, 4, 4)},
    )
    autoencoder = AutoencoderKLQwenImage21(
        **{"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1},
        **{"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4},
    )
    pipeline = QwenImage21Pipeline(
        **{"transformer": awake(network), "vae": autoencoder, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
        **{"text_encoder": qwen_vision(3), "processor": letters(_Processor, model_max_length=600)},
    )
    pipeline._img_token_id = -1  # Where every letter is a token, none stands for a picture.
    return pipeline


def z_image_omni() -> ZImageOmniPipeline:
    """Z-Image Omni, which edits pictures too: every argument is a list of a list for each sample."""
    known = z_image(torch.initial_seed()).components
    return ZImageOmniPipeline(**known, siglip=None, siglip_processor=None)


def fibo2() -> BriaFibo2Pipeline:
    """Fibo 2: prompts in JSON, eighteen states of each token in bundles of three."""
    network = BriaFibo2Transformer2DModel(
        **{"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 3 * WIDTH},
        **{"injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 8, "max_num_gist_tokens": 16},
        **{"gist_step": 4, "gist_min_text_len": 8, "gist_max_text_len": 64, "axes_dims": (8, 4, 4)},
    )
    pipeline = BriaFibo2Pipeline(
        **{"transformer": awake(network), "vae": normalising_vae(), "scheduler": FlowMatchEulerDiscreteScheduler()},
        **{"text_encoder": qwen_vision(3), "processor": letters(model_max_length=600)},
    )
    pipeline.text_encoder_out_layers = ((1, 4, 7), (2, 5, 8))
    return pipeline


BUILDERS = {
    "BriaFibo2Pipeline": fibo2,
    "ErnieImagePipeline": ernie,
    "QwenImage21Pipeline": qwen_image_21,
    "ZImageOmniPipeline": z_image_omni,
}
