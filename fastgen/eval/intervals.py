"""How far a score can be trusted: bootstrap intervals that draw prompts, not images, since images of a prompt are alike.

Efron 1979; for means of clusters, Field and Welsh 2007. Scores that are no means bring their standard error with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.eval.registry import Score

RESAMPLES = 2000
LEVEL = 0.95


def interval(score: Score, prompts: Sequence[str] | None, *, level: float = LEVEL) -> tuple[float, float] | None:
    """Lower and upper end at `level`; None where nothing is known of the score's error."""
    if score.each is not None and len(score.each) > 1:
        means = resampled_means(score.each, prompts)
        low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)).tolist()
        return low, high
    if score.error is not None:
        width = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)).item() * score.error
        return score.value - width, score.value + width
    return None


def resampled_means(each: Tensor, prompts: Sequence[str] | None, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means [resamples] of the values [N] of as many prompts, drawn with replacement (or images, without prompts)."""
    values = each.double()
    if prompts is None:
        sums, counts = values, torch.ones_like(values)
    else:
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([number[prompt] for prompt in prompts])
        sums = torch.zeros(len(number), dtype=torch.double).index_add_(0, group, values)
        counts = torch.bincount(group, minlength=len(number)).double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(resamples):  # one at a time: N may be large
        drawn = torch.randint(len(sums), (len(sums),), generator=generator)
        means.append(sums[drawn].sum() / counts[drawn].sum())
    return torch.stack(means)
