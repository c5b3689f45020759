"""Tokenizers, text encoders and autoencoders for tiny pipelines: random weights, vocabularies of single letters, no files."""

from __future__ import annotations

import string
from typing import Any

from diffusers import AutoencoderKL
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
