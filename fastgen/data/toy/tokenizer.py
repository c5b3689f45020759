"""The toy world's tokenizer: a stock CLIP tokenizer, its byte pairs merged until every word of the grammar is one token."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from fastgen.data.toy.captions import WORDS

MAX_LENGTH = 22
START, END = "<|startoftext|>", "<|endoftext|>"


def toy_tokenizer() -> CLIPTokenizer:
    """165 tokens; the end token has the largest id, as CLIP's pooling expects."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=[chr(c) for c in range(ord("a"), ord("z") + 1)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # Each word twice: byte pairs seen once are never merged.
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate(sorted(model["vocab"], key=model["vocab"].get))}
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH, pad_token=END)
