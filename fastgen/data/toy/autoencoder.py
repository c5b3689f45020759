"""The toy world's autoencoder: a stock `AutoencoderKL` from 3 x 32 x 32 images to 6 x 8 x 8 latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastgen.data.toy.scenes import IMAGE_SIZE, render, sample_scenes

LATENT_CHANNELS = 6


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


def autoencoder_loss(autoencoder: AutoencoderKL, images: Tensor, kl_weight: float) -> Tensor:
    """Squared and absolute error plus a small Kullback-Leibler term (Rombach et al. 2022, section 3.1), images in [-1, 1]."""
    posterior = autoencoder.encode(images).latent_dist
    difference = autoencoder.decode(posterior.sample()).sample.float() - images
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return difference.square().mean() + 0.5 * difference.abs().mean() + kl_weight * kl


def train_autoencoder(
    updates: int,
    *,
    start: AutoencoderKL | None = None,
    decoder_only: bool = False,
    batch: int = 24,
    lr: float = 1.5e-3,
    kl_weight: float = 2e-5,
    seed: int = 0,
    report: Callable[[int, dict[str, float]], None],
) -> AutoencoderKL:
    """Train from scratch or on from `start`, with a learning rate falling linearly; the latents are scaled to unit mean square.

    With `decoder_only` the latents stay as they are, so that a denoiser trained on them keeps its meaning.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    autoencoder = (start or build_autoencoder()).train().requires_grad_(True)
    if decoder_only:
        autoencoder.encoder.requires_grad_(False)
        autoencoder.quant_conv.requires_grad_(False)
    weights = [weight for weight in autoencoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=0, betas=(0.9, 0.99))
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / updates)
        images = render(sample_scenes(batch, generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = autoencoder_loss(autoencoder, images, 0 if decoder_only else kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        report(step, {"autoencoder": loss.item()})
    autoencoder.eval().requires_grad_(False)
    if not decoder_only:
        with torch.no_grad():
            latents = autoencoder.encode(render(sample_scenes(512, generator), generator)).latent_dist.mean
        autoencoder.register_to_config(scaling_factor=1 / latents.square().mean().sqrt().item())
    return autoencoder
