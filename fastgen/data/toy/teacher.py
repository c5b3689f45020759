"""The toy teacher: a stock `StableDiffusionPipeline` small enough for a CPU, with tokenizer, text encoder and VAE.

The denoiser is a `UNet2DConditionModel` on 8 x 8 latents with v-prediction on a cosine table of zero terminal signal, trained
with caption dropout for classifier-free guidance. The text encoder learns to name every attribute of the captioned scene
before the denoiser sees it, and goes on learning with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastgen.data.toy.autoencoder import LATENT_CHANNELS
from fastgen.data.toy.captions import caption
from fastgen.data.toy.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scenes, render, sample_scenes
from fastgen.data.toy.tokenizer import MAX_LENGTH, toy_tokenizer
from fastgen.process import VP

TEXT_WIDTH = 128
Report = Callable[[int, dict[str, float]], None]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of 0.4 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 4 M parameters: convolutions at 8 x 8, convolutions and cross-attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """A cosine table (Nichol and Dhariwal 2021) whose last entry is pure noise (Lin et al. 2024)."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        steps_offset=1,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_pipeline(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as one diffusers pipeline."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, MAX_LENGTH], padded as the pipeline pads them."""
    return tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids


class SceneHeads(nn.Module):
    """Linear readings of a scene's attributes from one text token: what the text encoder is pretrained to carry."""

    OBJECT: ClassVar = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "texture": len(TEXTURES)}
    WHOLE: ClassVar = {"count": 2, "axis": 2, "background": len(BACKGROUNDS)}

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(TEXT_WIDTH, sum(self.WHOLE.values()) + 2 * sum(self.OBJECT.values()))

    def loss(self, token: Tensor, scenes: Scenes) -> Tensor:
        """Cross-entropy of every attribute that the scene has, from `token` [B, TEXT_WIDTH]."""
        sizes = [*self.WHOLE.values(), *self.OBJECT.values(), *self.OBJECT.values()]
        parts = iter(self.linear(token).split(sizes, 1))
        second, always = scenes.count == 2, scenes.count > 0
        total = _masked(next(parts), scenes.count - 1, always)
        total = total + _masked(next(parts), scenes.axis, second) + _masked(next(parts), scenes.background, always)
        for i, present in ((0, always), (1, second)):
            for name in self.OBJECT:
                total = total + _masked(next(parts), getattr(scenes, name)[:, i], present)
        return total

    def read(self, hidden: Tensor, ids: Tensor, scenes: Scenes) -> Tensor:
        """The loss at the end token and at the last padding token of `hidden` [B, MAX_LENGTH, TEXT_WIDTH]."""
        end = hidden[torch.arange(len(ids)), (ids == ids[:, -1:]).int().argmax(1)]  # Captions are padded with end tokens.
        return self.loss(end, scenes) + self.loss(hidden[:, -1], scenes)


def _masked(logits: Tensor, label: Tensor, present: Tensor) -> Tensor:
    return (F.cross_entropy(logits, label, reduction="none") * present).sum() / present.sum().clamp_min(1)


