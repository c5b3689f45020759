"""A diffusers pipeline from its configuration files alone: every network has its shapes and none of its weights."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.pipelines.base import network_name
from fastgen.plan.ledger import Ledger, empty

__all__ = ["build", "guess", "stow"]


def build(folder: Path, dtype: torch.dtype, ledger: Ledger) -> Any:
    """The pipeline of `folder`, within `ledger`. Tokenizers and scheduler are read as usual.

    Raises UserError for a component whose configuration cannot be read.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    networks: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not isinstance(entry[0], str) or name == "safety_checker":
            continue
        kind = component_class(*entry)
        if kind is not None and issubclass(kind, nn.Module):
            networks[name] = network(kind, folder / name, dtype, ledger)
    extra = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=False, **networks, **extra)


def component_class(library: str, name: str) -> type | None:
    """The class that an entry of model_index.json names, None where this installation has none."""
    known = library in ("diffusers", "transformers")
    module = importlib.import_module(library) if known else getattr(diffusers.pipelines, library, None)
    found = getattr(module, name, None)
    return found if isinstance(found, type) else None


def network(kind: Any, folder: Path, dtype: torch.dtype, ledger: Ledger) -> nn.Module:
    """One network, of weights in `dtype`, from its config.json."""
    before = torch.get_default_dtype()
    try:
        if hasattr(kind, "load_config"):
            config = kind.load_config(folder)
        else:
            config = kind.config_class.from_pretrained(folder)
            config.dtype = dtype
        torch.set_default_dtype(dtype)
        with ledger:
            made: Any = kind.from_config(config) if hasattr(kind, "load_config") else kind(config)
            if hasattr(made, "tie_weights"):
                made.tie_weights()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{folder / 'config.json'} does not describe a {kind.__name__}: {reason}") from problem
    finally:
        torch.set_default_dtype(before)
    assert ledger.hollow is not None
    empty(made, ledger.hollow)
    for weight in made.parameters():
        ledger.enter(weight)
    whole: nn.Module = made.eval()
    return whole


def stow(component: nn.Module, ledger: Ledger) -> None:
    """Count the weights of every layer of `component` only while it runs, as group offload has them on the device."""

    def come(layer: nn.Module, *_: Any) -> None:
        for weight in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            ledger.enter(weight)

    def go(layer: nn.Module, *_: Any) -> None:
        for weight in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            ledger.leave(weight)

    for layer in component.modules():
        go(layer)
        layer.register_forward_pre_hook(come)
        layer.register_forward_hook(go)


def guess(pipeline: Any) -> Callable[[], None]:
    """Let the denoising network answer at random, with values, until the function returned is called.

    How a pipeline guides is learnt from what it does to its network's answers, so those need values.
    """
    denoiser = getattr(pipeline, network_name(pipeline))
    forward = denoiser.forward

    @functools.wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        return tuple(noise(each) for each in result) if isinstance(result, tuple) else type(result)(sample=noise(result.sample))

    denoiser.forward = answer
    return lambda: delattr(denoiser, "forward")


def noise(tensor: Tensor) -> Tensor:
    values: Tensor = torch.randn(tuple(tensor.shape), generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    return values
