"""Inception score (Salimans et al. 2016, arXiv:1606.03498), summed up as the pictures pass.

exp(mean over pictures of KL(p(y|x) || p(y))) on each of ten random parts of the set; the score is the mean over the parts, as
in torch-fidelity, with its own shuffling, so that the numbers are the same. Only sums are kept: of p, and of p log p.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UserError

SPLITS, SEED = 10, 2020
"""torch-fidelity's defaults."""


class Splits:
    """Sums of class probabilities over parts of a set of `total` pictures, each in the part that the shuffling gives it."""

    def __init__(self, total: int, classes: int, splits: int = SPLITS, seed: int = SEED) -> None:
        self.total, self.seen = total, 0
        place = np.argsort(np.random.RandomState(seed).permutation(total))
        ends = np.array([(part + 1) * total // splits for part in range(splits)])
        self.part = torch.from_numpy(np.searchsorted(ends, place, side="right"))
        self.probabilities = torch.zeros(splits, classes, dtype=torch.double)
        self.negative_entropy = torch.zeros(splits, dtype=torch.double)

    def add(self, logits: Tensor) -> None:
        """Take the logits [B, C] of the next pictures in."""
        part = self.part[self.seen : self.seen + len(logits)]
        log = logits.double().log_softmax(1)
        self.probabilities.index_add_(0, part, log.exp())
        self.negative_entropy.index_add_(0, part, (log.exp() * log).sum(1))
        self.seen += len(logits)

    def scores(self) -> Tensor:
        """The score of each part [splits]. Raises UserError unless every picture came, and enough for all parts."""
        counts = torch.bincount(self.part, minlength=len(self.negative_entropy)).double()
        if self.seen != self.total or counts.min() < 1:
            raise UserError(f"the Inception score takes {len(counts)} or more pictures and all of them, not {self.seen}")
        mean = self.probabilities / counts[:, None]
        return (self.negative_entropy / counts - torch.special.xlogy(mean, mean).sum(1)).exp()
