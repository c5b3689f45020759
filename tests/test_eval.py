"""Evaluation: metrics agree with the libraries they come from and with closed forms, and move the way they should."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.data.toy.captions import caption
from fastgen.data.toy.clip import EDITS, WEIGHTS, near_misses, save_clip, train_clip
from fastgen.data.toy.corruptions import damage
from fastgen.data.toy.scenes import Scenes, render, sample_scenes
from fastgen.errors import UserError
from fastgen.eval import PHOTO, TOY, World, evaluate, metrics, readings, score_images
from fastgen.eval.evaluation import real_images, toy_prompts
from fastgen.eval.features import extract
from fastgen.eval.generate import generate, load_pipeline, noise_seed
from fastgen.eval.images import from_uint8, read_images, to_pillow, to_uint8, write_images
from fastgen.eval.measures.clip_score import clip_scores, load_clip
from fastgen.eval.measures.diversity import pairwise_distance
from fastgen.eval.registry import Reading, metric

NUMBER = 400


@cache
def world() -> tuple[list[str], Scenes, Tensor]:
    """Prompts (each twice), scenes and real images that are neither the reference nor the floor."""
    prompts, _, scenes = toy_prompts(NUMBER)
    return prompts, scenes, real_images(scenes, 11)


@cache
def damaged(name: str) -> dict[str, float]:
    prompts, scenes, images = world()
    worse = damage(from_uint8(images), name, 0.7, torch.Generator().manual_seed(0))
    return score_images(to_uint8(worse), prompts, scenes=scenes)


@cache
def clean() -> dict[str, float]:
    prompts, scenes, images = world()
    return score_images(images, prompts, scenes=scenes)


def test_every_number_can_be_shown():
    assert set(clean()) <= set(readings())
    assert {"fidelity", "clip_score", "accuracy", "diversity"} <= metrics().keys()


def test_real_images_score_like_real_images():
    scores = clean()
    assert scores["accuracy"] > 0.97
    assert scores["fd"] < 1.3 * scores["fd_floor"]
    assert abs(scores["precision"] - scores["precision_floor"]) < 0.1
    assert abs(scores["clip_score"] - scores["clip_score_real"]) < 1
    assert abs(scores["diversity_ratio"] - 1) < 0.1


@pytest.mark.parametrize("name", ["blur", "noise", "contrast", "coarse", "shuffle", "blend", "warp"])
def test_damage_shows_in_every_metric(name):
    scores, best = damaged(name), clean()
    assert scores["fd"] > 10 * scores["fd_floor"]
    assert scores["precision"] < best["precision"] - 0.5
    assert scores["accuracy"] < best["accuracy"]
    assert scores["clip_score"] < best["clip_score"]


def test_clip_score_equals_open_clip_by_hand():
    prompts, _, images = world()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{WEIGHTS}")
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([preprocess(p) for p in to_pillow(images[:10])]))
        said = model.encode_text(tokenizer(prompts[:10]))
    by_hand = 100 * torch.nn.functional.cosine_similarity(seen, said)
    torch.testing.assert_close(clip_scores(images[:10], prompts[:10], TOY, batch=3), by_hand, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("edit", EDITS)
def test_right_captions_score_above_near_misses(edit):
    generator = torch.Generator().manual_seed(4)
    scenes = sample_scenes(200, generator, objects=2)
    images = to_uint8(render(scenes, generator))
    right = clip_scores(images, caption(scenes, generator), TOY)
    wrong = clip_scores(images, caption(near_misses(scenes, generator, edit=edit), generator), TOY)
    assert right.mean() > wrong.mean() + 5
    assert (right > wrong).float().mean() > 0.8


@pytest.mark.parametrize("edit", EDITS)
def test_near_misses_differ(edit):
    scenes = sample_scenes(300, torch.Generator().manual_seed(4))
    wrong = near_misses(scenes, torch.Generator().manual_seed(5), edit=edit)
    assert all(a != b for a, b in zip(caption(scenes), caption(wrong), strict=True))
    assert torch.equal(wrong.count, scenes.count)


def test_a_few_updates_of_clip_lower_the_loss(tmp_path: Path):
    history = []
    model = train_clip(51, 16, pool=100, report=lambda update, losses: history.append(losses))
    assert history[-1]["contrast"] < history[0]["contrast"]
    save_clip(model, tmp_path / "clip")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}")
    assert {p.shape for p in again.parameters()} == {p.shape for p in model.parameters()}


def test_diversity_of_identical_images_is_zero():
    prompts, scenes, images = world()
    first = torch.tensor([prompts.index(prompt) for prompt in prompts])
    scores = score_images(images[first], prompts, scenes=scenes, only=["diversity"])
    assert scores["diversity"] == 0
    assert scores["diversity_ratio"] == 0


def test_diversity_by_hand_and_without_pairs():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    assert pairwise_distance(features, ["a", "a", "b", "b", "c"]) == pytest.approx((5 + 1) / 2)
    assert pairwise_distance(features, list("abcde")) is None
    _, scenes, images = world()
    notes: list[str] = []
    assert score_images(images[:8], [str(i) for i in range(8)], scenes=scenes[:8], only=["diversity"], notes=notes) == {}
    assert any("at least two images" in note for note in notes)


def test_no_toy_image_is_made_twice():
    prompts, seeds, scenes = toy_prompts(1000, seeds_per_prompt=2, objects=1)
    assert len(set(zip(prompts, seeds, strict=True))) == 1000 > 2 * len(set(prompts))
    assert caption(scenes[:1]) == caption(scenes[1:2]) and set(seeds) > {0, 1, 2}


def test_accuracy_is_split_by_the_number_of_objects():
    prompts, scenes, images = world()
    scores = clean()
    share = (scenes.count == 1).float().mean().item()
    assert scores["accuracy"] == pytest.approx(share * scores["accuracy_one"] + (1 - share) * scores["accuracy_two"])
    shuffled = score_images(images.roll(37, 0), prompts, scenes=scenes, only=["accuracy"])
    assert shuffled["accuracy"] < 0.05


def test_a_reference_twice_as_large_gives_the_floor():
    _, scenes, images = world()
    reference = torch.cat([real_images(scenes, 12), real_images(scenes, 13)])
    with_floor = score_images(images, reference=reference, world=TOY)
    assert with_floor["fd"] < 1.5 * with_floor["fd_floor"]
    notes: list[str] = []
    without = score_images(images, reference=reference[:NUMBER], world=TOY, notes=notes)
    assert "fd_floor" not in without and any("twice as many" in note for note in notes)


def test_few_images_are_named_with_their_number():
    prompts, scenes, images = world()
    notes: list[str] = []
    score_images(images[:60], prompts[:60], scenes=scenes[:60], only=["fidelity"], notes=notes)
    assert any("Only 60 images for 160 features" in note for note in notes)
    notes.clear()
    assert score_images(images[:3], prompts[:3], scenes=scenes[:3], only=["fidelity"], notes=notes) == {}
    assert any("3 neighbours" in note for note in notes)


def test_networks_that_are_not_there_are_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("fastgen.eval.weights.try_to_load_from_cache", lambda *_: None)
    prompts, scenes, images = world()
    notes: list[str] = []
    scores = score_images(images[:20], prompts[:20], scenes=scenes[:20], world=PHOTO, notes=notes)
    assert "accuracy" in scores and "fd" not in scores and "clip_score" not in scores
    assert any("weights-inception-2015-12-05-6726825d.pth" in note for note in notes)
    assert any("open_clip_model.safetensors" in note for note in notes)


def test_a_file_that_is_not_inception_is_never_unpickled(tmp_path: Path):
    fake = tmp_path / "inception.pth"
    fake.write_bytes(b"not the weights")
    with pytest.raises(UserError, match="does not begin with 6726825d"):
        extract(world()[2][:8], World("photo", "inception-v3-compat", "fastgen-toy", features_weights=fake))


def test_bad_input_is_named():
    prompts, scenes, images = world()
    with pytest.raises(UserError, match="uint8 tensor"):
        score_images(images.float(), prompts, scenes=scenes)
    with pytest.raises(UserError, match=f"5 prompts for {NUMBER} images"):
        score_images(images, prompts[:5], scenes=scenes)
    with pytest.raises(UserError, match="no metric is called 'fid'"):
        score_images(images, prompts, scenes=scenes, only=["fid"])
    with pytest.raises(UserError, match="32 x 32"):
        extract(torch.zeros(8, 3, 48, 64, dtype=torch.uint8), TOY)
    with pytest.raises(UserError, match="no feature extractor is called 'nothing'"):
        extract(images[:8], World("x", "nothing", "fastgen-toy"))
    with pytest.raises(UserError, match="no model 'nothing'"):
        load_clip(World("x", "fastgen-toy", "nothing"))
    with pytest.raises(UserError, match="1 of 2 images hold NaN"):
        to_uint8(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), float("nan"))]))


def test_features_with_nan_are_named(monkeypatch: pytest.MonkeyPatch):
    def broken(images: Tensor) -> Tensor:
        return torch.full((len(images), 160), float("nan"))

    monkeypatch.setattr("fastgen.data.toy.reader.SceneReader.features", lambda self, images: broken(images))
    with pytest.raises(UserError, match="features of 8 of 8 images are NaN"):
        extract(world()[2][:8], TOY)


def test_pictures_go_to_disk_and_back(tmp_path: Path):
    images = world()[2][:5]
    write_images(images, tmp_path)
    assert torch.equal(read_images(tmp_path), images)
    assert torch.equal(read_images(tmp_path, limit=2), images[:2])
    assert torch.equal(to_uint8(from_uint8(images)), images)


def test_unusable_folders_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="is not a folder"):
        read_images(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no pictures"):
        read_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 9)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"mixes sizes \(8 x 8 and 6 x 9, the second in b\.png\)"):
        read_images(tmp_path)
    assert read_images(tmp_path, size=4).shape == (2, 3, 4, 4)
    (tmp_path / "c.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"c\.png cannot be read"):
        read_images(tmp_path, size=4)


def test_a_new_metric_needs_a_name_of_its_own():
    with pytest.raises(ValueError, match="registered already"):
        metric("sharpness", needs=("images",), readings={"fd": Reading("x", "low")})(lambda evidence: {})


def test_the_link_at_the_root_cannot_be_imported():
    file = Path(importlib.util.find_spec("fastgen.eval").origin)
    spec = importlib.util.spec_from_file_location("eval", file)
    with pytest.raises(ImportError, match=r"import fastgen\.eval"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@cache
def pipeline(size: int = 8):
    """A random UNet, VAE (4 times smaller grid) and text encoder in a stock pipeline class: 32 x 32 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from fastgen.data.toy.tokenizer import toy_tokenizer

    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    blocks = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = AutoencoderKL(latent_channels=4, down_block_types=down, up_block_types=up, **blocks)
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(), safety_checker=None, feature_extractor=None
    )


