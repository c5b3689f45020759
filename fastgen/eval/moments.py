"""Mean and covariance of feature rows in float64, batch by batch: memory does not grow with the number of rows.

Two sets are joined by the update of Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing
sample variances", eq. 2.1), which subtracts no large numbers from each other; so the moments of parts, made in other processes
too, add up to those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UserError

BLOCK = 1024
"""Rows that are collected before they are joined: one product of matrices costs the same for few rows as for many."""


class Moments:
    """How many rows of `width` features were seen, their mean and their covariance. Rows are float or double, on any device."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._mean = torch.zeros(width, dtype=torch.double)
        self._scatter = torch.zeros(width, width, dtype=torch.double)
        self._waiting: list[Tensor] = []

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of rows [N, D]."""
        return cls(rows.shape[1]).add(rows)

    @property
    def width(self) -> int:
        """D."""
        return len(self._mean)

    @property
    def count(self) -> int:
        """N."""
        return self._count + sum(map(len, self._waiting))

    @property
    def mean(self) -> Tensor:
        """Mean [D]; zeros while there are no rows."""
        return self._settled()._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D] (divisor N - 1). Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance takes at least 2 images, not {self.count}")
        return self._settled()._scatter / (self.count - 1)

    def add(self, rows: Tensor) -> Moments:
        """Take rows [B, D] in."""
        self._waiting.append(rows.detach().cpu())
        return self._settled() if sum(map(len, self._waiting)) >= BLOCK else self

    def merge(self, other: Moments) -> Moments:
        """Take in the rows that `other` saw."""
        other._settled()
        return self._settled()._join(other._count, other._mean, other._scatter)

    def tensors(self) -> dict[str, Tensor]:
        """What other processes need: `count` [], `mean` [D] and `scatter` [D, D], the sum of the deviations' outer products."""
        self._settled()
        return {"count": torch.tensor(self._count), "mean": self._mean, "scatter": self._scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Moments:
        """The inverse of `tensors`."""
        return cls(len(tensors["mean"]))._join(int(tensors["count"]), tensors["mean"], tensors["scatter"])

    def _settled(self) -> Moments:
        if self._waiting:
            rows = torch.cat(self._waiting).double()
            self._waiting.clear()
            mean = rows.mean(0)
            # NumPy multiplies a matrix with its own transpose at half the price (syrk); torch does not.
            deviations = (rows - mean).numpy()
            self._join(len(rows), mean, torch.from_numpy(np.matmul(deviations.T, deviations)))
        return self

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> Moments:
        if count:
            total, shift = self._count + count, mean - self._mean
            self._scatter += scatter
            self._scatter.addr_(shift, shift, alpha=self._count * count / total)
            self._mean = self._mean + shift * (count / total)
            self._count = total
        return self


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all rows of several parts. Raises ValueError for no parts."""
    whole: Moments | None = None
    for part in parts:
        whole = Moments(part.width).merge(part) if whole is None else whole.merge(part)
    if whole is None:
        raise ValueError("there are no parts to merge")
    return whole
