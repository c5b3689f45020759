"""Preference models: the authors' formulas on the same random networks, and every tensor of their files in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, pad, resize, to_tensor
from transformers import BertTokenizer, CLIPConfig, CLIPModel

from fastgen.errors import UserError
from fastgen.eval import PHOTO, score_images
from fastgen.eval.images import to_pillow
from fastgen.eval.measures import hps, image_reward, pick_score
from fastgen.eval.networks import blip

PROMPTS = ["a dog on a red sofa", "two cats", "", "a field at night, oil painting", " ".join(["word"] * 90)]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def photos(height: int = 48, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (255 * torch.rand(len(PROMPTS), 3, height, width, generator=generator)).round().to(torch.uint8)


def random_weights(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew, so that none is 0 or 1 by its initialisation."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# HPS v2.1


@pytest.fixture
def hps_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, hps.ARCHITECTURE, TINY)
    hps.load.cache_clear()
    model = random_weights(open_clip.create_model(hps.ARCHITECTURE))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / hps.WEIGHTS.file)
    yield replace(PHOTO, weights=tmp_path), model
    hps.load.cache_clear()


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (32, 32), (32, 20), (51, 51)])
def test_hps_is_its_authors_formula(hps_world: Any, size: tuple[int, int]) -> None:
    world, model = hps_world
    images, cosines = photos(*size), []
    for picture, prompt in zip(to_pillow(images), PROMPTS, strict=True):
        pixels = to_tensor(picture)
        scale = 32 / max(size)
        inner = [round(side * scale) for side in size]
        pixels = resize(pixels, inner, InterpolationMode.BICUBIC) if scale != 1 else pixels
        down, right = 32 - inner[0], 32 - inner[1]
        pixels = pad(pixels, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
        with torch.no_grad():
            seen, said, _ = model(normalize(pixels, MEAN, STD)[None], open_clip.tokenize([prompt]))
        cosines.append((seen @ said.T).diagonal())
    found = score_images(images, PROMPTS, world=world, only=["hps"])
    assert found["hps"] == pytest.approx(100 * torch.cat(cosines).mean().item(), abs=1e-3)


def test_hps_of_another_network_is_refused(hps_world: Any) -> None:
    world, _ = hps_world
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, world.weights / hps.WEIGHTS.file)
    with pytest.raises(UserError, match=r"HPS_v2\.1_compressed\.pt does not hold the weights of open_clip's ViT-H-14"):
        hps.load(world)


# PickScore

CLIP_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
CLIP_VISION = {**CLIP_TEXT, "hidden_size": 64, "patch_size": 16, "image_size": 32}


def pick_clip() -> CLIPModel:
    config = CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=24)
    return random_weights(CLIPModel(config))  # type: ignore[return-value]


def test_pick_score_is_its_authors_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = pick_clip(), photos()
    model.logit_scale.data.fill_(2.5)
    counters = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    file = tmp_path / pick_score.WEIGHTS.origin / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({**model.state_dict(), **counters}, file)
    monkeypatch.setitem(pick_score.build.__kwdefaults__, "text", CLIP_TEXT)
    monkeypatch.setitem(pick_score.build.__kwdefaults__, "vision", CLIP_VISION)
    monkeypatch.setitem(pick_score.build.__kwdefaults__, "width", 24)
    # The authors' version resized Pillow pictures; transformers 5 keeps that under a name of its own.
    by_pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = by_pillow(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=list(MEAN), image_std=list(STD)
    )
    pixels = processor(images=to_pillow(images), return_tensors="pt")["pixel_values"]
    # The end's number fills the row, as the authors' tokenizer does it, and is masked.
    tokens = open_clip.tokenize(PROMPTS)
    mask = (tokens != 0).long()
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=pixels)
        said = model.get_text_features(input_ids=tokens.masked_fill(mask == 0, 49407), attention_mask=mask)
    seen, said = (each if isinstance(each, Tensor) else each.pooler_output for each in (seen, said))
    seen, said = (each / torch.norm(each, dim=-1, keepdim=True) for each in (seen, said))
    scores = model.logit_scale.exp() * (said @ seen.T).diagonal()
    pick_score.load.cache_clear()
    notes: list[str] = []
    try:
        found = score_images(images, PROMPTS, world=replace(PHOTO, weights=tmp_path), only=["pick_score"], notes=notes)
    finally:
        pick_score.load.cache_clear()
    assert found["pick_score"] == pytest.approx(scores.mean().item(), abs=1e-3)
    assert scores.std() > 0.5
    assert notes == ["1 of 5 prompts are longer than the 77 tokens that PickScore reads; it saw their beginnings."]


def test_a_clip_of_other_sizes_is_no_pick_score() -> None:
    tensors, sizes = pick_clip().state_dict(), {"text": CLIP_TEXT, "vision": CLIP_VISION, "width": 24}
    pick_score.build(tensors, Path("model.safetensors"), **sizes)
    short = {name: tensor for name, tensor in tensors.items() if name != "visual_projection.weight"}
    for wrong, sentence in (
        (short, r"visual_projection\.weight is missing"),
        ({**tensors, "more": torch.zeros(1)}, "more is unexpected"),
        ({**tensors, "logit_scale": torch.zeros(3)}, "does not hold the weights of a CLIPModel"),
    ):
        with pytest.raises(UserError, match=sentence):
            pick_score.build(wrong, Path("model.safetensors"), **sizes)


def test_pick_score_has_the_size_of_open_clips_vit_h_14() -> None:
    with torch.device("meta"):
        clip = CLIPModel(
            CLIPConfig(text_config=dict(pick_score.TEXT), vision_config=dict(pick_score.VISION), projection_dim=1024)
        )
    assert sum(parameter.numel() for parameter in clip.parameters()) == 986_109_441


# ImageReward

VISION = {"image_size": 32, "patch_size": 16, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
          "intermediate_size": 40, "layer_norm_eps": 1e-6}  # fmt: skip
TEXT = {"vocab_size": 30524, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28,
        "encoder_hidden_size": 24, "max_position_embeddings": 64, "layer_norm_eps": 1e-12}  # fmt: skip


def layout(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of ImageReward's released file, as its repository's classes name them."""
    width, wide, inner = vision["hidden_size"], vision["intermediate_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    eye = "blip.visual_encoder."
    shapes |= {f"{eye}cls_token": (1, 1, width), f"{eye}pos_embed": (1, inner + 1, width)}
    layer(f"{eye}patch_embed.proj", width, 3, vision["patch_size"], vision["patch_size"])
    for i in range(vision["num_hidden_layers"]):
        layer(f"{eye}blocks.{i}.norm1", width)
        layer(f"{eye}blocks.{i}.attn.qkv", 3 * width, width)
        layer(f"{eye}blocks.{i}.attn.proj", width, width)
        layer(f"{eye}blocks.{i}.norm2", width)
        layer(f"{eye}blocks.{i}.mlp.fc1", wide, width)
        layer(f"{eye}blocks.{i}.mlp.fc2", width, wide)
    layer(f"{eye}norm", width)
    size, large, tongue = text["hidden_size"], text["intermediate_size"], "blip.text_encoder."
    shapes[f"{tongue}embeddings.position_ids"] = (1, text["max_position_embeddings"])
    shapes[f"{tongue}embeddings.word_embeddings.weight"] = (text["vocab_size"], size)
    shapes[f"{tongue}embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], size)
    layer(f"{tongue}embeddings.LayerNorm", size)
    for i in range(text["num_hidden_layers"]):
        for part, source in (("attention", size), ("crossattention", width)):
            layer(f"{tongue}encoder.layer.{i}.{part}.self.query", size, size)
            layer(f"{tongue}encoder.layer.{i}.{part}.self.key", size, source)
            layer(f"{tongue}encoder.layer.{i}.{part}.self.value", size, source)
            layer(f"{tongue}encoder.layer.{i}.{part}.output.dense", size, size)
            layer(f"{tongue}encoder.layer.{i}.{part}.output.LayerNorm", size)
        layer(f"{tongue}encoder.layer.{i}.intermediate.dense", large, size)
        layer(f"{tongue}encoder.layer.{i}.output.dense", size, large)
        layer(f"{tongue}encoder.layer.{i}.output.LayerNorm", size)
    layer("blip.vision_proj", 256, width)
    layer("blip.text_proj", 256, size)
    for number, (ins, outs) in zip((0, 2, 4, 6, 7), ((size, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        layer(f"mlp.layers.{number}", outs, ins)
    return shapes


def released(vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in layout(vision, text).items()}


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, L, D] to [B, M, D] with `heads` heads, before the output layer."""
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None].float()) * -10000.0
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def reward(tensors: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """ImageReward's forward pass on the tensors of its file, written out after its repository's vit.py and med.py."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    eye, tongue = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, tensors[f"{eye}.patch_embed.proj.weight"], tensors[f"{eye}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([tensors[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + tensors[f"{eye}.pos_embed"]
    for i in range(VISION["num_hidden_layers"]):
        block = f"{eye}.blocks.{i}"
        query, key, value = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(query, key, value, VISION["num_attention_heads"]), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    picture = norm(x, f"{eye}.norm", 1e-6)
    words = tensors[f"{tongue}.embeddings.word_embeddings.weight"][tokens]
    y = words + tensors[f"{tongue}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(y, f"{tongue}.embeddings.LayerNorm", 1e-12)
    for i in range(TEXT["num_hidden_layers"]):
        name = f"{tongue}.encoder.layer.{i}"
        for part, source, hidden in (("attention", None, mask), ("crossattention", picture, None)):
            over = y if source is None else source
            query, key, value = (
                linear(each, f"{name}.{part}.self.{kind}") for each, kind in ((y, "query"), (over, "key"), (over, "value"))
            )
            seen = linear(attend(query, key, value, TEXT["num_attention_heads"], hidden), f"{name}.{part}.output.dense")
            y = norm(seen + y, f"{name}.{part}.output.LayerNorm", 1e-12)
        out = linear(F.gelu(linear(y, f"{name}.intermediate.dense")), f"{name}.output.dense")
        y = norm(out + y, f"{name}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        z = linear(z, f"mlp.layers.{number}")
    return (z.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


def vocabulary(path: Path) -> Path:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "dog",
        "on",
        "red",
        "sofa",
        "two",
        "cat",
        "##s",
        ",",
        "field",
        "word",
    ]
    file = path / "vocab.txt"
    file.write_text("\n".join(words) + "\n", encoding="utf-8")
    return file


def test_image_reward_is_its_repositorys_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, images = released(), photos(70, 50)
    torch.save(tensors, tmp_path / "ImageReward.pt")
    folder = tmp_path / image_reward.VOCABULARY.origin
    folder.mkdir(parents=True)
    vocabulary(folder)
    monkeypatch.setitem(blip.build.__kwdefaults__, "vision", VISION)
    monkeypatch.setitem(blip.build.__kwdefaults__, "text", TEXT)
    world = replace(PHOTO, weights=tmp_path)
    image_reward.load.cache_clear()
    try:
        model = image_reward.load(world)
        tokens, mask = model.tokens(PROMPTS)
        expected = reward(tensors, model.preprocess(images), tokens, mask)
        torch.testing.assert_close(model.score(images, PROMPTS), expected, rtol=1e-3, atol=1e-4)
        assert expected.std() > 0.1 and tokens.shape == mask.shape == (5, 35)
        notes: list[str] = []
        found = score_images(images, PROMPTS, world=world, only=["image_reward"], notes=notes)
    finally:
        image_reward.load.cache_clear()
    assert found["image_reward"] == pytest.approx(expected.mean().item(), rel=1e-3)
    assert notes == ["1 of 5 prompts are longer than the 35 tokens that ImageReward reads; it saw their beginnings."]


def test_every_tensor_of_image_reward_has_one_place(tmp_path: Path) -> None:
    shapes = layout({**blip.VISION}, {**blip.TEXT})
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        parts = blip.sorted_out(tensors, Path("ImageReward.pt"))
        vision = blip.BlipVisionModel(blip.BlipVisionConfig(**blip.VISION)).state_dict()
        text = blip.BlipTextModel(blip.BlipTextConfig(**blip.TEXT, is_decoder=True), add_pooling_layer=False).state_dict()
    for part, wanted in zip(parts[:2], (vision, text), strict=True):
        assert {name: tensor.shape for name, tensor in part.items()} == {name: tensor.shape for name, tensor in wanted.items()}
    assert sum(map(len, parts)) == sum(not name.startswith(blip.UNUSED) for name in shapes) == len(shapes) - 5
    file = vocabulary(tmp_path)
    for wrong, sentence in (
        ({**released(), "blip.other": torch.zeros(1)}, r"blip\.other is not one of its tensors"),
        ({k: v for k, v in released().items() if "norm2" not in k}, r"layer_norm2\.\w+ is missing, with 5 others"),
        ({k: v for k, v in released().items() if "mlp.layers.4" not in k}, r"mlp\.layers\.4 is not a linear layer"),
    ):
        with pytest.raises(UserError, match=sentence):
            blip.build(wrong, Path("ImageReward.pt"), file, vision=VISION, text=TEXT)


def test_the_word_pieces_are_berts_and_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = vocabulary(tmp_path)
    model = blip.build(released(), Path("ImageReward.pt"), file, vision=VISION, text=TEXT)
    assert capfd.readouterr() == ("", "")
    words = {word: number for number, word in enumerate(file.read_text(encoding="utf-8").split())}
    texts = ["A DOG, two cats", "", "sófa on\tfield", "cats " * 60]
    theirs = BertTokenizer(vocab=words)(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    tokens, mask = model.tokens(texts)
    assert torch.equal(tokens, theirs.input_ids) and torch.equal(mask, theirs.attention_mask)
