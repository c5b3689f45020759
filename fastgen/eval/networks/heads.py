"""Small heads of linear layers, one after the other with nothing between them in evaluation (dropout alone, in training)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from fastgen.errors import UserError


def linear_head(tensors: Mapping[str, Tensor], names: Sequence[str], path: Path, *, width: int | None = None) -> nn.Sequential:
    """The layers `names` (each with `weight` and `bias`) of a state dict, from `width` numbers to one.

    Raises UserError, naming the file, where a layer is missing or does not follow the one before it.
    """
    layers = nn.Sequential()
    for name in names:
        weight, bias = (tensors.get(f"{name}.{part}" if name else part) for part in ("weight", "bias"))
        fits = weight is not None and weight.ndim == 2 and bias is not None and bias.shape == weight.shape[:1]
        if weight is None or bias is None or not fits or width not in (None, weight.shape[1]):
            wanted = "a linear layer" if width is None else f"a linear layer of {width} numbers"
            raise UserError(f"{path} does not hold the head that was looked for: {name or 'weight'} is not {wanted}")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight.float(), bias.float()
        layers.append(layer)
        width = weight.shape[0]
    if width != 1:
        raise UserError(f"{path} does not hold the head that was looked for: it ends in {width} numbers instead of one")
    return layers.eval().requires_grad_(False)
