"""The toy world: its scenes, captions and tokenizer, and the training of its teacher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fastgen.data.toy.autoencoder import build_autoencoder, train_autoencoder
from fastgen.data.toy.captions import WORDS, caption
from fastgen.data.toy.recipe import load_recipe, train_teacher
from fastgen.data.toy.scenes import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scenes, is_held_out, render, sample_scenes
from fastgen.data.toy.teacher import LatentPool, SceneHeads, build_text_encoder, pretrain_text_encoder, tokenize, train_denoiser
from fastgen.data.toy.tokenizer import MAX_LENGTH, toy_tokenizer
from fastgen.errors import UserError
from fastgen.training.run import TOY_TEACHER

RECIPE = Path(__file__).parents[1] / "configs" / "toy" / "teacher.toml"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def held_out_objects(scenes: Scenes) -> torch.Tensor:
    held = is_held_out(scenes.shape, scenes.colour, scenes.texture, scenes.size, scenes.background[:, None])
    held[:, 1] &= scenes.count == 2
    return held


def test_the_splits_do_not_meet() -> None:
    assert not held_out_objects(sample_scenes(2000, generator(), split="train")).any()
    assert held_out_objects(sample_scenes(2000, generator(), split="held-out")).any(1).all()


def test_training_shows_every_value_of_every_attribute_and_both_numbers_of_objects() -> None:
    scenes = sample_scenes(2000, generator())
    for name, options in {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "background": BACKGROUNDS}.items():
        assert getattr(scenes, name).unique().tolist() == list(range(len(options)))
    assert 0.45 < (scenes.count == 2).float().mean() < 0.55


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="held-out"):
        sample_scenes(1, generator(), split="test")


def test_drawing_is_seeded_and_free() -> None:
    scenes = sample_scenes(4, generator())
    assert torch.equal(render(scenes, generator(1)), render(scenes, generator(1)))
    assert not torch.equal(render(scenes, generator(1)), render(scenes, generator(2)))


def scene(**attributes: int) -> Scenes:
    names = ("shape", "colour", "size", "texture")
    both = {name: torch.tensor([[attributes.get(name, 0), attributes.get(f"{name}2", 0)]]) for name in names}
    single = {name: torch.tensor([attributes.get(name, 0)]) for name in ("axis", "background")}
    return Scenes(count=torch.tensor([attributes.get("count", 1)]), **both, **single)


def test_a_picture_shows_the_colours_of_its_scene() -> None:
    red, white = COLOURS.index("red"), BACKGROUNDS.index("white")
    image = render(scene(colour=red, background=white, size=1), generator())[0]
    corner_values = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corner_values.max(1).values.min() > 0.8, "the background is white"
    redness = image[0] - image[1:].max(0).values
    assert redness.max() > 1.0, "and the object red"


def test_the_first_object_is_the_left_or_the_upper_one() -> None:
    red, blue = COLOURS.index("red"), COLOURS.index("blue")
    grid = torch.arange(32.0)
    for axis in (0, 1):
        for seed in range(5):
            image = render(scene(count=2, colour=red, colour2=blue, axis=axis), generator(seed))[0]
            weight = {"red": (image[0] - image[2]).clamp_min(0), "blue": (image[2] - image[0] - 0.3).clamp_min(0)}
            centre = {name: (w.sum(axis) * grid).sum() / w.sum() for name, w in weight.items()}
            assert centre["red"] < centre["blue"]


def test_the_plainest_caption_says_the_scene() -> None:
    circle, ring = SHAPES.index("circle"), SHAPES.index("ring")
    plain = scene(count=2, shape=circle, shape2=ring, size2=1, texture2=1, colour2=COLOURS.index("blue"), axis=1)
    assert caption(plain) == ["a small red circle above a large blue striped ring on a black background"]


def test_captions_vary_and_fit_the_tokenizer_one_token_a_word() -> None:
    tokenizer, scenes = toy_tokenizer(), sample_scenes(500, generator())
    captions = caption(scenes, generator())
    assert len(set(caption(scenes[:1], generator(seed))[0] for seed in range(20))) > 3
    for text in captions:
        words = text.replace(",", " ,").split()
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [f"{word}</w>" for word in words]
        assert len(ids) <= MAX_LENGTH
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert {word for text in captions for word in text.replace(",", " ,").split()} <= set(WORDS)


def test_a_few_updates_lower_every_loss() -> None:
    losses: dict[str, list[float]] = {}

    def report(step: int, terms: dict[str, float]) -> None:
        for name, value in terms.items():
            losses.setdefault(name, []).append(value)

    autoencoder = train_autoencoder(12, batch=8, report=report)
    encoder = pretrain_text_encoder(12, batch=16, report=report)
    train_denoiser(autoencoder, encoder, 12, batch=8, pool=64, report=report)
    for name in ("autoencoder", "text", "denoiser"):
        assert sum(losses[name][-3:]) < 0.95 * sum(losses[name][:3]), name


def test_the_text_encoder_goes_on_reading_beside_the_denoiser() -> None:
    torch.manual_seed(0)
    encoder, autoencoder = build_text_encoder(toy_tokenizer()), build_autoencoder().eval().requires_grad_(False)
    quiet = {"batch": 4, "pool": 64, "ema": 0.0, "report": lambda step, terms: None}
    trained = [
        train_denoiser(autoencoder, copy.deepcopy(encoder), 1, reading_weight=weight, **quiet).text_encoder
        for weight in (0.0, 0.0, 1.0)
    ]
    without, same, beside = (torch.cat([p.flatten() for p in each.parameters()]) for each in trained)
    assert torch.equal(without, same)
    assert not torch.allclose(without, beside)


def test_training_the_decoder_alone_leaves_the_latents() -> None:
    images = render(sample_scenes(2, generator()), generator())
    before = build_autoencoder().eval()
    with torch.no_grad():
        latents = before.encode(images).latent_dist.mean
    after = train_autoencoder(2, start=before, decoder_only=True, batch=2, report=lambda step, terms: None)
    with torch.no_grad():
        assert torch.equal(after.encode(images).latent_dist.mean, latents)


def test_the_pool_scales_latents_as_the_pipeline_does() -> None:
    autoencoder = build_autoencoder().eval()
    autoencoder.register_to_config(scaling_factor=0.25)
    latents, ids, drawn = LatentPool(autoencoder, toy_tokenizer(), generator(3), size=64).fill()
    fresh = generator(3)
    scenes = sample_scenes(64, fresh)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean = autoencoder.encode(render(scenes, fresh)).latent_dist.mean.float()
    assert torch.equal(latents, mean * 0.25)
    assert torch.equal(ids, tokenize(toy_tokenizer(), caption(scenes, fresh)))
    assert torch.equal(drawn.colour, scenes.colour)


def test_the_recipe_makes_a_folder_that_stock_diffusers_loads(tmp_path: Path) -> None:
    short = ["text_encoder.updates=1", "text_encoder.batch=4", "denoiser=[{updates=1, batch=4, pool=64}, {updates=1, pool=64}]"]
    recipe = load_recipe(RECIPE, [*short, "autoencoder=[{updates=1, batch=2}, {updates=1, batch=2, decoder_only=true}]"])
    lines: list[str] = []
    train_teacher(recipe, tmp_path / "teacher", say=lines.append)
    assert any("denoiser 2 of 2: update 1 of 1" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"], "parts and partial folders are gone"
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "teacher").rglob("*.json"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    image = pipeline("a small red circle", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    with pytest.raises(UserError, match="exists already"):
        train_teacher(recipe, tmp_path / "teacher", say=lines.append)


def test_the_shipped_teacher_can_be_trained_on(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, ["start=toy", "denoiser=[{updates=1, batch=4, pool=64}]"])
    trained = train_teacher(recipe, tmp_path / "teacher", say=lambda line: None)
    shipped = StableDiffusionPipeline.from_pretrained(TOY_TEACHER)
    ids = tokenize(shipped.tokenizer, ["a small red circle on a white background"])
    assert torch.equal(ids, tokenize(trained.tokenizer, ["a small red circle on a white background"]))
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    before, after = (dict(pipeline.unet.named_parameters()) for pipeline in (shipped, again))
    assert any(not torch.equal(before[name], after[name]) for name in before), "it moved"
    assert all(torch.allclose(before[name], after[name], atol=0.02) for name in before), "from where it was"
    assert all(torch.equal(a, b) for a, b in zip(shipped.vae.parameters(), again.vae.parameters(), strict=True))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("text_encoder.upates=3", "did you mean 'updates'"),
        ("text_encoder.updates=0", "updates must be at least 1"),
        ("text_encoder.lr=fast", "text_encoder.lr"),
        ("denoiser=[{updates=0}]", "updates must be at least 1"),
        ("denoizer.lr=1", "did you mean 'denoiser'"),
        ("start=3", "start must be"),
        ("autoencoder=3", r"sections \[\[autoencoder\]\]"),
    ],
)
def test_mistakes_in_a_recipe_are_named(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(RECIPE, [override])


def test_the_shipped_teacher_knows_which_object_is_where() -> None:
    tokenizer, encoder = (
        getattr(StableDiffusionPipeline.from_pretrained(TOY_TEACHER), x) for x in ("tokenizer", "text_encoder")
    )
    one, other = "a small red circle", "a large blue ring"
    texts = [f"{one} left of {other}", f"{other} right of {one}", f"{other} left of {one}"]
    with torch.no_grad():
        said, again, turned = encoder(
            tokenize(tokenizer, [f"{text} on a black background" for text in texts])
        ).last_hidden_state[:, -1]
    assert (said - again).norm() < 0.5 * (said - turned).norm(), "the same scene in other words is nearer than another scene"


def test_the_text_encoder_is_read_where_its_captions_end() -> None:
    scenes, tokenizer, heads = sample_scenes(8, generator()), toy_tokenizer(), SceneHeads()
    ids = tokenize(tokenizer, caption(scenes, generator()))
    hidden = torch.zeros(8, MAX_LENGTH, 128, requires_grad=True)
    heads.read(hidden, ids, scenes).backward()
    assert hidden.grad is not None
    for row, tokens in zip(hidden.grad, ids.tolist(), strict=True):
        assert row.abs().sum(1).nonzero().flatten().tolist() == [tokens.index(tokenizer.eos_token_id), MAX_LENGTH - 1]


def test_the_shipped_teacher_is_small_and_stock() -> None:
    weights = TOY_TEACHER.parent
    assert sum(path.stat().st_size for path in weights.rglob("*.safetensors")) < 16e6
    assert not [path for path in weights.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    pipeline = StableDiffusionPipeline.from_pretrained(TOY_TEACHER)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