def pretrain_text_encoder(updates: int, *, batch: int = 128, lr: float = 1e-3, seed: int = 0, report: Report) -> CLIPTextModel:
    """Teach the text encoder to carry the whole captioned scene at the end token and at the last padding token."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer, heads = toy_tokenizer(), SceneHeads()
    encoder = build_text_encoder(tokenizer)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates + 1, pct_start=0.1)
    for step in range(updates):
        scenes = sample_scenes(batch, generator)
        ids = tokenize(tokenizer, caption(scenes, generator))
        loss = heads.read(encoder(ids).last_hidden_state, ids, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, {"text": loss.item()})
    return encoder.eval()


@dataclass
class LatentPool:
    """Fresh training data in blocks: scenes drawn, encoded and captioned `size` at a time."""

    autoencoder: AutoencoderKL
    tokenizer: CLIPTokenizer
    generator: torch.Generator
    size: int = 8192

    @torch.no_grad()
    def fill(self) -> tuple[Tensor, Tensor, Scenes]:
        """Latents [size, 6, 8, 8], scaled as the pipeline scales them, token ids [size, MAX_LENGTH], and the scenes."""
        latents, ids, drawn = [], [], []
        for _ in range(self.size // 64):
            scenes = sample_scenes(64, self.generator)
            with torch.autocast("cpu", torch.bfloat16):
                mean = self.autoencoder.encode(render(scenes, self.generator)).latent_dist.mean.float()
            latents.append(mean * self.autoencoder.config.scaling_factor)
            ids.append(tokenize(self.tokenizer, caption(scenes, self.generator)))
            drawn.append(scenes)
        return torch.cat(latents), torch.cat(ids), Scenes.cat(drawn)

    def batches(self, batch: int, uses: int = 2) -> Iterator[tuple[Tensor, Tensor, Scenes]]:
        """Endless batches; every block is shuffled and used `uses` times."""
        while True:
            latents, ids, scenes = self.fill()
            for _ in range(uses):
                for index in torch.randperm(self.size, generator=self.generator).split(batch):
                    yield latents[index], ids[index], scenes[index]


def train_denoiser(
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    updates: int,
    *,
    start: StableDiffusionPipeline | None = None,
    batch: int = 64,
    lr: float = 1e-3,
    caption_dropout: float = 0.1,
    ema: float = 0.999,
    reading_weight: float = 0.05,
    pool: int = 8192,
    seed: int = 0,
    report: Report,
    checkpoint: Callable[[int, StableDiffusionPipeline], None] | None = None,
) -> StableDiffusionPipeline:
    """Train UNet and text encoder together on the v-prediction loss; returns a pipeline of their averaged weights.

    With `start`, its UNet, text encoder and tokenizer are trained on and `text_encoder` is not used. The learning rate rises
    for 200 updates and falls on a cosine to 0. `reading_weight` weighs the text encoder's pretraining task, which goes on
    beside: without it the encoder forgets which object is where long before the UNet asks for it, and two objects stand
    in either order. `checkpoint` is given the averaged pipeline every 1,000 updates.
    """
    torch.manual_seed(seed)
    tokenizer = start.tokenizer if start else toy_tokenizer()
    data = LatentPool(autoencoder, tokenizer, torch.Generator().manual_seed(seed), pool).batches(batch)
    unet, text_encoder = (start.unet, start.text_encoder) if start else (build_unet(), text_encoder)
    heads = SceneHeads()
    unet.set_attn_processor(AttnProcessor())  # Faster than the fused kernel for heads this small on a CPU.
    networks = nn.ModuleDict({"unet": unet, "text": text_encoder, "heads": heads}).float().train().requires_grad_(True)
    average = copy.deepcopy(networks).eval().requires_grad_(False)
    process = VP(build_scheduler().alphas_cumprod)
    optimizer = torch.optim.AdamW(networks.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.99))
    empty = tokenize(tokenizer, [""])
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / updates))
        latents, ids, scenes = next(data)
        kept = torch.rand(len(ids)) >= caption_dropout
        ids = torch.where(kept[:, None], ids, empty)
        t = process.snap(torch.rand(len(latents)))
        eps = torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = networks["text"](ids).last_hidden_state
            output = networks["unet"](process.add_noise(latents, eps, t), process.timestep(t), hidden).sample
        loss = F.mse_loss(output.float(), process.target("v", latents, eps, t))
        reading = heads.read(hidden[kept].float(), ids[kept], scenes[kept])
        optimizer.zero_grad()
        (loss + reading_weight * reading).backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - decay)
        report(step, {"denoiser": loss.item(), "reading": reading.item()})
        if checkpoint is not None and (step + 1) % 1000 == 0:
            checkpoint(step + 1, build_pipeline(autoencoder, average["text"], tokenizer, average["unet"]))
    return build_pipeline(autoencoder, average["text"], tokenizer, average["unet"])
