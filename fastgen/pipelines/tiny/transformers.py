"""Tiny random pipelines of flow transformers with language-model conditions of varying length or guidance of their own kind."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from fastgen.pipelines.tiny.encoders import WIDTH, language_model, letters, qwen_vae, qwen_vision, t5, t5_tokenizer, vae

SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}


def qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image: prompts padded to the longest of a batch, guidance that keeps the norm, latents of one frame, packed."""
    torch.manual_seed(seed)
    network = QwenImageTransformer2DModel(
        **{"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": WIDTH, "axes_dims_rope": (8, 4, 4)},
    )
    return QwenImagePipeline(
        **{"transformer": network.eval(), "vae": qwen_vae().eval(), "scheduler": FlowMatchEulerDiscreteScheduler(**SHIFT)},
        **{"text_encoder": qwen_vision().eval(), "tokenizer": letters(model_max_length=1100)},
    )


def z_image(seed: int = 0) -> ZImagePipeline:
    """Z-Image: prompts and latents as lists of one tensor a sample, a flow and a time that run the other way."""
    torch.manual_seed(seed)
    network = ZImageTransformer2DModel(
        **{"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"cap_feat_dim": WIDTH, "axes_dims": [8, 4, 4], "axes_lens": [1024, 64, 64]},
    )
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter, std=0.02)
    return ZImagePipeline(
        **{"transformer": network.eval(), "vae": vae(4, 4, scaling_factor=0.3611, shift_factor=0.1159)},
        **{"text_encoder": language_model(Qwen3Config, Qwen3Model).eval(), "tokenizer": letters(model_max_length=600)},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina2(seed: int = 0) -> Lumina2Pipeline:
    """Lumina 2: a flow and a time that run the other way, guidance that keeps the norm."""
    torch.manual_seed(seed)
    network = Lumina2Transformer2DModel(
        **{"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1},
        **{"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 4, 4)},
        **{"axes_lens": (300, 64, 64), "cap_feat_dim": WIDTH},
    )
    return Lumina2Pipeline(
        **{"transformer": network.eval(), "vae": vae(4, 4, scaling_factor=0.3611, shift_factor=0.1159)},
        **{"text_encoder": language_model(Gemma2Config, Gemma2Model).eval(), "tokenizer": letters(model_max_length=300)},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def _flux2_parts(guidance: bool) -> dict[str, Any]:
    network = Flux2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 3 * WIDTH, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        guidance_embeds=guidance,
    )
    autoencoder = AutoencoderKLFlux2(
        **{"block_out_channels": (8,) * 4, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1},
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    )
    autoencoder.bn.running_mean.normal_(std=0.2)
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"transformer": network.eval(), "vae": autoencoder.eval(), "scheduler": scheduler}


def flux2(seed: int = 0) -> Flux2Pipeline:
    """FLUX.2 dev: three layers of Mistral, embedded guidance, packed latents."""
    torch.manual_seed(seed)
    encoder = language_model(MistralConfig, MistralForCausalLM, num_hidden_layers=31)
    return Flux2Pipeline(**_flux2_parts(True), text_encoder=encoder.eval(), tokenizer=letters(model_max_length=600))


def flux2_klein(seed: int = 0) -> Flux2KleinPipeline:
    """FLUX.2 klein, the base model: three layers of Qwen 3, guidance in two calls."""
    torch.manual_seed(seed)
    encoder = language_model(Qwen3Config, Qwen3ForCausalLM, num_hidden_layers=28)
    return Flux2KleinPipeline(**_flux2_parts(False), text_encoder=encoder.eval(), tokenizer=letters(model_max_length=600))


def hunyuan_image(seed: int = 0, guided: bool = True) -> HunyuanImagePipeline:
    """HunyuanImage 2.1: two encoders with masks, a guider; or the distilled one without, its scale embedded."""
    torch.manual_seed(seed)
    network = HunyuanImageTransformer2DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
        **{"num_single_layers": 2, "num_refiner_layers": 1, "patch_size": (1, 1), "guidance_embeds": not guided},
        **{"text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH, "rope_axes_dim": (8, 8)},
    )
    autoencoder = AutoencoderKLHunyuanImage(
        **{"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32, 64)},
        **{"layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 64, "scaling_factor": 0.7},
    )
    glyphs = T5EncoderModel(T5Config(vocab_size=400, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4))
    return HunyuanImagePipeline(
        **{"transformer": network.eval(), "vae": autoencoder.eval(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)},
        **{"text_encoder": qwen_vision().eval(), "tokenizer": letters(model_max_length=1100)},
        **{"text_encoder_2": glyphs.eval(), "tokenizer_2": ByT5Tokenizer()},
        guider=AdaptiveProjectedMixGuidance() if guided else None,
    )


def aura_flow(seed: int = 0) -> AuraFlowPipeline:
    """AuraFlow: T5 alone, times between 0 and 1."""
    torch.manual_seed(seed)
    network = AuraFlowTransformer2DModel(
        **{"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8},
        **{"num_attention_heads": 4, "joint_attention_dim": WIDTH, "caption_projection_dim": 32, "pos_embed_max_size": 256},
    )
    return AuraFlowPipeline(
        **{"transformer": network.eval(), "vae": vae(4, 4, scaling_factor=0.13025), "text_encoder": t5()},
        **{"tokenizer": t5_tokenizer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73)},
    )


def cogview4(seed: int = 0) -> CogView4Pipeline:
    """CogView4: prompts padded to a multiple of 16 tokens without a mask, times that are not shifted with the noise levels."""
    torch.manual_seed(seed)
    network = CogView4Transformer2DModel(
        **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4},
        **{"text_embed_dim": WIDTH, "time_embed_dim": 16, "condition_dim": 4, "rope_axes_dim": (16, 16)},
    )
    shift = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return CogView4Pipeline(
        **{"transformer": network.eval(), "vae": vae(4, 4, scaling_factor=1.0, shift_factor=0.0)},
        **{"text_encoder": language_model(GlmConfig, GlmModel).eval(), "tokenizer": letters(model_max_length=1100)},
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )


BUILDERS = {
    "AuraFlowPipeline": aura_flow,
    "CogView4Pipeline": cogview4,
    "Flux2KleinPipeline": flux2_klein,
    "Flux2Pipeline": flux2,
    "HunyuanImagePipeline": hunyuan_image,
    "Lumina2Pipeline": lumina2,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
}
