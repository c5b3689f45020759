"""Prompts and pictures encoded through a cache, and what an encoding depends on.

A component is told by its configuration and a digest of its weights as they are in memory, so an encoder with a LoRA fused
into it, or in another precision, is another one.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from fastgen import __version__
from fastgen.data.cache import Cache, Rows, digest
from fastgen.data.images import to_tensor
from fastgen.data.pictures import BadSamples, Picture, identities
from fastgen.data.readers import Readers
from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.pipelines.base import Pipeline

__all__ = [
    "at_once",
    "cache_prompts",
    "encode_pictures",
    "encode_prompts",
    "free_text_encoders",
    "made_with",
    "text_components",
]

CHUNK = 64
PIXELS_AT_ONCE = 2**20
NO_TEXT = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "scheduler")


def at_once(size: tuple[int, int]) -> int:
    """How many pictures of `size` (height, width) an autoencoder is given together; one of 1024 x 1024 takes gigabytes."""
    return max(1, min(CHUNK, PIXELS_AT_ONCE // (size[0] * size[1])))


@torch.no_grad()
def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Condition:
    """The conditions of `prompts`, encoded a batch at a time and kept on the CPU.

    `size` (height, width) in pixels is the pipeline's own by default.
    """
    options = {} if size is None else {"height": size[0], "width": size[1]}
    parts = [list(prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)]
    return Condition.cat([pipeline.encode_prompts(part, **options).to("cpu") for part in parts])


def cache_prompts(
    pipeline: Pipeline,
    prompts: Sequence[str],
    cache: str,
    *,
    size: tuple[int, int] | None = None,
    rank: int = 0,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
) -> Rows:
    """The conditions of `prompts`, as of `encode_prompts`, in the folder `cache`."""
    shelf = Cache(cache, "prompts", {**made_with(pipeline, text_components(pipeline)), "size": size})

    def encode(index: list[int]) -> Condition:
        return encode_prompts(pipeline, [prompts[i] for i in index], size=size)

    return shelf.fill([digest(prompt) for prompt in prompts], encode, rank=rank, processes=processes, say=say)


@torch.no_grad()
def encode_pictures(
    pipeline: Pipeline,
    pictures: Sequence[Picture],
    size: tuple[int, int],
    cache: str | None,
    *,
    readers: Readers,
    bad: BadSamples,
    rank: int = 0,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
) -> tuple[Tensor | Rows, list[int]]:
    """The latents of pictures scaled and cropped to `size` (height, width), in memory or in the folder `cache`, and the
    positions of those that there are latents of: all, but for those that `bad` was told of.
    """
    left_out: set[int] = set()
    number = at_once(size)

    def encode(index: list[int]) -> Condition | None:
        parts: list[Tensor] = []
        waiting: list[np.ndarray] = []
        for i, found in zip(index, readers.read((pictures[i] for i in index), size), strict=True):
            if isinstance(found, UserError):
                bad.add(found)
                left_out.add(i)
            else:
                waiting.append(found)
            if len(waiting) == number or (waiting and i == index[-1]):
                parts.append(pipeline.encode(to_tensor(waiting).to(pipeline.device)).cpu())
                waiting = []
        return Condition({"latents": torch.cat(parts)}) if parts else None

    everything = range(len(pictures))
    if cache is None:
        found = encode(list(everything))
        latents: Tensor | Rows = torch.empty(0) if found is None else found.inputs["latents"]
    else:
        names = [name for name, part in pipeline.diffusers.components.items() if isinstance(part, nn.Module)]
        names = [name for name in names if "vae" in name or pipeline.diffusers.components[name] is pipeline.autoencoder]
        shelf = Cache(cache, "latents", {**made_with(pipeline, names), "size": size})
        keys = [digest(list(each)) for each in identities(pictures)]
        latents = shelf.fill(keys, encode, left_out=left_out, rank=rank, processes=processes, say=say)
    return latents, [i for i in everything if i not in left_out]


# -- what an encoding depends on ---------------------------------------------------------------------


def text_components(pipeline: Pipeline) -> list[str]:
    """The pipeline's components that a condition may depend on: encoders, tokenizers, and whatever else has no other part."""
    return [
        name
        for name, part in pipeline.diffusers.components.items()
        if part is not None and not name.startswith(NO_TEXT) and name != pipeline.network_name
    ]


def made_with(pipeline: Pipeline, components: Sequence[str]) -> dict[str, Any]:
    """Everything besides prompt or picture that an encoding by `components` depends on, as JSON.

    The network's configuration counts (pipelines take sizes and lengths from it), its weights do not.
    """
    parts = pipeline.diffusers.components
    options = {key: value for key, value in dict(pipeline.diffusers.config).items() if key not in parts and key[0] != "_"}
    return {
        "pipeline": type(pipeline.diffusers).__name__,
        "options": json.loads(json.dumps(options, default=str)),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "fastgen": __version__,
        "form": digest(json.loads(json.dumps(asdict(pipeline.form), default=str))),
        "network": digest(configuration(pipeline.network)),
        "resolution": [pipeline.height, pipeline.width],
        "latents": list(pipeline.latent_shape),
        "components": {name: fingerprint(parts[name]) for name in components},
    }


def fingerprint(component: Any) -> str:
    """A digest of a model or a tokenizer: class, configuration, and weights or vocabulary."""
    described: dict[str, Any] = {"class": type(component).__name__, "config": configuration(component)}
    if isinstance(component, nn.Module):
        described["weights"] = weights_digest(component)
    if hasattr(component, "get_vocab"):
        described["vocabulary"] = digest(component.get_vocab())
        described["special"] = {key: str(value) for key, value in component.special_tokens_map.items()}
        for key in ("model_max_length", "padding_side", "truncation_side", "chat_template"):
            described[key] = getattr(component, key, None)
        backend = getattr(component, "backend_tokenizer", None)
        if backend is not None:  # Padding and truncation in it are left over from the last call.
            rules = json.loads(backend.to_str())
            described["rules"] = digest({key: value for key, value in rules.items() if key not in ("padding", "truncation")})
    return digest(described)


def configuration(component: Any) -> dict[str, Any]:
    """A component's configuration without what only tells where it came from."""
    config: Any = getattr(component, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return {key: value for key, value in values.items() if key[0] != "_" and key != "transformers_version"}


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's own weights, names, shapes and precision, whatever adapters are on it."""
    total = hashlib.blake2b(digest_size=16)
    own = {name.replace(".base_layer", ""): value for name, value in module.state_dict().items() if ".lora_" not in name}
    for name, value in sorted(own.items()):
        if not isinstance(value, Tensor):
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        raw = value.detach().cpu().contiguous().reshape(-1)
        total.update(raw.view(torch.uint8).numpy().data)
    return total.hexdigest()


# -- freeing -----------------------------------------------------------------------------------------


def free_text_encoders(pipeline: Pipeline) -> int:
    """Let go of the pipeline's text encoders, which have done their work; the number of weights that were freed.

    After this `encode_prompts` does not work any more; conditions that exist, null twins included, do.
    """
    whole = getattr(pipeline, "diffusers", None)
    parts = whole.components if whole is not None else {}
    found = {name: part for name, part in parts.items() if name.startswith("text_encoder") and isinstance(part, nn.Module)}
    freed = sum(weight.numel() for part in found.values() for weight in part.parameters())
    if whole is not None:
        whole.register_modules(**dict.fromkeys(found))
    del parts, found
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return freed
