"""Tiny random pipelines around transformers that attend to their prompt across: PixArt, Sana, HunyuanDiT, Lumina and kin."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaForCausalLM

from fastgen.pipelines.tiny.encoders import (
    WIDTH,
    bert,
    deep_compression,
    language_model,
    letters,
    t5,
    t5_tokenizer,
    vae,
)


def pixart(pipeline: Any = PixArtAlphaPipeline) -> Any:
    """PixArt-Alpha: an epsilon transformer that predicts its variance too."""
    network = PixArtTransformer2DModel(
        **{"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3},
        **{"in_channels": 4, "out_channels": 8, "caption_channels": WIDTH, "cross_attention_dim": 24},
        **{"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6},
    )
    return pipeline(
        **{"tokenizer": t5_tokenizer(), "text_encoder": t5(), "vae": vae(4, 4)},
        **{"transformer": network, "scheduler": DDIMScheduler(clip_sample=False)},
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return pixart(PixArtSigmaPipeline)


def pixart_sigma_perturbed() -> PixArtSigmaPAGPipeline:
    return pixart(PixArtSigmaPAGPipeline)


def sana(pipeline: Any = SanaPipeline, scheduler: Any = None, **options: Any) -> Any:
    """Sana: a flow transformer with linear attention, Gemma's hidden states as the condition."""
    network = SanaTransformer2DModel(
        **{"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 32, "caption_channels": WIDTH},
        **{"num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4},
        **{"cross_attention_dim": 8, **options},
    )
    return pipeline(
        tokenizer=letters(),
        text_encoder=language_model(Gemma2Config, Gemma2Model),
        vae=deep_compression(),
        transformer=network,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def sana_sprint() -> SanaSprintPipeline:
    """Sana Sprint: TrigFlow, guidance embedded."""
    return sana(SanaSprintPipeline, SCMScheduler(), qk_norm="rms_norm_across_heads", guidance_embeds=True)


def sana_perturbed() -> SanaPAGPipeline:
    return sana(SanaPAGPipeline)


def hunyuan_dit(pipeline: Any = HunyuanDiTPipeline) -> Any:
    """HunyuanDiT: two text encoders, attention masks for both, a learned variance."""
    network = HunyuanDiT2DModel(
        **{"sample_size": 16, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3},
        **{"in_channels": 4, "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 16},
        **{"hidden_size": 24, "activation_fn": "gelu-approximate", "text_len": 77, "text_len_t5": 256},
    )
    return pipeline(
        **{"vae": vae(4, 4), "text_encoder": bert(), "tokenizer": letters(model_max_length=77), "transformer": network},
        **{"text_encoder_2": t5(), "tokenizer_2": t5_tokenizer(), "scheduler": DDPMScheduler(prediction_type="v_prediction")},
        **{"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    )


def hunyuan_dit_perturbed() -> HunyuanDiTPAGPipeline:
    return hunyuan_dit(HunyuanDiTPAGPipeline)


def lumina() -> LuminaPipeline:
    """Lumina-Next: a flow transformer whose times run the other way, and which predicts a variance."""
    network = LuminaNextDiT2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3},
        **{"num_kv_heads": 1, "multiple_of": 16, "norm_eps": 1e-5, "learn_sigma": True, "qk_norm": True},
        **{"cross_attention_dim": WIDTH, "scaling_factor": 1.0},
    )
    return LuminaPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, 4),
        text_encoder=language_model(GemmaConfig, GemmaForCausalLM),
        tokenizer=letters(),
    )


def cogview3() -> CogView3PlusPipeline:
    """CogView3-Plus: a v-prediction transformer with the sizes of picture and crop as a condition."""
    network = CogView3PlusTransformer2DModel(
        **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "pos_embed_max_size": 8},
        **{"attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 2},
    )
    return CogView3PlusPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(4, 4),
        transformer=network,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True),
    )


BUILDERS = {
    "CogView3PlusPipeline": cogview3,
    "HunyuanDiTPAGPipeline": hunyuan_dit_perturbed,
    "HunyuanDiTPipeline": hunyuan_dit,
    "LuminaPipeline": lumina,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPAGPipeline": pixart_sigma_perturbed,
    "PixArtSigmaPipeline": pixart_sigma,
    "SanaPAGPipeline": sana_perturbed,
    "SanaPipeline": sana,
    "SanaSprintPipeline": sana_sprint,
}
