"""Networks of transformers' classes, made from a config that is given and the tensors of one file: no config is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from fastgen.errors import UserError
from fastgen.eval.networks.towers import first_line


def filled(network: Any, config: Any, tensors: Mapping[str, Tensor], path: Path, **options: Any) -> Any:
    """A `network` of transformers' with the weights `tensors`, frozen, in float32 and in evaluation mode.

    Raises UserError, naming the file, where a tensor is missing, left over, or of another shape.
    """
    name = network.__name__
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = network.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, dtype=torch.float32, **options
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold the weights of a {name}: {first_line(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    for kind in ("missing", "unexpected"):
        if found := sorted(report[f"{kind}_keys"]):
            raise UserError(f"{path} does not hold the weights of a {name}: {found[0]} is {kind}, with {len(found) - 1} others")
    return model.eval().requires_grad_(False)
