"""Metrics of pictures: diversity, Vendi score, colour, distance to the teacher, bindings; by hand, and in the toy world."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

from fastgen.data.toy.scenes import Scenes
from fastgen.errors import UserError
from fastgen.eval import PHOTO, TOY
from fastgen.eval.evaluation import gather, measure_images, real_images, toy_prompts
from fastgen.eval.features import Embedded, extract
from fastgen.eval.images import PictureFolder, from_uint8, to_uint8, write_images
from fastgen.eval.lpips import HEADS, TRUNK, Lpips, load_lpips
from fastgen.eval.measures.colour import colour_statistics, statistics_of
from fastgen.eval.measures.diversity import cosine, euclidean, groups, lpips_matrix, pick, spread
from fastgen.eval.measures.teacher_fidelity import root_mean_square, to_other_seeds
from fastgen.eval.measures.vendi import vendi_score
from fastgen.eval.ratios import clustered_error, ratio

NUMBER, SEEDS = 120, 4


@cache
def world() -> tuple[list[str], Scenes, Tensor, Tensor]:
    """Prompts (each four times), scenes, images and other images in the teacher's place."""
    prompts, _, scenes = toy_prompts(NUMBER, seeds_per_prompt=SEEDS)
    return prompts, scenes, real_images(scenes, 11), real_images(scenes, 12)


@cache
def random_lpips() -> Lpips:
    torch.manual_seed(0)
    network = Lpips()
    for head in network.heads:
        head.data.uniform_(0, 1)
    return network


def noise(number: int, size: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(256, (number, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# -- ratios ----------------------------------------------------------------------------------------------------------------


def test_a_ratio_and_its_error_by_hand():
    own, other = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    found = ratio(own, other)
    # r = 1; z = (1 - 2) / 2 and (3 - 2) / 2; sqrt(2 / 1 * (1/4 + 1/4)) / 2 = 1/2.
    assert found.value == 1 and found.error == pytest.approx(0.5)
    assert ratio(own, own).error == pytest.approx(0)
    assert ratio(own, own, paired=False).error == pytest.approx(2**0.5 * clustered_error(own / 2, None))
    assert ratio(own, torch.zeros(2)) is None
    assert ratio(own[:1], other[:1]).error is None


def test_images_of_a_prompt_count_as_one_draw():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    twice = values.repeat_interleave(2)
    prompts = [str(i // 2) for i in range(100)]
    assert clustered_error(twice, prompts) == pytest.approx(clustered_error(values, None))
    assert clustered_error(values, None) == pytest.approx((values.double().std() / 50**0.5).item())


def test_the_error_of_a_ratio_is_what_repetition_shows():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4000, 100, generator=generator)
    own, other = 5 + shared + torch.randn(4000, 100, generator=generator), 4 + shared
    found = [ratio(a, b) for a, b in zip(own, other, strict=True)]
    seen = torch.tensor([score.value for score in found]).std()
    told = torch.tensor([score.error for score in found]).mean()
    assert told.item() == pytest.approx(seen.item(), rel=0.05)


# -- diversity -------------------------------------------------------------------------------------------------------------


def test_distances_within_prompts_by_hand():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [1.0, 0.0], [9.0, 9.0], [3.0, 0.0]])
    rows = groups(["a", "a", "b", "b", "c", "a"])
    assert rows == [[0, 1, 5], [2, 3]]
    assert spread([euclidean(features[some]) for some in rows]).tolist() == pytest.approx([(5 + 3 + 4) / 3, 2**0.5])
    torch.testing.assert_close(cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])), torch.tensor(
        [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]
    ))  # fmt: skip
    equal = torch.randn(1, 50).expand(4, 50)
    assert cosine(equal).max() == 0