def test_an_image_depends_on_its_prompt_and_seed_alone():
    prompts = ["a small red circle", "a large blue ring", "a small red circle"]
    together = generate(pipeline(), prompts, [0, 0, 1], steps=2, guidance=2.0)
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.uint8
    alone = generate(pipeline(), prompts[1:2], [0], steps=2, guidance=2.0)
    assert (alone[0].int() - together[1].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[2])
    assert noise_seed("a", 0) != noise_seed("a", 1) != noise_seed("b", 1)


def test_evaluate_records_what_could_change_the_result(tmp_path: Path):
    pipeline().save_pretrained(tmp_path / "pipeline")
    options = {"number": 12, "steps": 2, "guidance": 1.5, "batch": 6}
    first = evaluate(tmp_path / "pipeline", output=tmp_path / "eval.json", images_folder=tmp_path / "images", **options)
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["scores"] == first.scores
    for key in ("number", "seeds", "prompts_sha256", "steps", "guidance", "features_sha256", "clip_sha256", "reference_sha256"):
        assert record["settings"][key] is not None, key
    assert record["settings"]["scheduler"]["class"] == "DDIMScheduler"
    assert record["settings"]["versions"]["torch-fidelity"]
    assert any(name.startswith("unet/") for name in record["settings"]["weights_sha256"])
    assert len(read_images(tmp_path / "images")) == 12
    again = evaluate(pipeline(), **options)
    assert again.scores == pytest.approx(first.scores, nan_ok=False)
    assert np.isfinite(list(first.scores.values())).all()


