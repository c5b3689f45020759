"""Prompts, pictures, the toy pool, and the order in which batches are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgen.config import DataConfig, load
from fastgen.data.buckets import bucket_sizes, group_by_size
from fastgen.data.encoding import at_once
from fastgen.data.images import load_images
from fastgen.data.pictures import find_images, picture_file
from fastgen.data.prompts import read_prompts
from fastgen.data.source import Buckets, Source, load_source, toy_pool
from fastgen.denoiser import Condition
from fastgen.errors import UserError
from tests.training_fakes import PROMPTS, SHAPE, FakePipeline, fake_source

PIPELINE: Any = FakePipeline()


# -- files ----------------------------------------------------------------------------------------


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  a dög \n".encode())
    assert read_prompts(file) == ["a cat", "a dög"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it must hold one prompt a line"),
        (b" \n\n", "is empty"),
        (b"fine\nalso fine\nbad \xff here\n", "line 3 is not text in UTF-8"),
        (None, "there is no such file"),
    ],
)
def test_a_bad_prompt_file_is_told_in_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"prompts\.txt: {message}"):
        read_prompts(file)
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path)


def picture(path: Path, size: tuple[int, int] = (40, 20), colour: Any = (255, 0, 0), caption: str | None = "a thing") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_pictures_come_sorted_with_their_captions(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", caption=" two\nlines ")
    picture(tmp_path / "a" / "c.JPG", caption="first")
    (tmp_path / "notes.md").write_text("no picture")
    pictures, captions = find_images(tmp_path)
    assert [each.path.name for each in pictures] == ["c.JPG", "b.png"] and captions == ["first", "two lines"]


def test_pictures_are_cropped_to_the_middle_and_put_on_white(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    clear = picture(tmp_path / "clear.png", colour=(0, 0, 0, 0))
    images = load_images([picture_file(tmp_path / "wide.png"), picture_file(clear)], (8, 8))
    assert images.shape == (2, 3, 8, 8)
    assert images[0, :, 4, 4].tolist() == [-1, -1, 1], "blue, in [-1, 1], channels first"
    assert float(images[1].min()) == 1


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pictures"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        find_images(tmp_path / "none")
    whole = picture(tmp_path / "one.png", size=(300, 300)).read_bytes()
    lonely = picture(tmp_path / "two.png", caption=None)
    with pytest.raises(UserError, match=r"two\.png: has no caption; it must be in two\.txt"):
        find_images(tmp_path)
    lonely.with_suffix(".txt").write_text(" \n")
    with pytest.raises(UserError, match=r"two\.txt: is empty"):
        find_images(tmp_path)
    for data in (b"not a picture", whole[: len(whole) // 2], b""):
        lonely.write_bytes(data)
        with pytest.raises(UserError, match=r"two\.png: is not a readable picture"):
            load_images([picture_file(tmp_path / "one.png"), picture_file(lonely)], (8, 8))


# -- order ----------------------------------------------------------------------------------------


def drawn(source: Source, sizes: list[int]) -> list[int]:
    """Which samples batches of these sizes hold, by their latents."""
    assert source.latents is not None
    found = []
    for size in sizes:
        latents = source.batch(size).latents
        assert latents is not None
        found += [int((source.latents == each).flatten(1).all(1).nonzero()) for each in latents]
    return found


def test_every_epoch_shows_each_sample_once_in_a_new_order() -> None:
    order = drawn(fake_source(PIPELINE), [4, 4, 4, 4, 4, 2])
    first, second = order[:11], order[11:]
    assert sorted(first) == sorted(second) == list(range(11)) and first != second
    assert drawn(fake_source(PIPELINE, seed=1), [11]) != first, "another seed, another order"
    assert drawn(fake_source(PIPELINE), [22]) == order, "whatever the size of the batches"


def test_conditions_and_latents_belong_together() -> None:
    source = fake_source(PIPELINE)
    everything = FakePipeline().encode_prompts(PROMPTS).inputs["text"]
    order = drawn(fake_source(PIPELINE), [25])
    batch = source.batch(25)
    assert torch.equal(batch.condition.inputs["text"], everything[order]) and batch.shape == (25, *SHAPE)
    assert batch.condition.null is not None and len(batch.condition.null) == 25


def test_the_order_goes_on_from_a_saved_position() -> None:
    whole = drawn(fake_source(PIPELINE), [3] * 9)
    left = fake_source(PIPELINE)
    drawn(left, [3] * 4)
    found = fake_source(PIPELINE)
    found.load_state(left.state())
    assert drawn(found, [3] * 5) == whole[12:]
    with pytest.raises(UserError, match="has 11 samples, but the run that is resumed had 12"):
        found.load_state({"position": 0, "size": 12})


def test_processes_share_each_joint_batch() -> None:
    whole = drawn(fake_source(PIPELINE), [6, 6])
    parts = [drawn(fake_source(PIPELINE, rank=rank, processes=2), [3, 3]) for rank in range(2)]
    assert [*parts[0][:3], *parts[1][:3], *parts[0][3:], *parts[1][3:]] == whole


def test_a_null_twin_that_differs_by_sample_is_kept_whole() -> None:
    text = torch.arange(4.0)[:, None]
    kept = Source(Condition({"text": text}, {}, Condition({"text": -text})), SHAPE)
    lean = Source(Condition({"text": text}, {}, Condition({"text": torch.ones(4, 1)})), SHAPE)
    assert kept.condition.null is not None and lean.condition.null is not None
    assert (len(kept.condition.null), len(lean.condition.null)) == (4, 1)
    batch = kept.batch(4).condition
    assert batch.null is not None and torch.equal(batch.null.inputs["text"], -batch.inputs["text"])
    batch = lean.batch(6).condition
    assert batch.null is not None and torch.equal(batch.null.inputs["text"], torch.ones(6, 1))
    assert Source(Condition({"text": text}), SHAPE).batch(2).condition.null is None


# -- buckets ---------------------------------------------------------------------------------------


def test_bucket_sizes_are_of_one_area_and_every_shape() -> None:
    sizes = bucket_sizes(1024, 1024)
    known = {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (768, 1344), (1344, 768), (960, 1088)}
    assert known <= set(sizes), "SDXL's own (Podell et al. 2023, appendix I)"
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and 0.9 < height * width / 1024**2 <= 1 and 0.5 <= height / width <= 2
    assert bucket_sizes(1024, 1024) == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert (720, 1280) in bucket_sizes(720, 1280), "the base itself, whatever it is a multiple of"


def test_pictures_go_to_the_nearest_shape(tmp_path: Path) -> None:
    shapes = {"wide": (80, 40), "tall": (30, 60), "square": (50, 52)}
    paths = [picture(tmp_path / f"{name}.png", size) for name, size in shapes.items()]
    turned = Image.new("RGB", (80, 40))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    groups = group_by_size([picture_file(each) for each in (*paths, tmp_path / "turned.jpg")], [(64, 64), (32, 64), (64, 32)])
    assert groups == {(32, 64): [0], (64, 32): [1, 3], (64, 64): [2]}, "height first; the last stands upright"
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.png: is not a readable picture"):
        group_by_size([picture_file(tmp_path / "bad.png")], [(64, 64)])


def buckets(**options: Any) -> Buckets:
    """Two buckets of 5 and 2 samples; a sample's latents tell its number, its condition too."""
    sources = []
    for first, number, shape in ((0, 5, (4, 2, 2)), (5, 2, (4, 2, 3))):
        place = torch.arange(first, first + number, dtype=torch.float32)
        latents = place.view(-1, 1, 1, 1) * torch.ones(number, *shape)
        sources.append(Source(Condition({"text": place[:, None]}), shape, latents, prompts=PROMPTS[first : first + number]))
    return Buckets(sources, **options)