def test_seed_diversity_in_the_toy_world():
    prompts, scenes, images, teacher = world()
    measured = measure_images(gather(images, prompts, scenes=scenes, teacher=teacher), ["diversity", "vendi"])
    scores = measured.scores
    assert scores["diversity_ratio"] == pytest.approx(1, abs=0.1)
    assert scores["diversity_teacher_ratio"] == pytest.approx(1, abs=0.1)
    assert scores["diversity"] == pytest.approx(measured.each["diversity"].mean().item(), rel=1e-5)
    low, high = measured.intervals["diversity_teacher_ratio"]
    assert low < scores["diversity_teacher_ratio"] < high < low + 0.5
    assert 1 < scores["vendi"] < SEEDS < scores["vendi_set"] < NUMBER


def test_a_student_that_ignores_its_noise_has_no_diversity():
    prompts, scenes, images, teacher = world()
    collapsed = images[torch.tensor([prompts.index(prompt) for prompt in prompts])]
    measured = measure_images(gather(collapsed, prompts, scenes=scenes, teacher=teacher), ["diversity", "vendi"])
    assert measured.scores["diversity"] == measured.scores["diversity_teacher_ratio"] == 0
    assert measured.scores["vendi"] == pytest.approx(1, abs=1e-9)
    assert measured.scores["vendi_teacher_ratio"] < 0.9
    assert measured.scores["vendi_set"] < len(set(prompts)) + 1e-6


def test_prompts_with_different_numbers_of_seeds():
    prompts, scenes, images, _ = world()
    rows = torch.tensor([0, 1, 2, 4, 5, 8])
    chosen = [prompts[i] for i in rows]
    evidence = gather(images[rows], chosen, scenes=scenes[rows])
    measured = measure_images(evidence, ["diversity"])
    features = evidence.features("images")["fid"]
    by_hand = torch.stack([torch.pdist(features[:3]).mean(), torch.pdist(features[3:5]).mean()]).mean()
    assert measured.scores["diversity"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert "diversity" not in measured.each and "diversity" in measured.intervals


def test_features_of_the_first_images_alone():
    prompts, scenes, images, teacher = world()
    count = 5 * SEEDS + 1
    whole = gather(images, prompts, scenes=scenes, teacher=teacher)
    for which in ("images", "reference", "teacher"):
        whole._features[which, TOY.features] = Embedded.of(extract(getattr(whole, which), TOY), rows=count)
    first = slice(count)
    given = {"scenes": scenes[first], "reference": whole.reference[first], "teacher": teacher[first]}
    part = gather(images[first], prompts[first], **given)
    names = ["diversity", "vendi", "teacher_fidelity"]
    found, expected = measure_images(whole, names), measure_images(part, names)
    assert found.scores == pytest.approx(expected.scores, rel=1e-4)
    assert found.notes == [f"Pairs and single images are measured on the first {count} of {NUMBER} images."]
    assert found.each == {} and {"diversity", "teacher_distance"} <= found.intervals.keys()


def test_one_prompt_and_one_image_of_each():
    prompts, scenes, images, teacher = world()
    one = measure_images(gather(images[:SEEDS], prompts[:SEEDS], scenes=scenes[:SEEDS]), ["diversity", "vendi"])
    assert one.scores["diversity"] > 0 and one.scores["vendi"] > 1
    single = gather(images[::SEEDS], prompts[::SEEDS], scenes=scenes[::SEEDS], teacher=teacher[::SEEDS])
    alone = measure_images(single, ["diversity", "vendi"])
    assert set(alone.scores) == {"vendi_set", "vendi_set_ratio", "vendi_set_teacher_ratio"}
    assert sum("at least two images" in note for note in alone.notes) == 2


def test_dino_distances_come_from_its_own_features():
    evidence = gather(noise(4), ["a", "a", "b", "b"], teacher=noise(4, seed=1), world=PHOTO)
    vectors = {"images": torch.eye(4), "teacher": torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])}
    for which, features in vectors.items():
        evidence._features[which, "dinov2-vit-b-14"] = Embedded.of({"fid": features.double()})
    scores = measure_images(evidence, ["dino_diversity"]).scores
    assert scores == pytest.approx({"dino_diversity": 1.0, "dino_diversity_teacher_ratio": 2.0})


# -- Vendi score -----------------------------------------------------------------------------------------------------------