def test_prompts_of_ones_own_are_measured_against_a_folder(tmp_path: Path):
    write_images(world()[2][:20], tmp_path / "real")
    prompts = [
        "a small red circle on a black background",
        "a large blue ring on a white background",
        "a big pink cross, gray background",
    ]
    found = evaluate(pipeline(), prompts=prompts, seeds_per_prompt=3, steps=1, reference=tmp_path / "real", world=TOY)
    assert found.settings["number"] == 9 and {"fd", "fd_floor", "clip_score", "diversity"} <= set(found.scores)
    assert "accuracy" not in found.scores


def test_bad_targets_and_arguments_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        evaluate(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(UserError, match=r"which diffusers .* does not know"):
        load_pipeline(tmp_path)
    with pytest.raises(UserError, match="at least 1, not -1"):
        generate(pipeline(), ["a"], [0], steps=-1)
    with pytest.raises(UserError, match="1 prompts and 2 seeds"):
        generate(pipeline(), ["a"], [0, 1])
    with pytest.raises(UserError, match="takes no argument 'sharpness'"):
        generate(pipeline(), ["a"], [0], call={"sharpness": 3})
    with pytest.raises(UserError, match="number and seeds_per_prompt"):
        toy_prompts(0)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert list((tmp_path / "pickled").rglob("*.bin"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(tmp_path / "pickled")
