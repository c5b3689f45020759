"""Measuring networks: CLIP by hand, its activation, DMD2's CLIP score, CMMD in closed form, similarity, aesthetic heads."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop

from fastgen.data.toy.captions import caption
from fastgen.data.toy.clip import WEIGHTS
from fastgen.data.toy.corruptions import damage
from fastgen.errors import UserError
from fastgen.eval import PHOTO, TOY, score_images
from fastgen.eval.evaluation import real_images, toy_prompts
from fastgen.eval.images import from_uint8, to_pillow, to_uint8
from fastgen.eval.measures import aesthetic, clip_score, cmmd, similarity
from fastgen.eval.networks import towers
from fastgen.eval.networks.heads import linear_head
from fastgen.eval.registry import Evidence, metrics
from fastgen.eval.weights import file_hash
from fastgen.eval.world import World

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@cache
def toys(number: int = 128) -> tuple[list[str], Any, Tensor]:
    prompts, _, scenes = toy_prompts(number)
    return prompts, scenes, real_images(scenes, 11)


def photos(number: int = 5, height: int = 48, width: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (255 * torch.rand(number, 3, height, width, generator=generator)).round().to(torch.uint8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """open_clip's architecture `name` made tiny, with random weights in a folder as `repository` names it."""

    def make(name: str, repository: str) -> tuple[World, nn.Module]:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY)
        torch.manual_seed(0)
        model = open_clip.create_model(name, force_quick_gelu=name in ("ViT-B-32", "ViT-L-14", "ViT-L-14-336"))
        (tmp_path / repository).mkdir(parents=True)
        save_file(model.state_dict(), tmp_path / repository / "open_clip_model.safetensors")
        towers.known_clip.cache_clear()
        return replace(PHOTO, weights=tmp_path), model.eval()

    yield make
    towers.known_clip.cache_clear()


def test_openai_weights_of_a_folder_are_run_with_their_own_activation(tiny: Any) -> None:
    world, model = tiny("ViT-B-32", "timm/vit_base_patch32_clip_224.openai")
    images, prompts = photos(), ["a dog", "two cats", "a red cube", "", "a field at night"]
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    preprocess = open_clip.image_transform(
        32, False, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, interpolation="bicubic"
    )
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(picture) for picture in to_pillow(images)]))
        said = model.encode_text(open_clip.tokenize(prompts))
    by_hand = 100 * F.cosine_similarity(seen, said)
    torch.testing.assert_close(clip_score.clip_scores(images, prompts, world, batch=2), by_hand, atol=1e-4, rtol=1e-5)
    plain = open_clip.create_model("ViT-B-32")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        other = plain.eval().encode_image(torch.stack([preprocess(picture) for picture in to_pillow(images)]))
    assert (F.normalize(seen) - F.normalize(other)).abs().max() > 1e-4


def test_the_records_name_the_weights(tiny: Any) -> None:
    world, _ = tiny("ViT-B-32", "timm/vit_base_patch32_clip_224.openai")
    path = clip_score.clip_weights(world)
    assert path is not None and path.is_relative_to(world.weights)
    assert clip_score.clip_weights(PHOTO) is None
    assert clip_score.clip_weights(TOY) == WEIGHTS / "open_clip_model.safetensors"
    large = towers.clip_weights("ViT-bigG-14/laion2b_s39b_b160k")
    assert (large.origin, large.file) == ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "open_clip_model.safetensors")
    known = towers.hash_at_hand(towers.clip_weights("ViT-B-32/openai"), world)
    assert known == file_hash(path) and towers.hash_at_hand(towers.clip_weights("ViT-L-14/openai"), world) is None


def test_weights_of_another_network_are_refused_with_their_file(tiny: Any, tmp_path: Path) -> None:
    world, _ = tiny("ViT-B-32", "timm/vit_base_patch32_clip_224.openai")
    save_file({"logit_scale": torch.zeros(())}, clip_score.clip_weights(world))
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors does not hold the weights of open_clip's ViT-B-32"):
        clip_score.load_clip(world)
    with pytest.raises(UserError, match="not published as safetensors"):
        clip_score.load_clip(replace(world, clip="ViTamin-S/datacomp1b"))
    with pytest.raises(UserError, match="open_clip has no model 'ViT-B-32/nothing'"):
        clip_score.load_clip(replace(world, clip="ViT-B-32/nothing"))


