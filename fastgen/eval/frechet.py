"""Fréchet distance of two Gaussians, its derivatives, its standard error, its bias and its limit for endless images.

    FD = |m - m_r|^2 + tr S + tr S_r - 2 tr (S_r^1/2 S S_r^1/2)^1/2          (Dowson and Landau 1982; Heusel et al. 2017, eq. 6)

The last trace is the sum of the roots of the eigenvalues of R' S R, for any R with R R' = S_r: they are those of the product
S_r S, but of a symmetric matrix, so that no root of an unsymmetric one is taken. What rounding makes negative is 0.

The standard error is the infinitesimal jackknife's (Jaeckel 1972; Efron 1982, ch. 6). Since d tr (R' S R)^1/2 = tr(M dS) / 2
with M = R (R' S R)^-1/2 R', one more image x moves FD by

    2 (m - m_r)'(x - m) + (x - m)'(I - M)(x - m) - tr (I - M) S

divided by N. Where S is singular the pseudo-inverse is exact: the images whose weights change lie in its range themselves.

With the eigenvalues a_i of R' S R, its eigenvectors V and z = V'R'(x - m), the expectation of the second derivative's term,

    bias = (tr S + 1/2 sum_ij Var(z_i z_j) / (sqrt(a_i a_j) (sqrt a_i + sqrt a_j))) / N,

is how far FD of N images lies above that of endlessly many, to the order 1 / N; between equal standard normal distributions it
is (D + D^2 / 4 + D / 4) / N. In all of this the reference is taken as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastgen.eval.moments import BLOCK
from fastgen.eval.ratios import clustered_error

BIAS_ROWS = 1000
"""Rows that the bias is estimated from: it is a mean over pairs of features, and more would hardly change it."""
POINTS, SMALLEST = 15, 5000
"""FID-infinity (Chong and Forsyth 2020): how many set sizes, and the smallest where twice as many images are there."""


class Gaussian(Protocol):
    """Anything with a mean [D] and a covariance [D, D] in float64: `Moments`, `Statistics`."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


@dataclass(frozen=True)
class Frechet:
    """A distance and what its derivatives are made of.

    `shift` [D] and `covariance` [D, D] are the generated mean from the reference's on and the generated covariance; `roots`
    [r] are the roots of the eigenvalues above 0, and `half` [D, r] is R V a^-1/4, so that M is its product with its own
    transpose.
    """

    value: float
    shift: Tensor
    covariance: Tensor
    roots: Tensor
    half: Tensor

    def influence(self, rows: Tensor, mean: Tensor) -> Tensor:
        """How far each of rows [N, D] of the generated set moves the distance, times N: [N], centred."""
        moved = []
        for block in rows.split(BLOCK):
            deviations = block - mean.to(block)
            seen = (deviations @ self.half.to(block)).square().sum(1)
            moved.append(2 * deviations @ self.shift.to(block) + deviations.square().sum(1) - seen)
        found = torch.cat(moved).double()
        return found - found.mean()

    def bias(self, rows: Tensor, mean: Tensor, count: int) -> float:
        """How far the distance of `count` images lies above its limit, from the first rows [n, D] of them."""
        rows = rows[:BIAS_ROWS]
        squares = ((rows - mean.to(rows)) @ self.half.to(rows)).square()
        products = (squares.T @ squares).double() / len(rows) - self.roots.square().diag()
        second = (products / (self.roots[:, None] + self.roots)).sum() / 2
        return ((self.covariance.trace() + second) / count).item()


class FrechetTo:
    """Distances to one reference, whose factor R [D, rank] is computed once."""

    def __init__(self, reference: Gaussian) -> None:
        covariance = reference.covariance
        self.mean, self.trace, self.root = reference.mean, covariance.trace().item(), factor(covariance)

    def distance(self, generated: Gaussian) -> float:
        """The distance alone."""
        covariance = generated.covariance
        values = torch.linalg.eigvalsh(self._product(covariance)).clamp_min(0)
        return self._value(generated.mean, covariance, values)

    def compare(self, generated: Gaussian) -> Frechet:
        """The distance with its derivatives."""
        covariance = generated.covariance
        values, vectors = torch.linalg.eigh(self._product(covariance))
        values = values.clamp_min(0)
        kept = above_rounding(values)
        half = self.root @ (vectors[:, kept] * values[kept] ** -0.25)
        value = self._value(generated.mean, covariance, values)
        return Frechet(value, generated.mean - self.mean, covariance, values[kept].sqrt(), half)

    def _product(self, covariance: Tensor) -> Tensor:
        product = self.root.T @ covariance @ self.root
        return (product + product.T) / 2

    def _value(self, mean: Tensor, covariance: Tensor, values: Tensor) -> float:
        shift = (mean - self.mean).square().sum().item()
        return max(0.0, shift + covariance.trace().item() + self.trace - 2 * values.sqrt().sum().item())


def factor(covariance: Tensor) -> Tensor:
    """R [D, rank] with R R' = `covariance`: Cholesky's where it is positive definite, else of its eigenvectors."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    kept = above_rounding(values)
    return vectors[:, kept] * values[kept].sqrt()


def above_rounding(values: Tensor) -> Tensor:
    """Which eigenvalues [D] of a positive matrix are more than rounding errors."""
    largest = values.max().item() if len(values) else 0.0
    return values > max(largest, 0.0) * len(values) * torch.finfo(torch.double).eps


def frechet_distance(generated: Gaussian, reference: Gaussian) -> float:
    """Fréchet distance of two Gaussians."""
    return FrechetTo(reference).distance(generated)


def standard_error(influence: Tensor, count: int, prompts: Sequence[str] | None = None) -> float | None:
    """Of a score of `count` images, from the centred influence [n] of the first n of them.

    `prompts` names the prompt of each image: those of one are alike. None where all n are of one prompt.
    """
    error = clustered_error(influence, None if prompts is None else prompts[: len(influence)])
    return None if error is None else error * (len(influence) / count) ** 0.5


def extrapolate(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """Where a straight line through distances over 1 / size meets 0: the distance of endless images."""
    design = torch.stack([torch.ones(len(sizes)), 1 / torch.tensor(sizes, dtype=torch.double)], 1).double()
    return torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.double)[:, None]).solution[0].item()


def set_sizes(count: int) -> list[int]:
    """The sizes that FID-infinity looks at: evenly spaced up to `count`, from 5000 or, of smaller sets, from the half."""
    first = SMALLEST if count >= 2 * SMALLEST else max(2, count // 2)
    return sorted({int(size) for size in torch.linspace(first, count, POINTS, dtype=torch.double)})