def test_vendi_score_counts_different_images():
    assert vendi_score(torch.ones(7, 5)) == pytest.approx(1)
    assert vendi_score(torch.eye(6) * torch.arange(1, 7)[:, None]) == pytest.approx(6)
    assert vendi_score(torch.eye(6, 40)) == pytest.approx(6)
    assert vendi_score(torch.eye(3).repeat(50, 1)) == pytest.approx(3)
    # Two images at an angle: eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    by_hand = np.exp(-sum(p * np.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
    assert vendi_score(torch.tensor([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(by_hand)


def test_vendi_score_is_the_same_by_either_matrix():
    features = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    unit = torch.nn.functional.normalize(features, dim=1)
    shares = torch.linalg.eigvalsh(unit @ unit.T / 30).clamp_min(1e-300)
    assert vendi_score(features) == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-9)
    assert vendi_score(torch.cat([features, torch.zeros(30, 20)], 1)) == pytest.approx(vendi_score(features), rel=1e-9)
    with pytest.raises(UserError, match="2 of 3 images have features of length 0"):
        vendi_score(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


# -- LPIPS -----------------------------------------------------------------------------------------------------------------


def lpips_files(folder: Path, network: Lpips) -> None:
    """Weights of `network` in the two files of their origins."""
    state = network.state_dict()
    layers = {"features." + name.split(".", 2)[2]: value for name, value in state.items() if name.startswith("slices")}
    torch.save(layers, folder / TRUNK.file)
    heads = {f"lin{i}.model.1.weight": head.data[None, :, None, None] for i, head in enumerate(network.heads)}
    torch.save(heads, folder / HEADS.file)


def test_lpips_equals_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torch_fidelity import sample_similarity_lpips as theirs

    lpips_files(tmp_path, random_lpips())
    layers, heads = torch.load(tmp_path / TRUNK.file), torch.load(tmp_path / HEADS.file)
    vgg = SimpleNamespace(features=make_layers(cfgs["D"]))
    vgg.features.load_state_dict({name.removeprefix("features."): value for name, value in layers.items()})
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: heads)
    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", lambda: vgg)
    reference = theirs.SampleSimilarityLPIPS("lpips-vgg16")
    a, b = noise(3, 40), noise(3, 40, seed=1)
    monkeypatch.setattr("fastgen.eval.lpips.TRUNK", replace(TRUNK, sha256=""))
    load_lpips.cache_clear()
    ours = load_lpips(replace(PHOTO, weights=tmp_path))
    load_lpips.cache_clear()
    expected = reference(a, b).flatten()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-6)
    assert (ours(a, a) == 0).all() and expected.min() > 0
    torch.testing.assert_close(ours(noise(1, 512), noise(1, 512, seed=1)), theirs_at_256(reference), rtol=1e-4, atol=1e-6)


def theirs_at_256(reference: torch.nn.Module) -> Tensor:
    reference.sample_similarity_resize = 256
    return reference(noise(1, 512), noise(1, 512, seed=1)).flatten()


def test_lpips_within_a_prompt_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch):
    images, network = noise(5), random_lpips()
    whole = lpips_matrix(images, network)
    monkeypatch.setattr("fastgen.eval.measures.diversity.BLOCK", 2)
    torch.testing.assert_close(lpips_matrix(images, network), whole)
    torch.testing.assert_close(whole, whole.T)
    assert (whole.diagonal() == 0).all()
    assert whole[1, 3] == pytest.approx(network(images[1:2], images[3:4]).item(), rel=1e-4)


