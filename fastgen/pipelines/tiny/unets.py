"""Tiny random pipelines around a UNet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DreamLiteMobilePipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IFPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMTextToImagePipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.pag.pipeline_pag_kolors import KolorsPAGPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from fastgen.pipelines.tiny.encoders import (
    LENGTH,
    SYMBOLS,
    WIDTH,
    Letters,
    clip,
    clip_tokenizer,
    letters,
    qwen_vision,
    t5,
    t5_tokenizer,
    vae,
)

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


def latent_consistency() -> LatentConsistencyModelPipeline:
    """A latent consistency model: the guidance scale is an input of the UNet."""
    return LatentConsistencyModelPipeline(
        **(sd15(scheduler=LCMScheduler(**BETAS), time_cond_proj_dim=16).components | {"scheduler": LCMScheduler(**BETAS)}),
        requires_safety_checker=False,
    )


def sd15_perturbed() -> StableDiffusionPAGPipeline:
    return StableDiffusionPAGPipeline(**sd15(scheduler=ddim()).components, requires_safety_checker=False)


def sdxl_perturbed() -> StableDiffusionXLPAGPipeline:
    return StableDiffusionXLPAGPipeline(**sdxl().components, add_watermarker=False)


def ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, steps_offset=1, **options)


def latent_diffusion() -> LDMTextToImagePipeline:
    """The first latent diffusion model (Rombach et al. 2022): its autoencoder is called vqvae, its text encoder bert."""
    return LDMTextToImagePipeline(
        vqvae=vae(4, 4), bert=clip(length=77), tokenizer=clip_tokenizer(), unet=unet(), scheduler=ddim()
    )


def deepfloyd() -> IFPipeline:
    """DeepFloyd IF, stage one: it denoises pixels."""
    types = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
    types |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    network = unet(3, 64, out_channels=6, mid_block_type="UNetMidBlock2DSimpleCrossAttn", **types)
    scheduler = DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2")
    return IFPipeline(
        **{"tokenizer": t5_tokenizer(), "text_encoder": t5(), "unet": network, "scheduler": scheduler},
        **{"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False},
    )


def kandinsky3() -> Kandinsky3Pipeline:
    """Kandinsky 3: a UNet of its own over a MoVQ autoencoder."""
    network = Kandinsky3UNet(
        **{"in_channels": 4, "time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4, "layers_per_block": 3},
        **{"block_out_channels": (32, 64), "cross_attention_dim": 4, "encoder_hid_dim": WIDTH},
    )
    movq = VQModel(
        **{"block_out_channels": (32, 32, 32, 64), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8},
        **{"norm_type": "spatial", "num_vq_embeddings": 12, "vq_embed_dim": 4},
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    )
    return Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), unet=network, scheduler=DDPMScheduler(**BETAS, steps_offset=1), movq=movq
    )


def unclip() -> StableUnCLIPPipeline:
    """Stable unCLIP: a prior makes an image embedding from the prompt, and a v-prediction UNet draws it."""
    network = unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1, num_embeddings=LENGTH
    )
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    prior_scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return StableUnCLIPPipeline(
        prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=clip(projection=True),
        prior=prior,
        prior_scheduler=prior_scheduler,
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=DDPMScheduler(**cosine),
        tokenizer=clip_tokenizer(),
        text_encoder=clip(),
        unet=network,
        scheduler=ddim(prediction_type="v_prediction"),
        vae=vae(4, 4),
    )


class _Positioned(Letters):
    """ChatGLM's tokenizer also counts the positions."""

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> Any:
        answer = super().__call__(text, **options)
        answer["position_ids"] = (answer["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return answer


def kolors(pipeline: Any = KolorsPipeline) -> Any:
    """Kolors: SDXL's UNet under ChatGLM's hidden states, the last of which is the pooled embedding."""
    text = {"num_layers": 2, "padded_vocab_size": len(SYMBOLS), "hidden_size": WIDTH, "ffn_hidden_size": 37, "kv_channels": 8}
    text |= {
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "original_rope": True,
        "use_cache": False,
    }
    encoder = ChatGLMModel(ChatGLMConfig(**text))
    for weight in encoder.parameters():  # They come uninitialised.
        torch.nn.init.normal_(weight, std=0.1) if weight.ndim > 1 else torch.nn.init.ones_(weight)
    options: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    options |= {"projection_class_embeddings_input_dim": 6 * 8 + WIDTH, "use_linear_projection": True}
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    return pipeline(
        **{"vae": vae(4, 4, scaling_factor=0.13025), "unet": unet(**options), "scheduler": scheduler},
        **{"text_encoder": encoder, "tokenizer": letters(_Positioned, padding_side="left")},
    )


def kolors_perturbed() -> KolorsPAGPipeline:
    return kolors(KolorsPAGPipeline)


def dreamlite(pipeline: Any = DreamLitePipeline) -> Any:
    """DreamLite: a small flow UNet under Qwen 3 VL's hidden states, which edits pictures too."""
    network = DreamLiteUNetModel(
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "cross_attention_dim": WIDTH},
        **{"attention_head_dim": 8, "layers_per_block": 1, "norm_num_groups": 8, "transformer_layers_per_block": 1},
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    )
    autoencoder = AutoencoderTiny(
        **{"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32), "latent_channels": 4},
        **{"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    )
    return pipeline(
        **{"text_encoder": qwen_vision(3), "tokenizer": letters(), "processor": letters()},
        **{"vae": autoencoder, "unet": network, "scheduler": FlowMatchEulerDiscreteScheduler()},
    )


def dreamlite_mobile() -> DreamLiteMobilePipeline:
    return dreamlite(DreamLiteMobilePipeline)


BUILDERS = {
    "DreamLiteMobilePipeline": dreamlite_mobile,
    "DreamLitePipeline": dreamlite,
    "IFPipeline": deepfloyd,
    "Kandinsky3Pipeline": kandinsky3,
    "KolorsPAGPipeline": kolors_perturbed,
    "KolorsPipeline": kolors,
    "LDMTextToImagePipeline": latent_diffusion,
    "LatentConsistencyModelPipeline": latent_consistency,
    "StableDiffusionPAGPipeline": sd15_perturbed,
    "StableDiffusionPipeline": sd15,
    "StableDiffusionXLPAGPipeline": sdxl_perturbed,
    "StableDiffusionXLPipeline": sdxl,
    "StableUnCLIPPipeline": unclip,
}
