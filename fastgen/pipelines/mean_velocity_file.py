"""A pipeline file for a network that is told where its steps end, as students of MeanFlow and shortcut models are.

The scheduler is a stock one that follows the ODE, since a step along the mean velocity is its step. Exports bring the file as
`pipeline.py`, and beside it the weights of the second time input; it needs diffusers, torch and safetensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WEIGHTS = "end_time.safetensors"

TEMPLATE = '''"""{stock} for a network that is told where each of its steps ends (MeanFlow, Geng et al. 2025).

`{weights}` holds an embedding of how far a step goes, which is added to the network's own embedding of the time.
"""

import functools
import os

import torch
from diffusers import {stock}
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

NETWORK, PLACE = {network!r}, {place!r}
SPANS = {spans!r}


def embedding(weights, span):
    """One row of the embedding of a step's length."""
    phase = span * weights["rates"]
    hidden = torch.cat([phase.sin(), phase.cos()]) @ weights["enter.weight"].T + weights["enter.bias"]
    return torch.nn.functional.silu(hidden) @ weights["leave.weight"].T + weights["leave.bias"]


class {name}({stock}):
    def register_to_config(self, **values):
        super().register_to_config(**values)
        if home := values.get("_name_or_path"):  # Where it is loaded from: a folder, or else a repository of the hub.
            path = os.path.join(home, {weights!r}) if os.path.isdir(home) else hf_hub_download(home, {weights!r})
            self._step_weights = load_file(path)

    @functools.wraps({stock}.__call__)
    def __call__(self, *args, **kwargs):
        weights, scheduler, taken = self._step_weights, self.scheduler, []
        follow = scheduler.step

        @functools.wraps(follow)
        def step(*args, **kwargs):
            taken.append(True)
            return follow(*args, **kwargs)

        def tell(module, inputs, output):
            if len(scheduler.timesteps) != len(SPANS):
                raise ValueError(f"this student takes {{len(SPANS)}} steps, not {{len(scheduler.timesteps)}}")
            return output + embedding(weights, SPANS[len(taken)]).to(output)

        scheduler.step = step
        hook = getattr(self, NETWORK).get_submodule(PLACE).register_forward_hook(tell)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            hook.remove()
            del scheduler.step
'''
PARTS = re.compile(
    r"^from diffusers import (\w+)\n.*^NETWORK, PLACE = '([a-z_]+)', '([\w.]+)'\nSPANS = \(([\d., e-]+)\)\n", re.M | re.S
)


def class_name(stock: str) -> str:
    """What the pipeline file calls its class, after the stock one."""
    return f"MeanVelocity{stock}"


def source(stock: str, network: str, place: str, spans: Sequence[float]) -> str:
    """The pipeline file: `stock` is a pipeline class, `network` its component, `place` the submodule that embeds the time.

    `spans` are the lengths of the steps, in the time from 0 to 1 of the network's own process.
    """
    names = {"stock": stock, "name": class_name(stock), "network": network, "place": place, "weights": WEIGHTS}
    return TEMPLATE.format(**names, spans=tuple(float(span) for span in spans))


def written(text: str) -> tuple[str, str] | None:
    """The names of the stock class and of the file's own, where `text` is what `source` writes; None for any other."""
    found = PARTS.search(text)
    if found is None:
        return None
    stock, network, place, listed = found.groups()
    try:
        spans = [float(each) for each in listed.split(",") if each.strip()]
    except ValueError:
        return None
    return (stock, class_name(stock)) if text == source(stock, network, place, spans) else None
