"""Statistics of a reference on disk: the formats in use are read, no program is run, those of other features are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval import PHOTO, TOY, score_images
from fastgen.eval.evaluation import real_images, toy_prompts
from fastgen.eval.features import embed, features_hash
from fastgen.eval.frechet import frechet_distance
from fastgen.eval.images import read_images, write_images
from fastgen.eval.measures.fidelity import fidelity
from fastgen.eval.registry import Evidence
from fastgen.eval.statistics import Statistics, read_statistics


def toys(count: int, seed: int) -> Tensor:
    return real_images(toy_prompts(count)[2], seed)


def same_numbers(found: Statistics, mean: Tensor, covariance: Tensor) -> bool:
    return torch.allclose(found.mean, mean) and torch.allclose(found.covariance, covariance)


def test_our_file_says_what_it_is(tmp_path: Path):
    moments = embed(toys(40, 1), TOY).moments
    Statistics.of(moments, TOY).save(tmp_path / "a" / "toy.npz")
    found = read_statistics(tmp_path / "a" / "toy.npz")
    assert same_numbers(found, moments.mean, moments.covariance)
    assert (found.count, found.features, found.layer) == (40, "fastgen-toy", "scene")
    assert found.weights_sha256 == features_hash(TOY) and found.resize == "none: pictures are 32 x 32"
    assert found.check(TOY) == []
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["toy.npz"], "no temporary file is left"


@pytest.mark.parametrize("more", [{}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}])
def test_files_of_edm_clean_fid_and_guided_diffusion_are_read(tmp_path: Path, more: dict[str, Any]):
    """EDM and clean-fid keep `mu` and `sigma`, guided-diffusion spatial ones beside them."""
    np.savez(tmp_path / "ref.npz", mu=np.arange(4.0), sigma=np.eye(4, dtype=np.float32), **more)
    found = read_statistics(tmp_path / "ref.npz")
    assert same_numbers(found, torch.arange(4).double(), torch.eye(4).double())
    assert "does not say which features" in found.check(TOY)[0]


def test_the_cache_of_torch_fidelity_is_read(tmp_path: Path):
    write_images(toys(30, 1), tmp_path / "real")
    options = {"cuda": False, "verbose": False, "save_cpu_ram": True, "cache_root": str(tmp_path / "cache")}
    folder = str(tmp_path / "real")
    torch_fidelity.calculate_metrics(
        input1=folder, input2=folder, feature_extractor="fastgen-toy", fid=True, input1_cache_name="toys", **options
    )
    found = read_statistics(tmp_path / "cache" / "toys-fastgen-toy-stat-fid-scene.pt")
    moments = embed(read_images(tmp_path / "real"), TOY).moments
    torch.testing.assert_close(found.covariance, moments.covariance, rtol=1e-4, atol=1e-4)
    assert (found.features, found.layer) == ("fastgen-toy", "scene") and found.check(TOY) == []


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    torch.save({"mu": Bomb(), "sigma": np.eye(1)}, tmp_path / "b.pt")
    torch.save({"mu": np.array([Bomb()], dtype=object), "sigma": np.eye(1)}, tmp_path / "c.pt")
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"mu": Bomb()}))
    for name, sentence in (("a.npz", "npz of numbers"), ("b.pt", "arrays alone"), ("c.pt", "alone"), ("d.pkl", r"\.npz files")):
        with pytest.raises(UserError, match=sentence):
            read_statistics(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"sigma": np.eye(3)}, r"holds no mu, but sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"shapes \(3,\) and \(2, 2\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
    ],
)
def test_files_that_hold_no_gaussian_are_named(tmp_path: Path, arrays: dict[str, Any], sentence: str):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        read_statistics(tmp_path / "ref.npz")


def test_files_that_are_none_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a file of statistics; give an \.npz"):
        read_statistics(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(UserError, match="cannot be read as an npz"):
        read_statistics(tmp_path / "text.npz")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="but a Tensor"):
        read_statistics(tmp_path / "tensor.pt")


def test_statistics_of_other_features_are_refused():
    own = Statistics.of(embed(toys(20, 1), TOY).moments, TOY)
    with pytest.raises(UserError, match="of fastgen-toy features, but the images are measured with inception-v3-compat"):
        own.check(PHOTO)
    with pytest.raises(UserError, match=r"statistics of layer scene\+damage, but distances look at layer scene"):
        replace(own, layer="scene+damage").check(TOY)
    with pytest.raises(UserError, match="other weights of fastgen-toy"):
        replace(own, weights_sha256="00").check(TOY)
    assert "resized otherwise (bicubic)" in replace(own, resize="bicubic").check(TOY)[0]
    wide = replace(own, features=None, mean=torch.zeros(2048).double(), covariance=torch.eye(2048).double(), source="ref.npz")
    with pytest.raises(UserError, match=r"ref\.npz holds statistics of 2048 features, but the extractor gives 160"):
        fidelity(Evidence(toys(20, 2), TOY, statistics=wide))


def test_statistics_take_the_references_place(tmp_path: Path):
    images, real = toys(60, 1), toys(60, 2)
    Statistics.of(embed(real, TOY).moments, TOY).save(tmp_path / "real.npz")
    evidence = Evidence(images, TOY, statistics=read_statistics(tmp_path / "real.npz"))
    found = fidelity(evidence)
    whole = fidelity(Evidence(images, TOY, reference=real))
    assert set(found) == {"fd"} and found["fd"].value == pytest.approx(whole["fd"].value, rel=1e-9)
    assert found["fd"].error == pytest.approx(whole["fd"].error, rel=1e-6)
    assert whole["fd"].value == pytest.approx(frechet_distance(embed(images, TOY).moments, embed(real, TOY).moments), rel=1e-6)
    assert any("give pictures" in note for note in evidence.notes)
    assert any("Only 60 images for 160 features" in note for note in evidence.notes)


def test_without_any_reference_fidelity_is_left_out():
    notes: list[str] = []
    assert score_images(toys(10, 1), world=TOY, only=["fidelity"], notes=notes) == {}
    assert any("it needs reference" in note for note in notes)