def test_lpips_diversity_and_distance_to_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("diversity", "teacher_fidelity"):
        monkeypatch.setattr(f"fastgen.eval.measures.{module}.load_lpips", lambda world, device: random_lpips())
    images, prompts = noise(6), ["a", "b", "a", "b", "a", "b"]
    write_images(images, tmp_path)
    folder = PictureFolder(tmp_path)
    assert torch.equal(pick(folder, [1, 2, 3]), images[1:4]) and torch.equal(pick(folder, [0, 3, 4]), images[[0, 3, 4]])
    evidence = gather(folder, prompts, teacher=noise(6), world=PHOTO)
    scores = measure_images(evidence, ["lpips_diversity", "teacher_lpips"]).scores
    assert scores["lpips_diversity_teacher_ratio"] == pytest.approx(1)
    assert scores["teacher_lpips"] == 0
    pairs = [(0, 2), (0, 4), (2, 4), (1, 3), (1, 5), (3, 5)]
    by_hand = np.mean([random_lpips()(images[a : a + 1], images[b : b + 1]).item() for a, b in pairs])
    assert scores["lpips_diversity"] == pytest.approx(by_hand, rel=1e-4)


def test_weights_that_are_missing_or_wrong_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    evidence = gather(noise(4), list("aabb"), teacher=noise(4), world=replace(PHOTO, weights=tmp_path))
    measured = measure_images(evidence, ["lpips_diversity", "teacher_lpips", "teacher_pixels"])
    assert set(measured.scores) == {"teacher_rms"}
    assert all("weights-vgg16-lpips.pth" in note and str(tmp_path) in note for note in measured.notes)
    assert len(measured.notes) == 2
    lpips_files(tmp_path, random_lpips())
    with pytest.raises(UserError, match="does not begin with 397923af"):
        load_lpips(evidence.world)
    monkeypatch.setattr("fastgen.eval.lpips.TRUNK", replace(TRUNK, sha256=""))
    torch.save({"lin0.model.1.weight": torch.ones(3)}, tmp_path / HEADS.file)
    with pytest.raises(UserError, match=r"weights-vgg16-lpips\.pth does not hold what LPIPS needs: heads\.0"):
        load_lpips(evidence.world)


# -- colour ----------------------------------------------------------------------------------------------------------------


def plain(*colour: int, size: int = 8) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(1, 3, size, size).clone()


def test_colour_of_plain_pictures():
    grey = {key: value.item() for key, value in colour_statistics(plain(51, 51, 51)).items()}
    zero = {"contrast": 0, "saturation": 0, "colourfulness": 0, "clipped": 0, "sharpness": 0}
    assert grey == pytest.approx({"brightness": 0.2, **zero}, abs=1e-9)
    red = {key: value.item() for key, value in colour_statistics(plain(255, 0, 0)).items()}
    # rg = 255, yb = 127.5 everywhere: no deviation, 0.3 times the length of the mean.
    assert red["colourfulness"] == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert red["saturation"] == red["clipped"] == 1 and red["brightness"] == pytest.approx(0.299)
    black = colour_statistics(plain(0, 0, 0))
    assert black["saturation"] == 0 and black["clipped"] == 1 and black["brightness"] == 0


def test_colour_statistics_by_other_means():
    images = noise(3, 12)
    found = colour_statistics(images)
    for i, picture in enumerate(images.permute(0, 2, 3, 1).numpy().astype(float)):
        pixels = picture.reshape(-1, 3)
        assert found["saturation"][i] == pytest.approx(np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels]))
        luma = np.array(Image.fromarray(picture.astype(np.uint8)).convert("L"), dtype=float)  # rounded to whole numbers
        assert found["brightness"][i] == pytest.approx(luma.mean() / 255, abs=0.003)
        assert found["contrast"][i] == pytest.approx(luma.std() / 255, abs=0.003)
        rg, yb = pixels[:, 0] - pixels[:, 1], pixels[:, :2].mean(1) - pixels[:, 2]
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert found["colourfulness"][i] == pytest.approx(expected)
        exact = picture @ np.array([0.299, 0.587, 0.114])
        kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        windows = np.lib.stride_tricks.sliding_window_view(exact, (3, 3))
        assert found["sharpness"][i] == pytest.approx((windows * kernel).sum((2, 3)).var())
        assert found["clipped"][i] == pytest.approx(((pixels == 0) | (pixels == 255)).any(1).mean())


