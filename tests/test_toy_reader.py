"""The toy world's checker: it learns, the shipped one reads what was drawn, and damage does not pass unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgen.data.toy.corruptions import CORRUPTIONS, corrupt, damage
from fastgen.data.toy.reader import (
    SceneReader,
    correct,
    load_reader,
    read,
    save_reader,
    shipped_reader,
    train_reader,
    training_batch,
)
from fastgen.data.toy.scenes import render, sample_scenes
from fastgen.errors import UserError


def drawn(number: int, seed: int = 7, **options):
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(number, generator, **options)
    return scenes, render(scenes, generator)


def test_a_few_updates_lower_the_loss():
    history = []
    train_reader(51, 64, report=lambda update, losses: history.append(losses))
    assert history[-1]["background"] < 0.5 * history[0]["background"]
    assert history[-1]["corruption"] < 0.7 * history[0]["corruption"]


def test_training_repeats_itself():
    first, second = (train_reader(3, 8, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_the_shipped_reader_reads_new_renders(split):
    scenes, images = drawn(1000, split=split)
    assert correct(images, scenes)["strict"].float().mean() > 0.97


def test_correct_names_what_is_wrong():
    scenes, images = drawn(200, objects=2)
    for attribute, size in (("shape", 6), ("colour", 8), ("size", 2), ("texture", 2), ("axis", 2), ("background", 5)):
        asked = scenes[:]
        changed = getattr(scenes, attribute).clone()
        changed[..., -1] = (changed[..., -1] + 1) % size
        if changed.ndim == 1:
            changed = (getattr(scenes, attribute) + 1) % size
        setattr(asked, attribute, changed)
        right = correct(images, asked)
        assert not right["strict"].any() or right["strict"].float().mean() < 0.03
        assert right[attribute].float().mean() < 0.03
        assert right["count"].float().mean() > 0.97


def test_a_missing_object_is_not_strictly_right():
    scenes, _ = drawn(200, objects=2)
    _, alone = drawn(200, objects=1)
    right = correct(alone, scenes)
    assert right["count"].float().mean() < 0.03
    assert right["strict"].float().mean() < 0.03


def test_an_absent_object_is_read_as_zeros():
    _, images = drawn(100, objects=1)
    seen = read(images)
    alone = seen.count == 1
    assert alone.float().mean() > 0.97
    for name in ("shape", "colour", "size", "texture"):
        assert (getattr(seen, name)[alone, 1] == 0).all()
    assert (seen.axis[alone] == 0).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damage_is_seen(name):
    _, images = drawn(300)
    damaged = damage(images, name, 0.8, torch.Generator().manual_seed(1))
    head = CORRUPTIONS.index(name)
    reader = shipped_reader()
    before, after = (reader(some)["corruption"][:, head].sigmoid().mean() for some in (images, damaged))
    assert after > before + 0.3


def test_corrupt_reports_what_it_did():
    _, images = drawn(400)
    damaged, strengths = corrupt(images, torch.Generator().manual_seed(2))
    untouched = (strengths == 0).all(1)
    assert 0.2 < untouched.float().mean() < 0.6
    assert torch.equal(damaged[untouched], images[untouched])
    assert (strengths >= 0).all() and (strengths <= 1).all() and damaged.abs().max() <= 1
    assert corrupt(images, torch.Generator().manual_seed(2), probability=0.0)[1].sum() == 0


def test_destroyed_pictures_teach_nothing_about_their_scene():
    _, _, strengths, weight = training_batch(300, torch.Generator().manual_seed(3))
    shuffled = strengths[:, CORRUPTIONS.index("shuffle")] > 0.4
    assert shuffled.any() and (weight[shuffled] == 0).all()
    assert (weight[(strengths == 0).all(1)] == 1).all()


def test_save_and_load_keep_the_answers(tmp_path: Path):
    _, images = drawn(50)
    save_reader(shipped_reader(), tmp_path / "reader")
    again = load_reader(tmp_path / "reader")
    torch.testing.assert_close(again.features(images), shipped_reader().features(images))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_reader(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    save_reader(SceneReader(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    state.pop("corruption_head.bias")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"corruption_head\.bias"):
        load_reader(tmp_path)
