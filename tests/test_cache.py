"""Encodings on disk: made once, never stale, resumed, shared by processes, and read row by row."""

from __future__ import annotations

import gc
import multiprocessing
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastgen.config import DataConfig
from fastgen.data import cache as module
from fastgen.data.cache import Cache, Rows, digest
from fastgen.data.encoding import cache_prompts, encode_pictures, free_text_encoders, made_with, text_components
from fastgen.data.images import load_images
from fastgen.data.pairs import pair_noise, teacher_sampler
from fastgen.data.pictures import BadSamples, picture_file
from fastgen.data.readers import Readers
from fastgen.data.source import load_source
from fastgen.denoiser import Condition, map_tensors
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline
from fastgen.pipelines.tiny import builders
from fastgen.samplers import FewStep
from fastgen.training.grids import Grids
from tests import tiny_models as tiny

PROMPTS = [f"a scene with {i} things" for i in range(9)]


def numbers(index: Sequence[int]) -> Condition:
    """Samples that tell their place, with everything a condition can hold."""
    place = torch.tensor(index, dtype=torch.float32)[:, None]
    inputs = {"text": place * torch.ones(1, 3), "nest": {"pair": (place.bfloat16(), [place.long()])}}
    null = Condition({"text": torch.zeros(len(index), 3), "nest": {"pair": (-place.bfloat16(), [-place.long()])}})
    return Condition(inputs, {"ids": torch.arange(4), "flag": True, "nothing": None}, null)


def same(one: Any, other: Any) -> bool:
    """Bit by bit, with types."""
    if isinstance(one, Condition):
        return all(same(getattr(one, part), getattr(other, part)) for part in ("inputs", "shared", "null"))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)


# -- the folder --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_files")
def test_rows_come_back_as_they_were_whatever_the_order(tmp_path: Path) -> None:
    keys = [str(i) for i in range(11)]
    rows = Cache(tmp_path, "things", {}).fill(keys, numbers)
    again = Cache(tmp_path, "things", {}).fill(keys, lambda index: pytest.fail("made a second time"))
    for each in (rows, again):
        assert len(each) == 11
        for index in ([7, 0, 10, 3, 7], [2], list(range(11))):
            assert same(each.take(torch.tensor(index)), numbers(index))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 3


@pytest.mark.usefixtures("small_files")
def test_files_of_different_lengths_are_padded_together(tmp_path: Path) -> None:
    def encode(index: list[int]) -> Condition:
        text = torch.ones(len(index), 2 + index[0], 3)
        return Condition({"text": text}, {}, Condition({"text": 0 * text[:, :1]}))

    rows = Cache(tmp_path, "things", {}).fill([str(i) for i in range(8)], encode)
    taken = rows.take(torch.tensor([6, 1]))
    assert taken.inputs["text"].sum((1, 2)).tolist() == [18, 6] and taken.inputs["text"].shape == (2, 6, 3)
    assert taken.null is not None and taken.null.inputs["text"].shape == (2, 1, 3)


@pytest.mark.usefixtures("small_files")
def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    asked: list[int] = []

    def encode(index: list[int]) -> Condition:
        asked.extend(index)
        return numbers(index)

    Cache(tmp_path, "things", {}).fill(["0", "1", "2", "1"], encode)
    assert asked == [0, 1, 2], "a key that comes twice is made once"
    longer = Cache(tmp_path, "things", {}).fill(["0", "1", "2", "3", "4"], encode)
    assert asked == [0, 1, 2, 3, 4] and same(longer.take(torch.tensor([4, 1])), numbers([4, 1]))
    Cache(tmp_path, "things", {"setting": 2}).fill(["0"], encode)
    Cache(tmp_path, "others", {}).fill(["0"], encode)
    assert asked[5:] == [0, 0], "other settings and other kinds share nothing"


