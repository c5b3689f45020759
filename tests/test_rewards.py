"""Rewards: the toy world's CLIP agrees with the metric and can be climbed; an aesthetic head; what is missing is said."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastgen.data.toy.captions import caption
from fastgen.data.toy.scenes import render, sample_scenes
from fastgen.errors import UserError
from fastgen.eval.measures.clip_score import clip_scores
from fastgen.eval.world import TOY
from fastgen.rewards import TOY_WEIGHTS, AestheticReward, head_layers, load_clip, load_reward


@pytest.fixture(scope="module")
def toy() -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(3)
    scenes = sample_scenes(24, generator)
    return render(scenes, generator), caption(scenes)


def test_it_is_the_metric(toy: tuple[torch.Tensor, list[str]]) -> None:
    images, prompts = toy
    found = load_reward("toy-clip")(images, prompts)
    rounded = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(100 * found, clip_scores(rounded, prompts, TOY), rtol=0, atol=0.7)
    wrong = load_reward("toy-clip")(images, prompts[1:] + prompts[:1])
    assert found.shape == (24,) and found.mean() > wrong.mean() + 0.2


def test_it_can_be_climbed(toy: tuple[torch.Tensor, list[str]]) -> None:
    images, prompts = toy
    reward = load_reward("toy-clip")
    x = (0.5 * images.roll(1, 0)).clone().requires_grad_()
    before = reward(x, prompts)
    (up,) = torch.autograd.grad(before.sum(), x)
    assert up.isfinite().all() and (up.flatten(1).norm(dim=1) > 0).all()
    after = reward(x + 0.3 * up / up.flatten(1).norm(dim=1).view(-1, 1, 1, 1), prompts)
    assert (after > before).float().mean() > 0.9


def test_images_of_another_size_are_cut_and_resized(toy: tuple[torch.Tensor, list[str]]) -> None:
    images, prompts = toy
    reward = load_reward("toy-clip")
    large = nn.functional.interpolate(images, scale_factor=4, mode="nearest")
    wide = torch.cat([large[..., :48] * 0, large, large[..., :48] * 0], 3)
    torch.testing.assert_close(reward(wide, prompts), reward(large, prompts), rtol=1e-5, atol=1e-5)
    assert (reward(large, prompts) - reward(images, prompts)).abs().mean() < 0.1


def test_an_aesthetic_head(toy: tuple[torch.Tensor, list[str]], tmp_path: Path) -> None:
    images, prompts = toy
    head = nn.Sequential(nn.Linear(96, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 1)).eval()
    save_file({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.safetensors")
    clip = load_reward("toy-clip")
    reward = AestheticReward(clip, head_layers(tmp_path / "head.safetensors"))  # type: ignore[arg-type]
    expected = head(clip.embed(images)).squeeze(1) / 10  # type: ignore[attr-defined]
    torch.testing.assert_close(reward(images, prompts), expected.detach())
    many = {f"layers.{10 - i}.weight": torch.zeros(1, 1) for i in range(3)} | {
        f"layers.{10 - i}.bias": torch.full((1,), float(i)) for i in range(3)
    }
    save_file(many, tmp_path / "order.safetensors")
    assert [float(bias) for _, bias in head_layers(tmp_path / "order.safetensors")] == [2.0, 1.0, 0.0]
    save_file({"weight": torch.zeros(1, 768), "bias": torch.ones(1)}, tmp_path / "linear.safetensors")
    assert len(head_layers(tmp_path / "linear.safetensors")) == 1


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(UserError, match='no reward \'beauty\'; give "toy-clip", "clip:MODEL/WEIGHTS" or "aesthetic:FILE"'):
        load_reward("beauty")
    with pytest.raises(UserError, match="open_clip has no model 'ViT-Q'"):
        load_reward("clip:ViT-Q")
    with pytest.raises(UserError, match=r"weights of CLIP 'ViT-L-14/openai' are not in .* `hf download timm/"):
        load_reward("clip:ViT-L-14/openai")
    with pytest.raises(UserError, match=r"aesthetic head .*nowhere\.safetensors is missing"):
        load_reward(f"aesthetic:{tmp_path / 'nowhere.safetensors'}")
    (tmp_path / "head.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"head\.pth is not in safetensors"):
        load_reward(f"aesthetic:{tmp_path / 'head.pth'}")
    save_file({"layers.0.weight": torch.zeros(8, 96), "layers.0.bias": torch.zeros(8)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="linear layers that end in one number are expected"):
        head_layers(tmp_path / "wide.safetensors")
    save_file({"layers.0.weight": torch.zeros(8, 96)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"layers\.0 is not a linear layer"):
        head_layers(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(("weights", "wanted"), [("openai", True), ("laion2b_s34b_b79k", False), (None, False)])
def test_weights_run_with_the_activation_they_were_trained_with(
    weights: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    made = open_clip.create_model(f"local-dir:{TOY_WEIGHTS}")
    monkeypatch.setattr("open_clip.create_model", lambda name, **options: seen.update(options) or made)
    load_clip("ViT-B-32", weights, "cpu")
    assert seen["force_quick_gelu"] is wanted and seen["pretrained"] == weights
