"""A score as a share of another model's: how much of the teacher's diversity, how much more saturation than real pictures.

The error is that of a ratio of means to first order (Cochran 1977, section 6.4), summed by prompts, since images of a prompt
are alike: with the linearised values z_i = (a_i - r b_i) / mean(b) over G prompts it is
sqrt(G / (G - 1) sum_g (sum_{i in g} z_i)^2) / N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.eval.registry import Score


def ratio(own: Tensor, other: Tensor, prompts: Sequence[str] | None = None, *, paired: bool = True) -> Score | None:
    """mean(own) / mean(other) of the values [N] and [M], with its standard error; None where the other's mean is not positive.

    `paired`: the values belong together one by one (M = N), and `prompts` names the prompt of each; what both share then
    cancels. Otherwise the two errors are added.
    """
    own, other = own.double(), other.double()
    below = other.mean()
    if not below > 0:
        return None
    share = own.mean() / below
    if paired:
        error = clustered_error((own - share * other) / below, prompts)
    else:
        errors = clustered_error(own / below, prompts), clustered_error(share * other / below, None)
        error = None if None in errors else torch.tensor(errors).norm().item()
    return Score(share.item(), error=error)


def clustered_error(values: Tensor, prompts: Sequence[str] | None) -> float | None:
    """Standard error of the mean of `values` [N], of which those of a prompt may depend on each other; None for one prompt."""
    centred = values.double() - values.double().mean()
    if prompts is not None:
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([number[prompt] for prompt in prompts])
        centred = centred.new_zeros(len(number)).index_add_(0, group, centred)
    groups = len(centred)
    return None if groups < 2 else (groups / (groups - 1) * centred.square().sum()).sqrt().item() / len(values)