def test_dmd2s_clip_score_follows_its_evaluation(tiny: Any) -> None:
    world, model = tiny("ViT-g-14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K")
    prompts = ["a dog on a sofa", " ".join(["word"] * 90), "two birds"]
    images = photos(3, 60, 97)
    preprocess = open_clip.image_transform(32, False, interpolation="bicubic", mean=None, std=None)
    pixels = []
    for picture in to_pillow(images):
        squared = center_crop(picture, min(picture.size)).resize((256, 256), Image.Resampling.LANCZOS)
        pixels.append(preprocess(squared))
    # Three tokens are set between the start and the prompt, and the last place is the end's where the row is full.
    tokens, prefix = open_clip.tokenize(prompts), open_clip.tokenize("A photo depicts ")[:, 1:4].expand(3, -1)
    tokens = torch.cat([tokens[:, :1], prefix, tokens[:, 1:]], 1)[:, :77]
    tokens[:, 76:][tokens[:, 76:] > 0] = 49407
    with torch.no_grad():
        expected = 100 * F.cosine_similarity(model.encode_image(torch.stack(pixels)), model.encode_text(tokens)).mean()
    notes: list[str] = []
    found = score_images(images, prompts, world=world, only=["clip_score_dmd2"], notes=notes)
    assert found["clip_score_dmd2"] == pytest.approx(expected.item(), abs=1e-3)
    limit = "longer than the 77 tokens that CLIP ViT-g-14/laion2b_s12b_b42k reads"
    assert notes == [f"1 of 3 prompts are {limit}; it saw their beginnings."]


def test_prompts_that_are_cut_are_counted() -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    prompts = ["short", " ".join(["dog"] * 75), " ".join(["dog"] * 76), " ".join(["dog"] * 200), ""]
    assert towers.cut_prompts(prompts, tokenizer, 77) == 2
    assert towers.cut_prompts([], tokenizer, 77) == 0
    clip = towers.toy_clip()
    assert towers.cut_prompts(toys()[0], clip.tokenizer, clip.context) == 0
    assert towers.cut_prompts(["red " * 22, "red " * 23], clip.tokenizer, clip.context) == 1


def kernel_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """Expectation of the Gaussian kernel between two Gaussians whose difference has this mean and diagonal variance."""
    total = cmmd.SIGMA**2 + variance
    return (cmmd.SIGMA**2 / total).sqrt().prod() * (-0.5 * mean.square() / total).sum().exp()