def bucketed(source: Buckets, size: int, batches: int) -> list[list[int]]:
    found = []
    for _ in range(batches):
        batch = source.batch(size)
        assert batch.latents is not None and batch.shape == tuple(batch.latents.shape) and batch.shape[0] == size
        numbers = batch.latents[:, 0, 0, 0]
        assert torch.equal(numbers, batch.condition.inputs["text"][:, 0]), "conditions and latents belong together"
        found.append([int(number) for number in numbers])
    return found


def test_every_batch_is_of_one_bucket_and_every_sample_is_seen() -> None:
    source = buckets()
    assert len(source) == 7 and source.prompts == PROMPTS[:7]
    epochs = bucketed(source, 2, 4), bucketed(source, 2, 4)
    for epoch in epochs:
        assert {number for batch in epoch for number in batch} == set(range(7))
        assert all(len({number >= 5 for number in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]
    assert [*epochs[0], *epochs[1]] == bucketed(buckets(), 2, 8) and bucketed(buckets(seed=1), 2, 8) != bucketed(
        buckets(), 2, 8
    )
    assert all(len(set(batch)) == 5 or set(batch) == {5, 6} for batch in bucketed(buckets(), 8, 4)), "small buckets repeat"


def test_buckets_go_on_from_a_saved_position_and_are_shared() -> None:
    whole = bucketed(buckets(), 2, 9)
    left, found = buckets(), buckets()
    bucketed(left, 2, 5)
    found.load_state(left.state())
    assert bucketed(found, 2, 4) == whole[5:]
    parts = [bucketed(buckets(rank=rank, processes=2), 1, 9) for rank in range(2)]
    assert [[*one, *other] for one, other in zip(*parts, strict=True)] == whole
    with pytest.raises(UserError, match=r"buckets of \[5, 2\] pictures, but the run that is resumed had \[7\]"):
        found.load_state({"epoch": 0, "drawn": [[2, 1]], "buckets": [7]})


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_buckets_keep_their_place_on_another_number_of_processes(before: int) -> None:
    left = buckets()
    seen = {number for batch in bucketed(left, 2, before) for number in batch}
    parts = [buckets(rank=rank, processes=3) for rank in range(3)]
    for part in parts:
        part.load_state(json.loads(json.dumps(left.state())))
    drawn: list[list[int]] = []
    while parts[0].turn == 0 and seen != set(range(7)):
        three = [bucketed(part, 1, 1)[0][0] for part in parts]
        assert len({number >= 5 for number in three}) == 1, "of one bucket"
        assert set(three) - seen, "none before all were seen but to fill up a batch"
        drawn, seen = [*drawn, three], seen | set(three)
    assert seen == set(range(7)) and all(part.turn == 0 for part in parts)
    again = buckets(processes=3)
    again.load_state(left.state())
    for three in drawn:
        assert bucketed(again, 1, 1) == [three[:1]]
    back = buckets()
    back.load_state(again.state())
    epoch = bucketed(back, 2, 4)
    assert {number for batch in epoch for number in batch} == set(range(7)) and back.turn == 1


def test_a_bucketed_source_from_files(tmp_path: Path) -> None:
    sizes = {"a": (64, 64), "b": (80, 40), "c": (60, 62), "d": (90, 50)}
    for name, size in sizes.items():
        picture(tmp_path / f"{name}.png", size, caption=f"picture {name}")

    class Sized(FakePipeline):
        def encode_prompts(self, prompts: Any, **size: int) -> Condition:
            found = super().encode_prompts(prompts)
            found.inputs["size"] = torch.tensor([[size["height"], size["width"]]] * len(prompts))
            return found

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([images, images[:, :1]], 1)[..., ::8, ::8]

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(latents), 3, 64, 64)

    pipeline: Any = Sized()
    source = load_source(pipeline, DataConfig(images=str(tmp_path), buckets=True, cache=None), {"images"})
    assert isinstance(source, Buckets) and len(source) == 4 and sorted(source.prompts) == [f"picture {name}" for name in "abcd"]
    for _ in range(4):
        batch = source.batch(2)
        pixels = [8 * side for side in batch.shape[2:]]
        assert batch.condition.inputs["size"].tolist() == [pixels] * 2 and pixels in ([64, 64], [32, 80], [48, 80])


def test_fewer_pictures_are_encoded_together_the_larger_they_are() -> None:
    sizes = (32, 128, 256, 512, 1024, 2048)
    assert [at_once((size, size)) for size in sizes] == [64, 64, 16, 4, 1, 1]


# -- what a run describes ---------------------------------------------------------------------------


def test_the_toy_pool_holds_the_training_split_only() -> None:
    images, captions = toy_pool(200, seed=0)
    assert images.shape == (200, 3, 32, 32) and len(captions) == 200 and -1 <= images.min() < images.max() <= 1
    assert torch.equal(images, toy_pool(200, seed=0)[0]) and captions == toy_pool(200, seed=0)[1]
    assert toy_pool(200, seed=1)[1] != captions


def test_a_toy_source_encodes_what_is_needed() -> None:
    toy = DataConfig(prompts="toy", images="toy", pool=130)
    both = load_source(PIPELINE, toy, {"images"})
    assert len(both) == 130 and both.latents is not None and both.latents.shape == (130, *SHAPE)
    images, captions = toy_pool(130, seed=0)
    assert both.prompts == captions and torch.allclose(both.latents, PIPELINE.encode(images))
    assert load_source(PIPELINE, toy, {"prompts"}).latents is None


def test_sources_from_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    picture(tmp_path / "images" / "a.png", caption="a caption")
    data = DataConfig(prompts=str(tmp_path / "prompts.txt"), images=str(tmp_path / "images"), cache=None)
    assert load_source(PIPELINE, data, {"prompts"}).prompts == ["one", "two", "three"]
    pictured = load_source(PIPELINE, data, {"prompts", "images"})
    assert pictured.prompts == ["a caption"] and pictured.latents is not None
    torch.testing.assert_close(pictured.latents[0, :3, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_data_that_a_method_lacks_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.images is missing"):
        load_source(PIPELINE, DataConfig(prompts="toy"), {"images"})


@pytest.mark.parametrize("name", ["height", "width"])
def test_a_resolution_that_does_not_fit_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} = 100 must be a multiple of 16, .*: 96 or 112"):
        DataConfig(prompts="toy", **{name: 100})
    (tmp_path / "run.toml").write_text(f'[method]\nname = "lcm"\n[data]\n{name} = 100\n')
    with pytest.raises(UserError, match=rf"run\.toml: \[data\] {name} = 100 must be a multiple of 16"):
        load(tmp_path / "run.toml")
