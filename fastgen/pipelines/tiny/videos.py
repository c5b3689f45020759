"""Tiny random text-to-video pipelines: nine frames of 64 x 64."""

from __future__ import annotations

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel

from fastgen.pipelines.tiny.encoders import (
    WIDTH,
    clip,
    clip_tokenizer,
    language_model,
    letters,
    t5,
    t5_tokenizer,
    vae,
    wan_vae,
)
from fastgen.pipelines.tiny.unets import BETAS, unet

EIGHTS = (8, 8, 8, 8)


def wan() -> WanPipeline:
    """Wan 2.1; Wan 2.2 has a second transformer for the noisy half of the schedule."""
    network = WanTransformer3DModel(
        **{"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16},
        **{"text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32},
    )
    return WanPipeline(
        **{"transformer": network, "vae": wan_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)},
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer(), "transformer_2": None},
    )


def cogvideox() -> CogVideoXPipeline:
    """CogVideoX: v-prediction, prompt and frames in one sequence."""
    network = CogVideoXTransformer3DModel(
        **{"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2},
        **{"text_embed_dim": WIDTH, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 9},
        **{"patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 226},
    )
    autoencoder = AutoencoderKLCogVideoX(
        **{"block_out_channels": EIGHTS, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2},
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )
    options = {"prediction_type": "v_prediction", "clip_sample": False, "rescale_betas_zero_snr": True}
    return CogVideoXPipeline(
        **{"transformer": network, "vae": autoencoder, "scheduler": CogVideoXDDIMScheduler(**options)},
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer()},
    )


def ltx() -> LTXPipeline:
    """LTX-Video: packed latents."""
    network = LTXVideoTransformer3DModel(
        **{"in_channels": 8, "out_channels": 8, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 4},
        **{"attention_head_dim": 8, "cross_attention_dim": WIDTH, "num_layers": 2, "caption_channels": WIDTH},
    )
    autoencoder = AutoencoderKLLTXVideo(
        **{"latent_channels": 8, "block_out_channels": EIGHTS, "decoder_block_out_channels": EIGHTS, "patch_size": 1},
        **{"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "decoder_inject_noise": (False,) * 5},
        **{"spatio_temporal_scaling": (True, True, False, False), "upsample_residual": (False,) * 4},
        **{"decoder_spatio_temporal_scaling": (True, True, False, False), "upsample_factor": (1,) * 4},
    )
    return LTXPipeline(
        **{"transformer": network, "vae": autoencoder, "scheduler": FlowMatchEulerDiscreteScheduler()},
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer()},
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo: Llama and CLIP, guidance embedded."""
    network = HunyuanVideoTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1},
        **{"num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "guidance_embeds": True},
        **{"text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": (2, 4, 4)},
    )
    autoencoder = AutoencoderKLHunyuanVideo(
        **{"latent_channels": 4, "block_out_channels": EIGHTS, "layers_per_block": 1, "norm_num_groups": 4},
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )
    return HunyuanVideoPipeline(
        **{"transformer": network, "vae": autoencoder, "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)},
        **{"text_encoder": language_model(LlamaConfig, LlamaModel), "tokenizer": letters()},
        **{"text_encoder_2": clip(length=77), "tokenizer_2": clip_tokenizer()},
    )


def mochi() -> MochiPipeline:
    """Mochi: its network's times run the other way."""
    network = MochiTransformer3DModel(
        **{"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16},
        **{"in_channels": 12, "text_embed_dim": WIDTH, "time_embed_dim": 4, "max_sequence_length": 256},
    )
    network.pos_frequencies.data.normal_()  # It comes uninitialised.
    autoencoder = AutoencoderKLMochi(
        **{"latent_channels": 12, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
        layers_per_block=(1,) * 5,
    )
    return MochiPipeline(
        **{"transformer": network, "vae": autoencoder, "scheduler": FlowMatchEulerDiscreteScheduler()},
        **{"text_encoder": t5(), "tokenizer": t5_tokenizer()},
    )


def animatediff() -> AnimateDiffPipeline:
    """AnimateDiff: Stable Diffusion's UNet with layers of motion."""
    motion = MotionAdapter(
        **{"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_norm_num_groups": 8},
        motion_num_attention_heads=4,
    )
    return AnimateDiffPipeline(
        **{"vae": vae(4, 4), "text_encoder": clip(), "tokenizer": clip_tokenizer(), "unet": unet(), "motion_adapter": motion},
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    )


BUILDERS = {
    "AnimateDiffPipeline": animatediff,
    "CogVideoXPipeline": cogvideox,
    "HunyuanVideoPipeline": hunyuan_video,
    "LTXPipeline": ltx,
    "MochiPipeline": mochi,
    "WanPipeline": wan,
}
