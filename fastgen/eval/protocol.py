"""The protocol record: everything that could change a result, and whether two results may be compared.

A record is a nest of plain values, one section for each kind of thing. Two results are compared only where all fields are the
same, but for those that cannot change a score (`HARMLESS`) and for what the comparison is about (`COMPARED`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from fastgen import __version__
from fastgen.errors import UserError
from fastgen.eval.features import features_hash, metric_layers, resize_mode
from fastgen.eval.measures.clip_score import clip_weights
from fastgen.eval.registry import Metric
from fastgen.eval.weights import file_hash
from fastgen.eval.world import TOY_FEATURES, World
from fastgen.pipelines.base import network_name

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "torch-fidelity", "open-clip-torch", "numpy", "pillow")
HARMLESS = ("machine", "time")
"""Sections that tell where and when: they cannot change a score."""
COMPARED = ("model", "sampler")
"""Sections that a comparison of two models is about."""
Difference = tuple[str, Any, Any]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> list[Difference]:
    """The fields in which two records differ, as (dotted name, value in a, value in b); a missing field is None.

    `ignore` names sections or fields that are passed over.
    """
    first, second, passed = _flat(a), _flat(b), tuple(ignore)
    names = sorted(first.keys() | second.keys())
    counted = (name for name in names if not any(name == each or name.startswith(f"{each}.") for each in passed))
    return [(name, first.get(name), second.get(name)) for name in counted if first.get(name) != second.get(name)]


def require_same(
    a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str] = ("A", "B"), ignore: Iterable[str] = ()
) -> None:
    """Raise UserError, naming the first field, where two results must not be compared.

    The metrics that both measured are looked at; what only one of them measured is not compared anyway.
    """
    shared = set(a.get("metrics", {})) & set(b.get("metrics", {}))
    first, second = ({**each, "metrics": {name: each["metrics"][name] for name in shared}} for each in (a, b))
    found = differences(first, second, ignore=(*HARMLESS, *COMPARED, *ignore))
    if not found:
        return
    (field, left, right), *others = found
    more = f", and so do {', '.join(name for name, _, _ in others)}" if others else ""
    left, right = (json.dumps(value, ensure_ascii=False) for value in (left, right))
    raise UserError(
        f"{names[0]} and {names[1]} cannot be compared, since their protocols differ: {field} is {left} in {names[0]} and "
        f"{right} in {names[1]}{more}; measure both in the same way"
    )


def _flat(nest: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nest.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def measuring(world: World, metrics: Iterable[Metric]) -> dict[str, Any]:
    """How is measured: metrics with their versions and networks, the world's networks with hash and resize, the libraries."""
    found = {}
    for entry in metrics:
        networks = {} if entry.networks is None else dict(entry.networks(world))
        found[entry.name] = {"version": entry.version, **({"networks": networks} if networks else {})}
    described = describe_world(world)
    return {
        "world": world.name,
        "metrics": found,
        "features": {
            "name": world.features,
            "sha256": described["features_sha256"],
            "layers": metric_layers(world),
            "resize": resize_mode(world),
        },
        "clip": {
            "name": world.clip,
            "sha256": described["clip_sha256"],
            "resize": "none" if world.clip == TOY_FEATURES else "as open_clip's preprocessing of the model does it, by Pillow",
        },
        "versions": described["versions"],
    }


def describe_world(world: World) -> dict[str, Any]:
    """The measuring networks with their hashes, and the versions of the libraries at work."""
    try:
        features = features_hash(world)
    except UserError:
        features = None
    clip = clip_weights(world)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "world": world.name,
        "features": world.features,
        "features_sha256": features,
        "clip": world.clip,
        "clip_sha256": None if clip is None or not clip.is_file() else file_hash(clip),
        "versions": {"fastgen": __version__, **versions},
    }


def asking(
    prompts: Sequence[str], seeds: Sequence[int], *, name: str, reference: tuple[int | None, str] | None, resize: str = "none"
) -> dict[str, Any]:
    """What is asked of a model, and what its images are compared with.

    `name` says where the prompts are from; `reference` is the number and the hash of the real images, `resize` what is done to
    them when they are read.
    """
    listed = json.dumps([list(prompts), list(seeds)], ensure_ascii=False)
    return {
        "images": {"count": len(prompts)},
        "prompts": {
            "from": name,
            "different": len(set(prompts)),
            "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        },
        "seeds": {"first": min(seeds), "last": max(seeds), "sha256": hashlib.sha256(listed.encode()).hexdigest()},
        "reference": {
            "count": None if reference is None else reference[0],
            "sha256": None if reference is None else reference[1],
            "resize": resize,
        },
    }


def computing(device: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """How images are computed, and on which machine."""
    return {
        "computation": {"precision": str(dtype).removeprefix("torch."), "device": device.split(":")[0], "batch": batch},
        "machine": {"device": device_name(device), "threads": torch.get_num_threads(), "system": platform.system()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.processor() or platform.machine()}"


def sampling(pipeline: DiffusionPipeline, steps: int | None, guidance: float | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler (scheduler and call) and the attention kernels of a pipeline."""
    scheduler = {"class": type(pipeline.scheduler).__name__, "config": plain_config(pipeline.scheduler)}
    plain = json.loads(json.dumps(dict(call), default=repr))
    return {
        "sampler": {"scheduler": scheduler, "steps": steps, "guidance": guidance, "call": plain},
        "attention": attention(pipeline),
    }


def attention(pipeline: DiffusionPipeline) -> str:
    """The attention kernels that the network calls, whatever the classes are that call them."""
    network = getattr(pipeline, network_name(pipeline))
    own = (getattr(module, "processor", None) for module in network.modules())
    processors = getattr(network, "attn_processors", {}).values() or [each for each in own if each is not None]
    return ", ".join(sorted({_kernel(each) for each in processors})) or "unknown"


def _kernel(processor: Any) -> str:
    name, code = type(processor).__name__, getattr(inspect.unwrap(type(processor).__call__), "__code__", None)
    chosen = getattr(processor, "_attention_backend", None)
    if chosen is None and "dispatch_attention_fn" in getattr(code, "co_names", ()):
        chosen = _AttentionBackendRegistry.get_active_backend()[0]
    if chosen is not None:
        return str(getattr(chosen, "value", chosen))
    marks = {"Sliced": "sliced", "XFormers": "xformers", "2_0": "native"}
    return next((kernel for mark, kernel in marks.items() if mark in name), "unfused")


def plain_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's settings as plain values."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_") and name != "trained_betas"}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=repr))
    return plain


def describe_pipeline(pipeline: DiffusionPipeline, folder: Path | None) -> dict[str, Any]:
    """Class, scheduler with its whole config, and the hash of every weight file of the folder."""
    scheduler = pipeline.scheduler
    files = [] if folder is None else sorted(folder.rglob("*.safetensors"))
    return {
        "pipeline": type(pipeline).__name__,
        "scheduler": {"class": type(scheduler).__name__, **plain_config(scheduler)},
        "weights_sha256": {str(path.relative_to(folder)): file_hash(path) for path in files if folder is not None},
    }
