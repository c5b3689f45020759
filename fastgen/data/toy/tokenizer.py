"""The toy world's tokenizer: a stock CLIP tokenizer with one token for each word of the grammar."""

from __future__ import annotations

from transformers import CLIPTokenizer

from fastgen.data.toy.captions import WORDS

MAX_LENGTH = 22
START, END = "<|startoftext|>", "<|endoftext|>"


def toy_tokenizer(max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """The same in every process; the end token has the largest id, as CLIP's pooling expects.

    Byte pairs are merged from the front of one word after the other. A later merge ranks lower and so cannot break a word that
    is one token already. (The trainer of `tokenizers` orders its alphabet differently each time.)
    """
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            for i in range(len(parts) - 1, 0, -1):
                if (parts[i - 1], parts[i]) == pair:
                    parts[i - 1 : i + 1] = ["".join(pair)]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary += [START, END]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_length, pad_token=END)
