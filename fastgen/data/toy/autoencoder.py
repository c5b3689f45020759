"""The toy world's autoencoder: a stock `AutoencoderKL` from 3 x 32 x 32 images to 6 x 8 x 8 latents, trained on endless renders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastgen.data.toy.scenes import IMAGE_SIZE, render, sample_scenes

LATENT_CHANNELS = 6
KL_WEIGHT = 5e-4


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of 0.9 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


def autoencoder_loss(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Squared and absolute error plus a small Kullback-Leibler term (Rombach et al. 2022, section 3.1), images in [-1, 1]."""
    posterior = autoencoder.encode(images).latent_dist
    difference = autoencoder.decode(posterior.sample()).sample.float() - images
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return difference.square().mean() + 0.5 * difference.abs().mean() + KL_WEIGHT * kl


def train_autoencoder(
    updates: int, *, batch: int = 32, lr: float = 2e-3, seed: int = 0, report: Callable[[int, dict[str, float]], None]
) -> AutoencoderKL:
    """Train from scratch; the returned model's `scaling_factor` brings latents to unit mean square."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = build_autoencoder()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr, weight_decay=0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates + 1, pct_start=0.05)
    for step in range(updates):
        images = render(sample_scenes(batch, generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = autoencoder_loss(autoencoder, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, {"autoencoder": loss.item()})
    autoencoder.eval()
    with torch.no_grad():
        latents = autoencoder.encode(render(sample_scenes(512, generator), generator)).latent_dist.mean
    autoencoder.register_to_config(scaling_factor=1 / latents.square().mean().sqrt().item())
    return autoencoder
