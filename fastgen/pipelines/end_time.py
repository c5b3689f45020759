"""Where a network of diffusers embeds the time, and with it the time at which a step ends (MeanFlow, shortcut models)."""

from __future__ import annotations

from torch import nn

from fastgen.denoiser import EndInput
from fastgen.errors import UserError

NAMES = ("time_embedding", "timestep_embedder", "time_embedder", "t_embedder", "time_step_proj")
"""What diffusers' networks call the module that embeds the time, other than those of sizes, texts and guidance."""


def end_input(network: nn.Module) -> EndInput:
    """A second time input for `network`, without effect until it is trained.

    Raises UserError for a network whose embedding of the time is not known.
    """
    for name, module in sorted(network.named_modules(), key=lambda each: each[0].count(".")):
        *parents, own = name.split(".")
        width = getattr(getattr(module, "linear_2", None), "out_features", None)
        if own in NAMES and "context_embedder" not in parents and width is not None:
            return EndInput(name, width)
    raise UserError(
        f"{type(network).__name__} has no embedding of the time that fastgen knows, so it cannot be told where a step ends: "
        "use a method that tells it none"
    )
