"""Distances of feature sets: closed forms, torch-fidelity's own numbers, standard errors that a bootstrap confirms."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchvision.transforms.functional import center_crop

from fastgen.errors import UserError
from fastgen.eval import World
from fastgen.eval.features import Extraction, embed, shown_label
from fastgen.eval.frechet import FrechetTo, extrapolate, factor, frechet_distance, set_sizes, standard_error
from fastgen.eval.images import Centres
from fastgen.eval.inception_score import Splits
from fastgen.eval.kernel import influence, kernel_distance
from fastgen.eval.measures.coverage import density_and_coverage
from fastgen.eval.measures.fidelity import fidelity
from fastgen.eval.measures.frechet_infinity import fd_infinity
from fastgen.eval.measures.patch import patch_fd
from fastgen.eval.measures.teacher_frechet import fd_teacher
from fastgen.eval.moments import BLOCK, Moments, merged
from fastgen.eval.registry import Evidence
from fastgen.eval.world import INCEPTION, TOY_FEATURES

PIXELS = World("photo", "test-pixels", "fastgen-toy")
"""A world whose features are the means of a picture's quarters, channel by channel."""


class Quarters(torch_fidelity.FeatureExtractorBase):
    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("quarters",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "quarters"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1),)


if "test-pixels" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor("test-pixels", Quarters)


def gaussian(count: int, width: int, seed: int = 0, *, rank: int | None = None) -> Tensor:
    """Rows [N, D] with a random mean and covariance of that rank."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank or width, width, generator=draw, dtype=torch.double)
    mean = torch.randn(width, generator=draw, dtype=torch.double)
    return torch.randn(count, rank or width, generator=draw, dtype=torch.double) @ mixed + mean


def pictures(count: int, seed: int = 0, *, side: int = 4, dark: int = 0) -> Tensor:
    """Random uint8 [N, 3, side, side]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256 - dark, (count, 3, side, side), generator=draw, dtype=torch.uint8)


def theirs(a: Tensor, b: Tensor) -> float:
    statistics = (fid_features_to_statistics(rows) for rows in (a, b))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 6), st.floats(-1e6, 1e6))
def test_moments_of_parts_are_those_of_the_whole(sizes: list[int], width: int, offset: float):
    rows = gaussian(sum(sizes), width) + offset
    parts = [Moments.of(part) for part in rows.split(sizes)]
    whole = merged([Moments.from_tensors(part.tensors()) for part in parts])
    assert whole.count == len(rows) and whole.width == width
    if len(rows) > 1:
        torch.testing.assert_close(whole.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        expected = torch.cov(rows.T).reshape(width, width)
        torch.testing.assert_close(whole.covariance, expected, rtol=1e-7, atol=1e-7)


def test_moments_collect_batches_and_take_single_precision():
    rows = gaussian(2 * BLOCK + 17, 5).float() + 1000
    moments = Moments(5)
    for batch in rows.split(100):
        moments.add(batch)
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.covariance, torch.cov(rows.double().T), rtol=1e-10, atol=1e-10)
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        Moments.of(rows[:1]).covariance  # noqa: B018
    with pytest.raises(ValueError, match="no parts"):
        merged([])


def test_frechet_distance_of_two_gaussians_in_closed_form():
    noise = gaussian(2000, 3)
    # Whitened exactly, the fitted Gaussians are the ones we mean.
    noise = noise - noise.mean(0)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    shift = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(Moments.of(noise), Moments.of(noise * scale + shift)) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_in_the_plane_in_closed_form():
    """For 2 x 2 matrices that do not commute, tr (A B)^1/2 = (tr A B + 2 (det A B)^1/2)^1/2."""
    a, b = Moments.of(gaussian(50, 2, 1)), Moments.of(gaussian(60, 2, 2))
    product = a.covariance @ b.covariance
    assert not torch.allclose(product, product.T)
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


@given(st.integers(2, 60), st.integers(2, 60), st.integers(2, 40), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_frechet_distance_equals_torch_fidelity(n: int, m: int, width: int, rank: int, scale: float):
    """Sets smaller than their width, and features that depend on each other, included."""
    a, b = scale * gaussian(n, width, 1, rank=min(rank, width)), scale * gaussian(m, width, 2)
    own, expected = frechet_distance(Moments.of(a), Moments.of(b)), theirs(a, b)
    assert own == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert frechet_distance(Moments.of(b), Moments.of(a)) == pytest.approx(own, rel=1e-4)
    assert FrechetTo(Moments.of(b)).compare(Moments.of(a)).value == pytest.approx(own, rel=1e-6)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-5 * scale**2 * width)


def test_factors_give_the_covariance_back():
    for rows in (gaussian(50, 6), gaussian(5, 6), gaussian(50, 6, rank=2)):
        covariance = torch.cov(rows.T)
        root = factor(covariance)
        torch.testing.assert_close(root @ root.T, covariance)
    assert root.shape == (6, 2)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 50, 4), (30, 80, 40), (80, 30, 40), (20, 25, 40)])