def test_contrast_and_sharpness_of_a_chequerboard():
    board = (255 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2)).to(torch.uint8).expand(1, 3, 8, 8)
    found = colour_statistics(board)
    assert found["contrast"].item() == pytest.approx(0.5)
    assert found["sharpness"].item() == pytest.approx((4 * 255) ** 2)
    assert colour_statistics(board[..., :2, :2])["sharpness"].item() == 0


def test_oversaturation_shows_against_teacher_and_real():
    prompts, scenes, images, teacher = world()
    floats = from_uint8(images)
    stronger = to_uint8(floats.mean(1, keepdim=True) + 1.5 * (floats - floats.mean(1, keepdim=True)))
    measured = measure_images(gather(stronger, prompts, scenes=scenes, teacher=teacher), ["colour"])
    scores = measured.scores
    assert scores["saturation_teacher_ratio"] > 1.15 and scores["saturation_ratio"] > 1.15
    assert scores["colourfulness_teacher_ratio"] > 1.2 and scores["clipped"] > 0.05
    assert scores["brightness_teacher_ratio"] == pytest.approx(1, abs=0.06)
    low, high = measured.intervals["saturation_teacher_ratio"]
    assert 1 < low < high
    assert len(measured.each["saturation"]) == NUMBER
    same = measure_images(gather(images, prompts, scenes=scenes, teacher=images), ["colour"])
    assert same.scores["saturation_teacher_ratio"] == 1 and same.intervals["saturation_teacher_ratio"] == (1, 1)


def test_blur_shows_as_less_sharpness():
    prompts, scenes, images, teacher = world()
    soft = to_uint8(torch.nn.functional.avg_pool2d(from_uint8(images), 3, 1, 1, count_include_pad=False))
    scores = measure_images(gather(soft, prompts, scenes=scenes, teacher=teacher), ["colour"]).scores
    assert scores["sharpness_teacher_ratio"] < 0.3
    assert scores["colourfulness_teacher_ratio"] == pytest.approx(1, abs=0.15)


def test_colour_of_a_folder_is_that_of_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastgen.eval.measures.colour.PIXELS", 5 * 36 + 1)
    images = noise(37, 6)
    write_images(images, tmp_path)
    for key, value in statistics_of(PictureFolder(tmp_path)).items():
        torch.testing.assert_close(value, colour_statistics(images)[key])


# -- the teacher -----------------------------------------------------------------------------------------------------------


def test_distance_to_the_teacher_by_hand():
    assert root_mean_square(plain(10, 20, 30), plain(10, 20, 30)).item() == 0
    assert root_mean_square(plain(0, 0, 0), plain(255, 255, 255)).item() == 1
    assert root_mean_square(plain(0, 0, 51), plain(0, 0, 0)).item() == pytest.approx(0.2 / 3**0.5)
    mine, theirs = torch.zeros(4, 2), torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])
    assert to_other_seeds(mine, theirs, ["a", "a", "a", "b"]).tolist() == pytest.approx([2.5, 2, 1.5])
    assert to_other_seeds(mine, theirs, list("abcd")) is None


def test_a_student_that_keeps_its_teachers_pictures():
    prompts, scenes, images, teacher = world()
    names = ["teacher_pixels", "teacher_fidelity"]
    measured = measure_images(gather(teacher, prompts, scenes=scenes, teacher=teacher), names)
    assert measured.scores["teacher_rms"] == measured.scores["teacher_distance"] == 0
    assert measured.scores["teacher_distance_other"] > 1
    other = measure_images(gather(images, prompts, scenes=scenes, teacher=teacher), names)
    assert other.scores["teacher_distance"] == pytest.approx(other.scores["teacher_distance_other"], rel=0.05)
    assert len(other.each["teacher_rms"]) == len(other.each["teacher_distance"]) == NUMBER


def test_another_size_than_the_teachers_is_named():
    measured = measure_images(gather(noise(2, 8), teacher=noise(2, 16), world=PHOTO), ["teacher_pixels"])
    assert measured.scores == {} and "the teacher's images are 16 x 16, the student's 8 x 8" in measured.notes[0]
