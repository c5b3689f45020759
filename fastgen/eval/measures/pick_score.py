"""PickScore: a CLIP trained on what users of Pick-a-Pic picked (Kirstain et al. 2023, arXiv:2305.01569).

transformers' CLIPModel of ViT-H/14's sizes with model.safetensors of yuvalkirstain/PickScore_v1 (code MIT). The score is the
authors' exp(logit_scale) x cosine, about 17 to 24: a difference of d between two pictures of a prompt says that the higher one
is picked with the odds exp(d). Preprocessing (by Pillow) and tokens are CLIP's, those of the authors' processor
laion/CLIP-ViT-H-14-laion2B-s32B-b79K; open_clip brings both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastgen.eval.networks.hub import filled
from fastgen.eval.networks.towers import Tokenizer, by_pillow, cosines, hash_at_hand, note_cut_prompts
from fastgen.eval.registry import Evidence, Reading, Score, metric
from fastgen.eval.weights import Weights, locate, read_tensors
from fastgen.eval.world import World

WEIGHTS = Weights("model.safetensors", "yuvalkirstain/PickScore_v1")
CONTEXT = 77
BATCH = 32
TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
          "image_size": 224, "hidden_act": "gelu"}  # fmt: skip


@dataclass(frozen=True)
class PickScore:
    """The network with CLIP's tokens and preprocessing."""

    model: Any
    preprocess: Callable[[Tensor], Tensor]
    tokenizer: Tokenizer
    device: str
    name: str = "PickScore"
    context: int = CONTEXT

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of uint8 pictures [B, 3, H, W]."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images).to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled)).float().cpu()

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D] of prompts. What stands behind a prompt's end is not looked at, so that padding is any."""
        pooled = self.model.text_model(input_ids=self.tokenizer(list(prompts)).to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled)).float().cpu()

    @property
    def scale(self) -> float:
        """What a cosine is multiplied with."""
        return float(self.model.logit_scale.exp())


@lru_cache(maxsize=1)
def load(world: World, device: str = "cpu") -> PickScore:
    """The network. Raises UserError where its file is missing or is something else."""
    path = locate(WEIGHTS, world, what="PickScore")
    return build(read_tensors(path), path, device)


def build(
    tensors: Mapping[str, Tensor],
    path: Path,
    device: str = "cpu",
    *,
    text: Mapping[str, Any] = TEXT,
    vision: Mapping[str, Any] = VISION,
    width: int = 1024,
) -> PickScore:
    """PickScore of the tensors of its file. Raises UserError where they do not fit the sizes."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    config = CLIPConfig(text_config=dict(text), vision_config=dict(vision), projection_dim=width)
    model = filled(CLIPModel, config, weights, path).to(device)
    transform = image_transform_v2(PreprocessCfg(size=vision["image_size"]), is_train=False)
    return PickScore(model, by_pillow(transform), open_clip.SimpleTokenizer(context_length=CONTEXT), device)


@metric(
    "pick_score",
    needs=("images", "prompts"),
    readings={"pick_score": Reading("PickScore", best="high")},
    worlds=("photo",),
    usual=False,
    networks=lambda world: {WEIGHTS.origin: hash_at_hand(WEIGHTS, world)},
)
def pick_score(evidence: Evidence) -> dict[str, Score]:
    """Mean PickScore of the images."""
    assert evidence.prompts is not None
    prompts, model = list(evidence.prompts), load(evidence.world, evidence.device)
    note_cut_prompts(evidence, prompts, model)
    return {"pick_score": Score.mean(model.scale * cosines(model, evidence.images, prompts, BATCH))}