def test_cmmd_of_two_gaussians_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    number, wide = 1000, torch.tensor([6.0, 2.0, 9.0], dtype=torch.float64)
    shift = torch.tensor([4.0, -3.0, 1.0], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    exact = kernel_mean(0 * shift, 2 * one) + kernel_mean(0 * shift, 2 * wide**2) - 2 * kernel_mean(shift, one + wide**2)
    # The biased estimator counts each image with itself, where the kernel is 1.
    own = sum((1 - kernel_mean(0 * shift, 2 * scale**2)) / number for scale in (one, wide))
    found = []
    for _ in range(8):
        x, y = (torch.randn(number, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        found.append(cmmd.discrepancy(x, y * wide + shift))
    values = torch.tensor([score.value for score in found])
    expected = 1000 * (exact + own).item()
    errors = torch.tensor([score.error for score in found])
    assert abs(values.mean().item() - expected) < 3 * errors.mean().item() / 8**0.5
    assert 0.4 < errors.mean() / values.std() < 2.5


def test_cmmd_is_the_authors_formula_and_never_keeps_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (F.normalize(torch.randn(n, 16, generator=generator)).double() for n in (50, 37))

    def k(a: Tensor, b: Tensor) -> Tensor:
        squares = -2 * a @ b.T + (a @ a.T).diag()[:, None] + (b @ b.T).diag()[None]
        return (-squares / 200).exp().mean()

    expected = 1000 * (k(x, x) + k(y, y) - 2 * k(x, y)).item()
    assert cmmd.discrepancy(x, y).value == pytest.approx(expected, rel=1e-9)
    largest = 0
    whole = torch.Tensor.exp_

    def watched(values: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, values.numel())
        return whole(values)

    monkeypatch.setattr(torch.Tensor, "exp_", watched)
    torch.testing.assert_close(cmmd.kernel_means(x, y, rows=8), cmmd.kernel_means(x, y))
    largest = 0
    cmmd.kernel_means(x, y, rows=8)
    assert largest == 8 * 37


def test_cmmd_in_the_toy_world_sees_damage_and_spaces_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, scenes, images = toys()
    clean = score_images(images, prompts, scenes=scenes, only=["cmmd"])
    assert 0 < clean["cmmd"] < 2 * clean["cmmd_floor"]
    worse = to_uint8(damage(from_uint8(images), "blur", 0.7, torch.Generator().manual_seed(0)))
    assert score_images(worse, prompts, scenes=scenes, only=["cmmd"])["cmmd"] > 5 * clean["cmmd"]
    monkeypatch.setattr(cmmd, "LARGEST", 32)
    notes: list[str] = []
    score_images(images, prompts, scenes=scenes, only=["cmmd"], notes=notes)
    assert notes == ["CMMD looks at 32 images of a set, evenly spaced; there are up to 128."]
    clip = towers.toy_clip()
    torch.testing.assert_close(cmmd.few_embeddings(clip, images), towers.embeddings(clip, images[::4]), atol=1e-5, rtol=1e-4)


def test_cmmd_of_photographs_looks_through_the_large_clip(tiny: Any) -> None:
    world, model = tiny("ViT-L-14-336", "timm/vit_large_patch14_clip_336.openai")
    images, reference = photos(6), photos(7, seed=1)
    preprocess = open_clip.image_transform(32, False, interpolation="bicubic", mean=None, std=None)
    sets = []
    for each in (images, reference):
        with torch.no_grad():
            sets.append(model.encode_image(torch.stack([preprocess(p) for p in to_pillow(each)]), normalize=True))
    found = score_images(images, reference=reference, world=world, only=["cmmd"])
    assert found["cmmd"] == pytest.approx(cmmd.discrepancy(*sets).value, rel=1e-3)


def test_similarity_is_one_for_the_same_images_and_falls_with_damage() -> None:
    prompts, scenes, images = toys()
    same = score_images(images, prompts, scenes=scenes, teacher=images, only=["clip_similarity", "clip_similarity_real"])
    assert same["clip_similarity"] == pytest.approx(1, abs=1e-5) and 0.5 < same["clip_similarity_real"] < 1
    other = score_images(images.roll(7, 0), prompts, scenes=scenes, teacher=images, only=["clip_similarity"])
    assert other["clip_similarity"] < same["clip_similarity_real"] - 0.05
    notes: list[str] = []
    unpaired = {"reference": images, "world": TOY, "notes": notes}
    assert score_images(images, prompts, only=["clip_similarity_real"], **unpaired) == {}
    assert "do not belong to the images one by one" in notes[0]


def test_similarity_by_dino_is_the_cosine_of_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {which: photos(3, seed=seed) for seed, which in enumerate(("images", "teacher", "reference"))}
    features = {which: torch.randn(3, 8, dtype=torch.float64) for which in images}

    def extract(shown: Tensor, world: World, *, device: str, name: str) -> dict[str, Tensor]:
        assert torch.equal(shown, images[name]) and world.features == "dinov2-vit-b-14" and device == "cpu"
        return {"fid": features[name]}

    monkeypatch.setattr(similarity, "extract", extract)
    given = Evidence(images["images"], PHOTO, reference=images["reference"], teacher=images["teacher"], paired=True)
    found = metrics()["dino_similarity"].measure(given)["dino_similarity"]
    real = metrics()["dino_similarity_real"].measure(given)["dino_similarity_real"]
    torch.testing.assert_close(found.each, F.cosine_similarity(features["images"], features["teacher"]).float())
    assert real.value == pytest.approx(F.cosine_similarity(features["images"], features["reference"]).mean().item())


def head(width: int, sizes: tuple[int, ...] = (8, 6, 4, 3, 1)) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The improved predictor's layers with their dropout between, at other sizes."""
    torch.manual_seed(2)
    linear = [nn.Linear(a, b) for a, b in zip((width, *sizes), sizes, strict=False)]
    layers = nn.Sequential(linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), *linear[3:])
    return layers.eval(), {f"layers.{name}": value for name, value in layers.state_dict().items()}


def test_aesthetic_scores_are_the_heads_on_unit_embeddings(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world, model = tiny("ViT-L-14", "timm/vit_large_patch14_clip_224.openai")
    layers, tensors = head(24)
    first = nn.Linear(24, 1)
    for predictor, content in ((aesthetic.IMPROVED, tensors), (aesthetic.FIRST, first.state_dict())):
        torch.save(content, world.weights / predictor.weights.file)
    images = photos(5)
    notes: list[str] = []
    assert score_images(images, world=world, only=["aesthetic"], notes=notes) == {}
    assert "SHA-256 does not begin with 21dd590f3ccd" in notes[0]
    for name in ("IMPROVED", "FIRST"):
        known = getattr(aesthetic, name)
        monkeypatch.setattr(aesthetic, name, replace(known, weights=replace(known.weights, sha256="")))
    found = score_images(images, world=world, only=["aesthetic", "aesthetic_v1"])
    preprocess = open_clip.image_transform(32, False, interpolation="bicubic", mean=None, std=None)
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(p) for p in to_pillow(images)]), normalize=True)
        assert found["aesthetic"] == pytest.approx(layers(seen).mean().item(), abs=1e-5)
        assert found["aesthetic_v1"] == pytest.approx(first(seen).mean().item(), abs=1e-5)