@pytest.mark.usefixtures("small_files")
def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    keys = [str(i) for i in range(12)]

    def failing(index: list[int]) -> Condition:
        if 8 in index:
            raise KeyboardInterrupt
        return numbers(index)

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path, "things", {}).fill(keys, failing)
    asked: list[int] = []
    rows = Cache(tmp_path, "things", {}).fill(keys, lambda index: (asked.extend(index), numbers(index))[1])
    assert asked == [8, 9, 10, 11] and same(rows.take(torch.arange(12)), numbers(range(12)))


@pytest.mark.usefixtures("small_files")
def test_a_broken_file_is_made_again(tmp_path: Path) -> None:
    keys = [str(i) for i in range(8)]
    Cache(tmp_path, "things", {}).fill(keys, numbers)
    broken = sorted(tmp_path.glob("*/*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:-10])
    (broken.parent / ".half.safetensors.1-00.partial").write_bytes(b"half")
    rows = Cache(tmp_path, "things", {}).fill(keys, numbers)
    assert same(rows.take(torch.arange(8)), numbers(range(8)))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*data\.cache"):
        Cache(tmp_path / "file", "things", {})


def filled_by(rank: int, folder: Path) -> None:
    module.ROWS = 2
    keys = [str(i) for i in range(40)]
    rows = Cache(folder, "things", {}).fill(keys, numbers, rank=rank, processes=3)
    assert same(rows.take(torch.arange(40)), numbers(range(40)))


def test_processes_fill_one_folder_together(tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork")
    workers = [start.Process(target=filled_by, args=(rank, tmp_path)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not list(tmp_path.glob("*/.*"))
    filled_by(0, tmp_path)


def test_a_batch_reads_its_rows_alone(tmp_path: Path) -> None:
    rows = Cache(tmp_path, "things", {}).fill(
        [str(i) for i in range(128)], lambda index: Condition({"text": torch.randn(len(index), 2**18)})
    )
    before = psutil.Process().memory_info().rss
    taken = rows.take(torch.tensor([3, 90]))
    grown = psutil.Process().memory_info().rss - before
    assert taken.inputs["text"].shape == (2, 2**18) and grown < 2**26, f"{grown} bytes for 2 of 128 rows of 1 MiB"


# -- prompts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl() -> Pipeline:
    return Pipeline.wrap(tiny.sdxl())


def test_prompts_from_a_cache_are_the_pipelines_own(sdxl: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    rows = cache_prompts(sdxl, PROMPTS, str(tmp_path))
    assert isinstance(rows, Rows)
    taken, fresh = rows.take(torch.tensor([8, 0, 5])), sdxl.encode_prompts([PROMPTS[i] for i in (8, 0, 5)])
    assert taken.null is not None and fresh.null is not None and taken.shared == fresh.shared
    for one, other in ((taken, fresh), (taken.null, fresh.null)):
        map_tensors(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4), one.inputs, other.inputs)
    monkeypatch.setattr(sdxl, "encode_prompts", lambda *args, **options: pytest.fail("encoded a second time"))
    assert len(cache_prompts(sdxl, PROMPTS[::-1], str(tmp_path))) == 9
    with safe_open(next(tmp_path.glob("*/*.safetensors")), "pt") as file:
        assert PROMPTS[0] not in str(file.metadata()), "prompts themselves are not kept"


def test_prompts_of_different_lengths_predict_as_fresh_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    pipeline = Pipeline.wrap(builders()["QwenImagePipeline"](), height=64, width=64)
    prompts = ["a", "a much longer prompt of many words", "b c", "two blue rings on a dark floor", "d"]
    cached = cache_prompts(pipeline, prompts, str(tmp_path)).take(torch.tensor([4, 1, 0]))
    fresh = pipeline.encode_prompts([prompts[i] for i in (4, 1, 0)])
    assert cached.null is not None and fresh.null is not None
    xt, t, teacher = torch.randn(3, *pipeline.latent_shape), torch.tensor([0.5, 0.6, 0.7]), pipeline.frozen()
    for one, other in ((cached, fresh), (cached.null, fresh.null)):
        torch.testing.assert_close(teacher(xt, t, one).output, teacher(xt, t, other).output, rtol=1e-4, atol=1e-5)


def test_whatever_changes_the_encoding_has_another_cache(sdxl: Pipeline) -> None:
    def now(pipeline: Pipeline) -> str:
        return digest(made_with(pipeline, text_components(pipeline)))

    assert set(text_components(sdxl)) == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    plain = now(sdxl)
    sdxl.encode_prompts(["a longer prompt than before"])
    assert now(sdxl) == plain == now(Pipeline.wrap(tiny.sdxl())), "the same model, however often used"
    seen = {plain, now(Pipeline.wrap(tiny.sdxl(), height=64, width=96))}
    changed = tiny.sdxl()
    wrapped = Pipeline.wrap(changed)
    with torch.no_grad():
        weight = changed.text_encoder_2.get_parameter("text_projection.weight")
        weight[0, 0] += 1e-3
    seen.add(now(wrapped))
    changed.tokenizer.model_max_length = 16
    seen.add(now(wrapped))
    changed.register_to_config(force_zeros_for_empty_prompt=False)
    seen.add(now(wrapped))
    changed.text_encoder.to(torch.bfloat16)
    seen.add(now(wrapped))
    assert len(seen) == 6
    before = now(wrapped)
    with torch.no_grad():
        changed.unet.get_parameter("conv_in.bias")[0] += 1
        changed.vae.get_parameter("encoder.conv_in.bias")[0] += 1
    assert now(wrapped) == before, "the denoiser's weights have no part in it"


def test_encoders_are_freed_and_the_rest_goes_on(tmp_path: Path) -> None:
    pipeline = Pipeline.wrap(tiny.sdxl(), roles={"student": "lora"})
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    source = load_source(pipeline, DataConfig(prompts=str(tmp_path / "prompts.txt"), cache=str(tmp_path / "c")), {"prompts"})
    grids = Grids(pipeline, tmp_path, PROMPTS[:1], seeds=[0], teacher=FewStep((1.0,)))
    student = pipeline.trainable("student")
    parts = pipeline.diffusers
    encoders = [weakref.ref(parts.text_encoder), weakref.ref(parts.text_encoder_2)]
    expected = sum(weight.numel() for encoder in (parts.text_encoder, parts.text_encoder_2) for weight in encoder.parameters())
    assert free_text_encoders(pipeline) == expected > 0
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None] and parts.text_encoder is None
    assert free_text_encoders(pipeline) == 0
    batch = source.batch(4)
    assert batch.condition.null is not None and len(batch.condition.null) == 4
    t, dropped = torch.full((4,), 0.5), batch.condition.dropout(torch.tensor([True] * 4))
    assert student(torch.randn(batch.shape), t, dropped).x0.isfinite().all()
    assert grids.sample(student, FewStep((1.0, 0.5))).shape == (1, 3, 64, 64)
    assert student.state_dict()


# -- pictures and pairs --------------------------------------------------------------------------------


def test_latents_are_kept_and_a_changed_picture_is_encoded_again(sdxl: Pipeline, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(path)

    class Counting(Readers):
        seen: ClassVar[list[str]] = []

        def read(self, pictures: Any, size: tuple[int, int]) -> Any:
            pictures = list(pictures)
            self.seen += [each.path.name for each in pictures]
            return super().read(pictures, size)

    def encoded() -> torch.Tensor:
        pictures = [picture_file(path) for path in paths]
        Counting.seen.clear()
        cache = str(tmp_path / "cache")
        rows, kept = encode_pictures(sdxl, pictures, (64, 64), cache, readers=Counting(), bad=BadSamples())
        assert isinstance(rows, Rows) and kept == [0, 1, 2]
        return rows.take(torch.arange(3)).inputs["latents"]

    first = encoded()
    torch.testing.assert_close(first, sdxl.encode(load_images([picture_file(path) for path in paths], (64, 64))))
    assert torch.equal(encoded(), first) and not Counting.seen, "not a second time"
    Image.new("RGB", (64, 64), (0, 200, 0)).save(paths[1])
    changed = encoded()
    assert Counting.seen == [paths[1].name], "no more than the changed"
    assert torch.equal(changed[[0, 2]], first[[0, 2]]) and not torch.equal(changed[1], first[1])


def test_pairs_are_the_teachers_own(tmp_path: Path) -> None:
    pipeline = Pipeline.wrap(tiny.sdxl())
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    data = DataConfig(
        prompts=str(tmp_path / "prompts.txt"), cache=str(tmp_path / "c"), pairs=3, pair_steps=2, pair_guidance=3.0
    )
    source = load_source(pipeline, data, {"prompts", "pairs"}, seed=4)
    assert len(source) == 3 and source.prompts == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    batch = source.batch(3)
    assert batch.noise is not None and batch.target is not None
    made = teacher_sampler(pipeline, data).sample(pipeline.frozen(), batch.noise, batch.condition)
    torch.testing.assert_close(batch.target, made, rtol=1e-4, atol=1e-4)
    order = source.indices(0, 3).tolist()
    for noise, number in zip(batch.noise, order, strict=True):
        assert torch.equal(noise, pair_noise(pipeline.latent_shape, 4, number))
    in_memory = load_source(pipeline, replace(data, cache=None), {"pairs"}, seed=4).batch(3)
    assert in_memory.target is not None
    torch.testing.assert_close(in_memory.target, batch.target, rtol=1e-4, atol=1e-4)
    other = load_source(pipeline, replace(data, pair_guidance=5.0), {"pairs"}, seed=4).batch(3)
    assert other.target is not None and not torch.allclose(other.target, batch.target)


def test_pairs_go_through_the_pipelines_own_levels() -> None:
    """FLUX.1 dev shifts its levels by the resolution, FLUX.2 by the number of steps too."""
    data = DataConfig(prompts="unused", pairs=1, pair_steps=3)
    for name in ("FluxPipeline", "Flux2KleinPipeline"):
        pipeline = Pipeline.wrap(builders()[name](), height=64, width=64)
        for size, pixels in ((None, 64), ((128, 64), 128)):
            times = teacher_sampler(pipeline, data, size).times
            pipeline.diffusers(prompt="a", num_inference_steps=3, height=pixels, width=64, output_type="latent")
            assert times == pytest.approx(pipeline.diffusers.scheduler.sigmas[:3].tolist())
            assert times != pytest.approx((1.0, 2 / 3, 1 / 3), abs=1e-2)


def test_pairs_come_in_buckets(tmp_path: Path) -> None:
    pipeline = Pipeline.wrap(tiny.sdxl())
    for i, size in enumerate([(64, 64), (90, 50), (60, 62)]):
        Image.new("RGB", size, (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(PROMPTS[i])
    data = DataConfig(images=str(tmp_path), buckets=True, cache=str(tmp_path / "c"), pair_steps=2, prompts="unused")
    for options in (data, replace(data, cache=None)):
        source = load_source(pipeline, options, {"images", "pairs"}, seed=4)
        shapes = set()
        for _ in range(3):
            batch = source.batch(1)
            assert batch.noise is not None and batch.target is not None and batch.latents is not None
            assert batch.noise.shape == batch.target.shape == batch.latents.shape == batch.shape
            made = teacher_sampler(pipeline, options).sample(pipeline.frozen(), batch.noise, batch.condition)
            torch.testing.assert_close(batch.target, made, rtol=1e-4, atol=1e-4)
            shapes.add(batch.shape)
        assert len(shapes) == 2
