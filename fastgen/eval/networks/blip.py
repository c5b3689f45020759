"""ImageReward's network: BLIP's picture encoder, its text encoder that looks at the picture, and a head on the first token.

Xu et al. 2023 (arXiv:2304.05977); BLIP: Li et al. 2022 (arXiv:2201.12086). The networks are transformers' BLIP classes, the
same as ImageReward's under other names: `new_name` tells which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from fastgen.errors import UserError
from fastgen.eval.networks.heads import linear_head
from fastgen.eval.networks.hub import filled
from fastgen.eval.networks.towers import by_pillow

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the training set: scores are given in units of its deviation."""
CONTEXT = 35
"""How many tokens of a prompt ImageReward reads."""
VISION = {"image_size": 224, "patch_size": 16, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
          "intermediate_size": 4096, "layer_norm_eps": 1e-6}  # fmt: skip
TEXT = {"vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "encoder_hidden_size": 1024, "max_position_embeddings": 512, "layer_norm_eps": 1e-12}  # fmt: skip
HEAD = tuple(f"mlp.layers.{i}" for i in (0, 2, 4, 6, 7))
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Tensors that take part in BLIP's pre-training alone, and a buffer that counts."""
RENAMED = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
)
Tensors = dict[str, Tensor]


class ImageRewardNetwork(nn.Module):
    """Pixels [B, 3, 224, 224] and tokens [B, L] with their mask to scores [B]."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        patches = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        mark: Tensor = self.head(read[:, 0]).squeeze(1)
        return (mark - MEAN) / DEVIATION


@dataclass(frozen=True)
class ImageReward:
    """The network with its tokenizer and its preprocessing of uint8 pictures [B, 3, H, W]."""

    network: ImageRewardNetwork
    wordpieces: BertWordPieceTokenizer
    preprocess: Callable[[Tensor], Tensor]
    device: str
    name: str = "ImageReward"
    context: int = CONTEXT

    def tokens(self, prompts: Sequence[str], context: int = CONTEXT) -> tuple[Tensor, Tensor]:
        """Token numbers and mask [B, context], filled up with padding and cut off behind."""
        self.wordpieces.enable_truncation(context)
        self.wordpieces.enable_padding(length=context)
        found = self.wordpieces.encode_batch(list(prompts))
        return torch.tensor([each.ids for each in found]), torch.tensor([each.attention_mask for each in found])

    def tokenizer(self, prompts: Sequence[str], context: int = CONTEXT) -> Tensor:
        """Token numbers alone."""
        return self.tokens(prompts, context)[0]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of uint8 pictures [B, 3, H, W] and their prompts."""
        given = (self.preprocess(images), *self.tokens(prompts))
        scores: Tensor = self.network(*(each.to(self.device) for each in given))
        return scores.float().cpu()


def build(
    tensors: Tensors,
    path: Path,
    vocabulary: Path,
    device: str = "cpu",
    *,
    vision: Mapping[str, Any] = VISION,
    text: Mapping[str, Any] = TEXT,
) -> ImageReward:
    """ImageReward of the tensors of its released file and BERT's vocabulary.

    Raises UserError where tensors are missing, left over, or of another shape than `vision` and `text` say.
    """
    seeing, reading, marking = sorted_out(tensors, path)
    network = ImageRewardNetwork(
        filled(BlipVisionModel, BlipVisionConfig(**vision), seeing, path),
        # With "is_decoder" the layers look at the picture; its masks are still of both directions.
        filled(
            BlipTextModel,
            BlipTextConfig(**text, is_decoder=True, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
            reading,
            path,
            add_pooling_layer=False,
            attn_implementation="eager",
        ),
        linear_head(marking, HEAD, path, width=text["hidden_size"]),
    )
    wordpieces = BertWordPieceTokenizer(vocab=str(vocabulary), lowercase=True)
    return ImageReward(network.eval().to(device), wordpieces, by_pillow(pixels(vision["image_size"])), device)


def pixels(size: int) -> Compose:
    """ImageReward's own preprocessing of a Pillow picture: the shorter side to `size` (bicubic), the square in the middle."""
    normalise = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    return Compose([Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size), ToTensor(), normalise])


def sorted_out(tensors: Tensors, path: Path) -> tuple[Tensors, Tensors, Tensors]:
    """The tensors of the picture encoder and of the text encoder under transformers' names, and those of the head.

    Raises UserError for a name that is not ImageReward's.
    """
    parts: dict[str, Tensors] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            continue
        prefix = next((each for each in parts if name.startswith(each)), None)
        if prefix is None:
            raise UserError(f"{path} does not hold ImageReward: {name} is not one of its tensors")
        parts[prefix][new_name(name)] = tensor
    seeing, reading, marking = parts.values()
    return seeing, reading, marking


def new_name(name: str) -> str:
    """transformers' name of one of ImageReward's tensors; the head keeps its own."""
    if name.startswith("blip.text_encoder."):
        return name.removeprefix("blip.text_encoder.")
    if not name.startswith("blip.visual_encoder."):
        return name
    name = name.removeprefix("blip.visual_encoder.")
    if name.startswith("norm."):
        return "post_layer" + name
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name