def test_influence_is_the_derivative(n: int, m: int, width: int):
    """A little more weight on one picture, in sets larger and smaller than their width."""
    rows, reference = gaussian(n, width, 1), FrechetTo(Moments.of(gaussian(m, width, 2)))

    def weighted(extra: float) -> Any:
        weights = torch.full((n,), (1 - extra) / n, dtype=torch.double)
        weights[3] += extra
        mean = weights @ rows
        return Moments.from_tensors(
            {"count": torch.tensor(2), "mean": mean, "scatter": ((rows - mean) * weights[:, None]).T @ (rows - mean)}
        )

    moved = reference.compare(weighted(0)).influence(rows, rows.mean(0))
    step = 1e-4  # roots of eigenvalues that are 0 up to rounding make smaller ones noisy
    slope = (reference.distance(weighted(step)) - reference.distance(weighted(-step))) / (2 * step)
    assert moved[3].item() == pytest.approx(slope, rel=1e-3)
    assert moved.mean().item() == pytest.approx(0, abs=1e-9)


def bootstrap(rows: Tensor, reference: FrechetTo, groups: int, times: int = 400) -> float:
    """Spread of the distance when `groups` groups of rows in a row are drawn with replacement."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(times):
        drawn = rows.unflatten(0, (groups, -1))[torch.randint(groups, (groups,), generator=draw)]
        found.append(reference.distance(Moments.of(drawn.flatten(0, 1))))
    return torch.tensor(found).std().item()


def test_the_standard_error_is_the_bootstraps():
    rows, reference = gaussian(400, 4, 1), FrechetTo(Moments.of(gaussian(300, 4, 2)))
    moments = Moments.of(rows)
    moved = reference.compare(moments).influence(rows, moments.mean)
    error = standard_error(moved, 400)
    assert error == pytest.approx(bootstrap(rows, reference, 400), rel=0.1)
    assert standard_error(moved[:200], 400) == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize(("count", "width"), [(300, 5), (200, 20), (100, 20)])
def test_the_expected_bias_is_that_of_many_draws(count: int, width: int):
    """Of sets from the reference's own distribution, whose limit is 0; and the closed form for standard normal features."""
    rows = torch.randn(200, count, width, dtype=torch.double)
    truth = Moments.from_tensors(
        {"count": torch.tensor(2), "mean": torch.zeros(width).double(), "scatter": torch.eye(width).double()}
    )
    reference = FrechetTo(truth)
    found = [(reference.compare(Moments.of(each)), each) for each in rows]
    measured = np.mean([distance.value for distance, _ in found])
    expected = np.mean([distance.bias(each, each.mean(0), count) for distance, each in found])
    assert expected == pytest.approx(measured, rel=0.12)
    assert expected == pytest.approx((width + width**2 / 4 + width / 4) / count, rel=0.12)


