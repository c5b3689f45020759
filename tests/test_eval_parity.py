"""On the same folders our numbers are those of torch-fidelity's `calculate_metrics`, and our features are its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch_fidelity
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
from transformers import Dinov2Config, Dinov2Model

from fastgen.errors import UserError
from fastgen.eval import PHOTO, TOY, World
from fastgen.eval import features as feature_module
from fastgen.eval.evaluation import real_images, toy_prompts
from fastgen.eval.features import ORIGINS, embed, extract, extractor, features_protocol
from fastgen.eval.images import PictureFolder, to_uint8, write_images
from fastgen.eval.measures.fidelity import distances, fidelity
from fastgen.eval.measures.inception_score import inception_score
from fastgen.eval.registry import Evidence
from fastgen.eval.weights import Weights

OPTIONS = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
NUMBER = 300


@cache
def toys(seed: int) -> Tensor:
    return real_images(toy_prompts(NUMBER)[2], seed)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Toy pictures, some of them dark, and others."""
    worse = toys(1).clone()
    worse[::3] //= 2
    for name, images in (("made", worse), ("real", toys(2))):
        write_images(images, tmp_path / name)
    return [tmp_path / "made", tmp_path / "real"]


def test_fid_kid_precision_and_recall_equal_torch_fidelity(folders: list[Path]):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), feature_extractor="fastgen-toy", fid=True, kid=True, prc=True,
        kid_subset_size=NUMBER, kid_subsets=1, **OPTIONS,
    )  # fmt: skip
    made, real = (PictureFolder(folder) for folder in folders)
    own = fidelity(Evidence(made, TOY, reference=real))
    assert own["fd"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert own["kd"].value == pytest.approx(1000 * theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert own["precision"] == pytest.approx(theirs["precision"], abs=1e-9)
    assert own["recall"] == pytest.approx(theirs["recall"], abs=1e-9)
    by_sets = distances(embed(made, TOY), embed(real, TOY))
    assert by_sets["fd"].value == own["fd"].value and by_sets["recall"] == own["recall"]


def test_features_are_torch_fidelitys_own(folders: list[Path]):
    """The same files through its dataset and loop, in batches of the same size: not one bit differs."""
    folder = PictureFolder(folders[0])
    network = create_feature_extractor("fastgen-toy", ["scene", "scene+damage"], cuda=False)
    dataset = ImagesPathDataset([str(path) for path in folder.paths])
    theirs = get_featuresdict_from_dataset(dataset, network, 64, cuda=False, save_cpu_ram=True, verbose=False)
    own = embed(folder, TOY, batch=64)
    assert torch.equal(own.rows["fid"], theirs["scene"]) and torch.equal(own.rows["prc"], theirs["scene+damage"])
    assert torch.equal(extract(folder, TOY, batch=64)["fid"], theirs["scene"].double())


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with random Inception weights in a file whose hash is the expected one."""
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    nn.init.normal_(network.fc.weight, std=1.0)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(ORIGINS, PHOTO.features, Weights(path.name, f"https://example.org/{path.name}", digest[:8]))
    yield replace(PHOTO, weights=tmp_path)
    extractor.cache_clear()


def photographs(count: int, seed: int) -> Tensor:
    """Smooth random pictures of 40 x 56."""
    coarse = torch.randn(count, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return to_uint8(nn.functional.interpolate(coarse, (40, 56), mode="bicubic"))


def test_inception_features_and_resize_are_torch_fidelitys(inception: World, tmp_path: Path):
    network = create_feature_extractor(
        PHOTO.features, ["2048"], cuda=False, feature_extractor_weights_path=str(tmp_path / "inception.pth")
    )
    images = photographs(3, 1)
    own = extract(images, inception)["fid"]
    assert torch.equal(own, network(images)[0].double()) and own.shape == (3, 2048)
    protocol = features_protocol(inception)
    assert (
        protocol["resize"].startswith("bilinear as in TensorFlow 1") and "299 x 299, by torch-fidelity 0." in protocol["resize"]
    )
    assert protocol["layers"] == {"fid": "2048", "prc": "2048", "isc": "logits_unbiased"} and protocol["rows"] == 10_000


@pytest.mark.slow
def test_scores_of_inception_equal_torch_fidelity(inception: World, tmp_path: Path):
    for seed, name in ((1, "made"), (2, "real")):
        write_images(photographs(16, seed), tmp_path / name)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "made"), input2=str(tmp_path / "real"), fid=True, kid=True, prc=True, isc=True,
        kid_subset_size=16, kid_subsets=1, feature_extractor="inception-v3-compat", batch_size=16,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"), **OPTIONS,
    )  # fmt: skip
    made, real = (PictureFolder(tmp_path / name) for name in ("made", "real"))
    evidence = Evidence(made, inception, reference=real)
    own = fidelity(evidence)
    assert own["fd"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3, abs=1e-3)
    score = inception_score(evidence)["inception_score"]
    assert score.value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert own["kd"].value == pytest.approx(1000 * theirs["kernel_inception_distance_mean"], rel=1e-2, abs=1e-3)
    assert own["precision"] == theirs["precision"] and own["recall"] == theirs["recall"]


def test_weights_that_are_more_than_tensors_are_refused(inception: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Even with the right hash."""
    path = tmp_path / "inception.pth"
    torch.save({"a": Path("no tensor")}, path)
    origin = replace(ORIGINS[PHOTO.features], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(feature_module.ORIGINS, PHOTO.features, origin)
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        extractor(inception)


def test_extractors_whose_weights_are_programs_are_refused():
    with pytest.raises(UserError, match="their weights are a program"):
        extractor(replace(PHOTO, features="clip-vit-b-32"))


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


def dino_by_hand(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """DINOv2 as its authors wrote it: 37 x 37 position embeddings by a scale of 16.1 / 37, layer scale, the class token."""
    w, functional = weights, nn.functional
    pictures = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(224, 224), align_corners=False)
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pictures = (pictures / 255 - mean) / std
    patch = "embeddings.patch_embeddings.projection"
    x = functional.conv2d(pictures, w[f"{patch}.weight"], w[f"{patch}.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    positions = w["embeddings.position_embeddings"]
    grid = positions[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").permute(0, 2, 3, 1)
    x = x + torch.cat([positions[:, :1], grid.reshape(1, 256, -1)], 1)
    for layer in range(2):
        p = f"encoder.layer.{layer}."

        def linear(name: str, values: Tensor, p: str = p) -> Tensor:
            return functional.linear(values, w[f"{p}{name}.weight"], w[f"{p}{name}.bias"])

        def norm(name: str, values: Tensor, p: str = p) -> Tensor:
            return functional.layer_norm(values, (24,), w[f"{p}{name}.weight"], w[f"{p}{name}.bias"], eps=1e-6)

        y = norm("norm1", x)
        parts = (linear(f"attention.attention.{each}", y) for each in ("query", "key", "value"))
        q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in parts)
        mixed = ((q @ k.transpose(2, 3)) / 8**0.5).softmax(-1) @ v
        x = x + w[f"{p}layer_scale1.lambda1"] * linear("attention.output.dense", mixed.transpose(1, 2).flatten(2))
        inner = functional.gelu(linear("mlp.fc1", norm("norm2", x)))
        x = x + w[f"{p}layer_scale2.lambda1"] * linear("mlp.fc2", inner)
    return functional.layer_norm(x, (24,), w["layernorm.weight"], w["layernorm.bias"], eps=1e-6)[:, 0]


def test_dinov2_features_are_the_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastgen.eval.dinov2.SIZES", {"dinov2-vit-s-14": ("small", SMALL)})
    network = Dinov2Model(Dinov2Config(**SMALL, image_size=518, patch_size=14))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "facebook" / "dinov2-small"
    network.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    world = replace(PHOTO, features="dinov2-vit-s-14", weights=tmp_path)
    images = photographs(3, 1)
    found = embed(images, world).rows["fid"]
    torch.testing.assert_close(found, dino_by_hand(images, weights), rtol=1e-4, atol=1e-4)
    assert "224 x 224, by torch-fidelity" in features_protocol(world)["resize"]
    extractor.cache_clear()
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"does not hold the weights of dinov2-vit-s-14: layernorm\.weight is missing"):
        extractor(world)


def test_missing_weights_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("fastgen.eval.weights.try_to_load_from_cache", lambda *_: None)
    places = {"vgg16": "vgg16-397923af.pth", "dinov2-vit-b-14": "facebook/dinov2-base/resolve/main/model.safetensors"}
    for name, place in places.items():
        with pytest.raises(UserError, match=place):
            extractor(replace(PHOTO, features=name))
