"""Images from any stock diffusers pipeline, with noise that depends on nothing but the prompt and the seed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.images import to_uint8
from fastgen.pipelines.gamma_flow import own_class
from fastgen.pipelines.loading import check_index


def load_pipeline(folder: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionPipeline:
    """Load a diffusers folder without the network. Raises UserError when it is none or a part of it cannot be read."""
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        options |= check_index(folder, as_teacher=False)
        kind = own_class(folder, as_teacher=False) or DiffusionPipeline
        pipeline = kind.from_pretrained(str(folder), **options)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"the diffusers pipeline in {folder} cannot be loaded: {error}") from error
    return pipeline.to(device)


def noise_seed(prompt: str, seed: int) -> int:
    """The random seed of one image: a hash of its prompt and seed, so that neither batch size nor order changes an image."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 64,
    call: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One image for each prompt and seed: uint8 [N, 3, H, W].

    `steps` and `guidance` (diffusers convention, 1 = off) are the pipeline's own defaults when None; `call` holds further
    arguments for its `__call__`. `progress(done, total)` is called after each batch.

    Raises UserError for lists of different length, steps below 1, an argument the pipeline does not take, and images with NaN.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise UserError(f"every image needs a prompt and a seed, but there are {len(prompts)} prompts and {len(seeds)} seeds")
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, **(call or {})}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    accepted = inspect.signature(pipeline.__call__).parameters
    for name in arguments:
        if name not in accepted:
            raise UserError(f"{type(pipeline).__name__} takes no argument {name!r}")
    bar = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    images = []
    try:
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            drawn = [noise_seed(p, s) for p, s in zip(part, seeds[start : start + batch], strict=True)]
            generators = [torch.Generator().manual_seed(number) for number in drawn]
            made = pipeline(prompt=part, generator=generators, output_type="pt", **arguments).images
            images.append(to_uint8(made.float().cpu() * 2 - 1))
            if progress is not None:
                progress(min(start + batch, len(prompts)), len(prompts))
    finally:
        pipeline.set_progress_bar_config(**bar)
    return torch.cat(images)