def test_pictures_of_one_prompt_are_drawn_together():
    """Four copies of a picture say no more than one."""
    rows, reference = gaussian(200, 3, 1).repeat_interleave(4, 0), FrechetTo(Moments.of(gaussian(300, 3, 2)))
    prompts = [str(row // 4) for row in range(len(rows))]
    moments = Moments.of(rows)
    moved = reference.compare(moments).influence(rows, moments.mean)
    error = standard_error(moved, len(rows), prompts)
    assert error == pytest.approx(bootstrap(rows, reference, 200), rel=0.12)
    assert error == pytest.approx(2 * standard_error(moved, len(rows)), rel=0.02)
    assert standard_error(moved, len(rows), ["same"] * len(rows)) is None


def test_the_error_of_the_kernel_distance_is_that_of_repeated_draws():
    real = gaussian(300, 4, 2) / 2
    draws = [gaussian(3000, 4, 1)[start : start + 150] / 2 for start in range(0, 3000, 150)]
    found = [kernel_distance(rows, real[:150]) for rows in draws]
    spread = np.std([score.value for score in found], ddof=1)
    assert np.mean([score.error for score in found]) == pytest.approx(spread, rel=0.35)
    assert influence(draws[0], real).mean().item() == pytest.approx(0, abs=1e-9)


def test_extrapolation_meets_the_line():
    sizes = set_sizes(50_000)
    assert sizes[0] == 5000 and sizes[-1] == 50_000 and len(sizes) == 15
    assert set_sizes(1000)[0] == 500
    assert extrapolate(sizes, [3 + 700 / size for size in sizes]) == pytest.approx(3, rel=1e-9)


def evidence(images: Tensor, **options: Any) -> Evidence:
    return Evidence(images, PIXELS, **options)


def test_the_limit_is_nearer_to_the_truth_than_the_distance():
    """Both sets are of one distribution and the reference is large: the distance of endlessly many images is 0."""
    found = [fd_infinity(evidence(pictures(200, seed), reference=pictures(20_000, 100))) for seed in range(6)]
    limits, biases = (np.mean([each[key] for each in found]) for key in ("fd_infinity", "fd_bias"))
    assert abs(limits) < 0.35 * (limits + biases)
    with pytest.raises(UserError, match="at least 60 images, not 59"):
        fd_infinity(evidence(pictures(59), reference=pictures(100)))


@cache
def scored() -> dict[str, Any]:
    both = {"reference": pictures(300, 2), "floor": pictures(250, 3)}
    return fidelity(evidence(pictures(250, 1, dark=40), **both))


def test_fidelity_gives_every_distance_with_its_floor():
    found = scored()
    assert set(found) == {f"{key}{end}" for key in ("fd", "kd", "precision", "recall") for end in ("", "_floor")} | {
        "fidelity_bias"
    }
    assert 0 < found["fidelity_bias"] < found["fd_floor"]
    for key in ("fd", "kd"):
        score = found[key]
        assert score.value > 5 * abs(found[f"{key}_floor"]) and 0 < score.error < 0.5 * score.value


def test_moments_are_of_all_pictures_and_rows_of_the_first():
    images = pictures(500)
    few, all_of_them = embed(images, PIXELS, rows=70, batch=32), embed(images, PIXELS, batch=128)
    assert torch.equal(few.rows["fid"], all_of_them.rows["fid"][:70])
    torch.testing.assert_close(few.moments.covariance, all_of_them.moments.covariance)
    assert few.moments.count == 500 and embed(images, PIXELS, rows=0).rows == {}
    with pytest.raises(UserError, match="no images to take features of"):
        Extraction(PIXELS).embedded()


def test_density_and_coverage_by_hand():
    """The paper's formulas, picture by picture."""
    real, made = gaussian(40, 3, 1).numpy(), gaussian(30, 3, 1).numpy()[:, ::-1] * 0.8
    between = np.linalg.norm(real[:, None] - made[None], axis=2)
    radius = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)[:, 5]
    density = [sum(between[i, j] < radius[i] for i in range(40)) / 5 for j in range(30)]
    covered = [any(between[i, j] < radius[i] for j in range(30)) for i in range(40)]
    found = density_and_coverage(torch.from_numpy(made.copy()), torch.from_numpy(real))
    assert found[0].tolist() == pytest.approx(density) and found[1].tolist() == covered
    assert 0 < np.mean(covered) < 1


@pytest.mark.parametrize("count", [20, 137])
def test_the_inception_score_equals_torch_fidelity(count: int):
    logits = 4 * torch.randn(count, 50)
    splits = Splits(count, 50)
    for batch in logits.split(16):
        splits.add(batch)
    expected = isc_features_to_metric(logits)
    assert splits.scores().mean().item() == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert splits.scores().std(correction=0).item() == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_the_inception_score_needs_every_part():
    splits = Splits(9, 50)
    splits.add(torch.randn(9, 50))
    with pytest.raises(UserError, match="10 or more pictures"):
        splits.scores()


@pytest.mark.parametrize(("height", "width"), [(1024, 768), (303, 304), (299, 299)])
def test_centres_are_torchvisions(height: int, width: int):
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    centres = Centres(images, 299)
    assert centres.shape == (2, 3, 299, 299) and len(centres) == 2
    assert torch.equal(centres[0:2], center_crop(images, [299, 299]))


def test_patches_look_at_the_middle_alone():
    images, reference = (torch.zeros(20, 3, 320, 310, dtype=torch.uint8) for _ in range(2))
    images[:, :, :10] = 255  # above the middle 299 rows
    assert patch_fd(evidence(images, reference=reference))["patch_fd"].value == 0
    images[:, :, 150:170] = 255
    assert patch_fd(evidence(images, reference=reference))["patch_fd"].value > 10
    with pytest.raises(UserError, match=r"299 x 299 pixels, but the images are 4 x 4"):
        patch_fd(evidence(pictures(20), reference=reference))


def test_distance_to_the_teachers_own_images():
    images = pictures(100)
    assert fd_teacher(evidence(images, teacher=images))["fd_teacher"].value == pytest.approx(0, abs=1e-6)
    found = fd_teacher(evidence(images, teacher=pictures(100, dark=60)))["fd_teacher"]
    assert found.value > 100 and found.error is not None


def test_only_inceptions_distances_are_called_fid():
    assert shown_label("Fréchet distance, endless images", INCEPTION) == "FID, endless images"
    assert shown_label("Kernel distance x 1000", INCEPTION) == "KID x 1000"
    assert shown_label("Fréchet distance", TOY_FEATURES) == "Fréchet distance"
