"""Tokenizers, text encoders and autoencoders for tiny pipelines: random weights, vocabularies of single letters, no files."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH = 32
LENGTH = 32
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


def clip(projection: bool = False, length: int = LENGTH) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        **{"vocab_size": len(clip_tokenizer()), "hidden_size": WIDTH, "intermediate_size": 37, "projection_dim": WIDTH},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": length},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def vae(channels: int, levels: int, **options: Any) -> AutoencoderKL:
    """Downsamples by 2 ** (levels - 1)."""
    return AutoencoderKL(
        **{"block_out_channels": (8,) * levels, "latent_channels": channels, "norm_num_groups": 4, "sample_size": 32},
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **options,
    ).eval()


SYMBOLS = ("<pad>", "</s>", "<unk>", *string.ascii_letters, *string.digits, *string.punctuation, " ", "\n")


class Letters(PreTrainedTokenizerFast):
    """Takes a processor's place too: it looks at no pictures."""

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> Any:
        return super().__call__(text, **options)


CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"


def letters(kind: Any = Letters, **options: Any) -> Any:
    """A language model's tokenizer: one token a character, and the end of the text."""
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT}
    return kind(tokenizer_object=tokenizer, **{"model_max_length": LENGTH, **special, **options})


def language_model(configuration: Any, model: Any, **options: Any) -> Any:
    """A decoder of two layers; `configuration` and `model` are classes of transformers."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": len(SYMBOLS)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return model(configuration(**{**shape, **heads, **tokens, **options}))


def bert(**options: Any) -> BertModel:
    shape = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=len(SYMBOLS), **{**shape, **options}))


def deep_compression(channels: int = 4) -> AutoencoderDC:
    """Sana's autoencoder; downsamples by 2."""
    blocks = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        **{"in_channels": 3, "latent_channels": channels, "attention_head_dim": 2, "scaling_factor": 0.41407},
        **{"encoder_block_types": blocks, "decoder_block_types": blocks},
        **{"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)},
        **{"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))},
        **{"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)},
        **{"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        **{"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
    )


def wan_vae(channels: int = 16) -> AutoencoderKLWan:
    """Wan's autoencoder of videos; downsamples by 8 in space and by 4 in time."""
    return AutoencoderKLWan(
        **{"base_dim": 3, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        temperal_downsample=[False, True, True],  # Spelt as in diffusers.
    )


def qwen_vision(version: int = 2, model: Any = None) -> Any:
    """Qwen 2.5 VL or Qwen 3 VL; its hidden states are the condition of many flow transformers."""
    configuration = Qwen2_5_VLConfig if version == 2 else Qwen3VLConfig
    sections = {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    text: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 8, "vocab_size": len(SYMBOLS)}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": sections, "pad_token_id": 0}
    if version == 3:
        text |= {"head_dim": 8}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    tokens = {"vision_start_token_id": 90, "vision_end_token_id": 91, "image_token_id": 92, "video_token_id": 93}
    usual = Qwen2_5_VLForConditionalGeneration if version == 2 else Qwen3VLForConditionalGeneration
    return (model or usual)(configuration(text_config=text, vision_config=sight, **tokens))


def qwen_vae(channels: int = 4) -> AutoencoderKLQwenImage:
    """Qwen-Image's autoencoder, which has an axis of frames; downsamples by 4."""
    return AutoencoderKLQwenImage(
        **{"base_dim": 6 * channels, "z_dim": channels, "dim_mult": [1, 2, 4], "num_res_blocks": 1},
        **{"temperal_downsample": [False, True], "latents_mean": [0.1] * channels, "latents_std": [1.5] * channels},
    )


def awake(network: Any, std: float = 0.2) -> Any:
    """The same network with random weights where it was made with zeros, which would let no block say anything."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return network