def test_heads_that_are_something_else_are_refused() -> None:
    _, tensors = head(24)
    names, path = aesthetic.IMPROVED.layers, Path("head.pth")
    with pytest.raises(UserError, match=r"layers\.2 is not a linear layer of 8 numbers"):
        linear_head({name: value for name, value in tensors.items() if "2." not in name}, names, path)
    with pytest.raises(UserError, match=r"layers\.0 is not a linear layer of 768 numbers"):
        linear_head(tensors, names, path, width=768)
    with pytest.raises(UserError, match="it ends in 3 numbers"):
        linear_head(tensors, names[:-1], path)


def test_what_is_missing_is_named_with_its_origin_and_place(tmp_path: Path) -> None:
    world = replace(PHOTO, weights=tmp_path)
    large = ["cmmd", "aesthetic", "aesthetic_v1", "clip_score", "clip_score_dmd2", "hps", "pick_score", "image_reward"]
    notes: list[str] = []
    images = photos(4)
    found = score_images(images, ["a"] * 4, reference=images, teacher=images, world=world, only=large, notes=notes)
    assert found == {} and len(notes) == len(large)
    for file in (
        "timm/vit_large_patch14_clip_336.openai/resolve/main/open_clip_model.safetensors",
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "sa_0_4_vit_l_14_linear.pth",
        "timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors",
        "laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/open_clip_model.safetensors",
        "xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
        "yuvalkirstain/PickScore_v1/resolve/main/model.safetensors",
        "THUDM/ImageReward/resolve/main/ImageReward.pt",
    ):
        assert sum(file in note and str(tmp_path) in note for note in notes) == 1, file


def test_large_networks_are_asked_for_by_name_and_never_in_the_toy_world() -> None:
    for name in ("aesthetic", "aesthetic_v1", "clip_score_dmd2", "hps", "pick_score", "image_reward", "dino_similarity"):
        entry = metrics()[name]
        assert entry.worlds == ("photo",) and not entry.usual
    prompts, scenes, images = toys()
    assert caption(scenes[:1]) and not metrics()["cmmd"].usual
    with pytest.raises(UserError, match="the metric hps measures photo pictures"):
        score_images(images, prompts, scenes=scenes, only=["hps"])
