"""Tiny random pipelines around flow transformers that are conditioned on a language model's hidden states, or are one."""

from __future__ import annotations

from typing import Any

from diffusers import (
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model, Qwen3VLModel

from fastgen.pipelines.tiny.encoders import (
    WIDTH,
    awake,
    clip,
    clip_tokenizer,
    language_model,
    letters,
    qwen_vae,
    qwen_vision,
    t5,
    t5_tokenizer,
    vae,
    wan_vae,
)
from fastgen.pipelines.tiny.transformers import flux2_klein


def prx() -> PRXPipeline:
    """PRX: a small flow transformer under a language model's hidden states."""
    network = PRXTransformer2DModel(
        **{"patch_size": 1, "in_channels": 4, "context_in_dim": WIDTH, "hidden_size": 8, "mlp_ratio": 2.0},
        **{"num_heads": 2, "depth": 2, "axes_dim": [2, 2]},
    )
    return PRXPipeline(
        **{"transformer": awake(network), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae(4, 4, shift_factor=0.1)},
        **{"text_encoder": language_model(Qwen3Config, Qwen3Model), "tokenizer": letters()},
    )


def prx_pixel() -> PRXPixelPipeline:
    """PRX on pixels: no autoencoder."""
    network = PRXTransformer2DModel(
        **{"patch_size": 8, "in_channels": 3, "context_in_dim": WIDTH, "hidden_size": 8, "mlp_ratio": 2.0},
        **{"num_heads": 2, "depth": 1, "axes_dim": [2, 2], "bottleneck_size": 8, "resolution_embeds": True},
    )
    return PRXPixelPipeline(
        **{"transformer": awake(network), "scheduler": FlowMatchEulerDiscreteScheduler()},
        **{"text_encoder": language_model(Qwen3Config, Qwen3Model), "tokenizer": letters()},
    )


def omnigen() -> OmniGenPipeline:
    """OmniGen: one transformer reads the prompt's tokens and draws; its times run the other way."""
    network = OmniGenTransformer2DModel(
        **{"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32, "num_layers": 2},
        **{"in_channels": 4, "time_step_dim": 4, "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}},
    )
    return OmniGenPipeline(
        **{"transformer": network, "vae": vae(4, 4), "tokenizer": letters(model_max_length=512)},
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
    )


def krea2() -> Krea2Pipeline:
    """Krea 2: several layers of Qwen 3 VL at once."""
    network = Krea2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": WIDTH, "num_text_layers": 3},
        **{"text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16},
        **{"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2), "rope_theta": 1000.0},
    )
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 6400}
    return Krea2Pipeline(
        **{"transformer": network, "vae": qwen_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(**shift)},
        **{"text_encoder": qwen_vision(3, Qwen3VLModel), "tokenizer": letters(), "text_encoder_select_layers": (0, 1, 2)},
    )


def kandinsky5() -> Kandinsky5T2IPipeline:
    """Kandinsky 5: Qwen 2.5 VL and CLIP; latents of one frame, channels last."""
    network = Kandinsky5Transformer3DModel(
        **{"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 16},
        **{"patch_size": (1, 2, 2), "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2},
        **{"axes_dims": (1, 1, 2), "visual_cond": False, "attention_type": "regular"},
    )
    pipeline = Kandinsky5T2IPipeline(
        **{
            "transformer": awake(network),
            "vae": vae(4, 4, scaling_factor=0.3611),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        },
        **{"text_encoder": qwen_vision(), "tokenizer": letters(), "text_encoder_2": clip(length=77)},
        tokenizer_2=clip_tokenizer(),
    )
    pipeline.resolutions = [(64, 64), (64, 128), (128, 64)]  # Whatever is asked for becomes one of these.
    return pipeline


def nucleus() -> NucleusMoEImagePipeline:
    """Nucleus: a mixture of experts under an early layer of Qwen 3 VL."""
    network = NucleusMoEImageTransformer2DModel(
        **{"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16},
        **{"num_attention_heads": 4, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 4, 4), "moe_enabled": False},
        capacity_factors=[8.0, 8.0],
    )
    return NucleusMoEImagePipeline(
        **{"transformer": network, "vae": qwen_vae(), "scheduler": FlowMatchEulerDiscreteScheduler()},
        **{"text_encoder": qwen_vision(3), "processor": letters()},
    )


class _Harmless:
    """Cosmos wants a guardrail; a tiny model draws nothing to guard against."""

    def to(self, *args: Any, **kwargs: Any) -> _Harmless:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos2() -> Cosmos2TextToImagePipeline:
    """Cosmos Predict 2: an EDM-like model on a flow scheduler, a video autoencoder at one frame."""
    network = CosmosTransformer3DModel(
        **{"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
        **{"mlp_ratio": 2, "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2)},
        **{"rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": True, "extra_pos_embed_type": "learnable"},
    )
    return Cosmos2TextToImagePipeline(
        **{"transformer": network, "vae": wan_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)},
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer(), "safety_checker": _Harmless()},
    )


def flux2_klein_cached() -> Flux2KleinKVPipeline:
    """FLUX.2 klein, distilled, which keeps the attention of its reference pictures."""
    return Flux2KleinKVPipeline(**flux2_klein().components)


BUILDERS = {
    "Cosmos2TextToImagePipeline": cosmos2,
    "Flux2KleinKVPipeline": flux2_klein_cached,
    "Kandinsky5T2IPipeline": kandinsky5,
    "Krea2Pipeline": krea2,
    "NucleusMoEImagePipeline": nucleus,
    "OmniGenPipeline": omnigen,
    "PRXPipeline": prx,
    "PRXPixelPipeline": prx_pixel,
}
