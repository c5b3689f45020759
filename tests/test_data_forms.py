"""Shards and datasets beside folders, what is done about samples that cannot be read, pictures decoded by other processes."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgen.config import DataConfig
from fastgen.data.images import find_pictures, find_prompts, load_images
from fastgen.data.pictures import BadSamples, picture_file
from fastgen.data.readers import Readers
from fastgen.data.shards import expand, index
from fastgen.data.source import Buckets, Source, load_source
from fastgen.denoiser import Condition
from fastgen.errors import UserError
from tests.test_data import buckets
from tests.training_fakes import FakePipeline, fake_source

COLOURS = [(250 - 20 * i, 10 * i, 128) for i in range(7)]


class Pipeline(FakePipeline):
    """Latents tell a picture's colour; two are told apart by nothing."""

    diffusers, autoencoder = types.SimpleNamespace(components={}), None

    def encode_prompts(self, prompts: Any, **size: int) -> Condition:
        return super().encode_prompts(prompts)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(latents), 3, 16, 16)


PIPELINE: Any = Pipeline()


def png(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def shards(folder: Path) -> str:
    """The seven colours in three shards, captions in .txt, .json and both."""
    folder.mkdir(exist_ok=True)
    for number, some in enumerate((range(3), range(3, 6), range(6, 7))):
        members: dict[str, bytes] = {}
        for i in some:
            members[f"set/{i:06d}.PNG"] = png(COLOURS[i])
            if number != 1:
                members[f"set/{i:06d}.txt"] = f"colour  {i}\n".encode()
            members[f"set/{i:06d}.json"] = json.dumps({"caption": f"colour {i}", "long": f"the colour {i}"}).encode()
        shard(folder / f"{number:02d}.tar", members)
    return str(folder / "{00..02}.tar")


def folder(root: Path) -> str:
    root.mkdir()
    for i, colour in enumerate(COLOURS):
        (root / f"{i}.png").write_bytes(png(colour))
        (root / f"{i}.txt").write_text(f"colour {i}")
    return str(root)


def table(root: Path, form: str) -> str:
    datasets = pytest.importorskip("datasets")
    if form in ("jsonl", "csv"):  # which hold paths
        where = folder(root / "listed")
        listed = [{"image": f"{where}/{i}.png", "caption": f"colour {i}"} for i in range(7)]
        lines = (
            [json.dumps(row) for row in listed]
            if form == "jsonl"
            else ["image,caption", *(",".join(row.values()) for row in listed)]
        )
        (root / f"rows.{form}").write_text("\n".join(lines) + "\n")
        return str(root / f"rows.{form}")
    rows = {"image": [{"bytes": png(colour), "path": None} for colour in COLOURS], "text": [f"colour {i}" for i in range(7)]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    if form == "parquet":
        made.to_parquet(root / "rows.parquet")
        return str(root / "rows.parquet")
    if form == "split":
        made = datasets.DatasetDict({"train": made, "test": made.select(range(2))})
    made.save_to_disk(root / "saved")
    return str(root / "saved")


FORMS: dict[str, Callable[[Path], str]] = {
    "folder": lambda root: folder(root / "pictures"),
    "shards": lambda root: shards(root / "shards"),
    "folder of shards": lambda root: str(Path(shards(root / "shards")).parent),
    "parquet": lambda root: table(root, "parquet"),
    "jsonl": lambda root: table(root, "jsonl"),
    "csv": lambda root: table(root, "csv"),
    "saved dataset": lambda root: table(root, "saved"),
    "split": lambda root: table(root, "split"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.data.encoding.made_with", lambda *parts: {})
    with suppress(ImportError):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


# -- the same pictures in every form ---------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_pictures_and_captions_whatever_their_form(tmp_path: Path, form: str) -> None:
    data = DataConfig(images=FORMS[form](tmp_path), cache=str(tmp_path / "cache"))
    pictures, captions = find_pictures(data, BadSamples())
    assert captions == [f"colour {i}" for i in range(7)]
    wanted = torch.tensor(COLOURS) / 127.5 - 1
    torch.testing.assert_close(load_images(pictures, (4, 4))[:, :, 2, 2], wanted)
    source = load_source(PIPELINE, data, {"images"}, seed=3)
    batch = source.batch(7)
    assert batch.latents is not None and batch.prompts is not None
    for latents, prompt in zip(batch.latents, batch.prompts, strict=True):
        torch.testing.assert_close(latents[:3, 0, 0], wanted[int(prompt.split()[-1])])
    files = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    again = load_source(PIPELINE, data, {"images"}, seed=3).batch(7)
    assert torch.equal(again.latents, batch.latents), "the order is the seed's, not the form's"  # type: ignore[arg-type]
    assert {path.name for path in (tmp_path / "cache").rglob("*.safetensors")} == files, "encoded once"
    assert len(load_source(PIPELINE, DataConfig(images=data.images, buckets=True, cache=None), {"images"})) == 7


def test_the_order_is_the_same_in_every_form(tmp_path: Path) -> None:
    orders = []
    for form in ("folder", "shards", "parquet"):
        data = DataConfig(images=FORMS[form](tmp_path), cache=None)
        orders.append(load_source(PIPELINE, data, {"images"}, seed=1).batch(9).prompts)
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("form", ["shards", "parquet", "split"])
def test_captions_alone_are_prompts(tmp_path: Path, form: str) -> None:
    data = DataConfig(prompts=FORMS[form](tmp_path), split="test" if form == "split" else "train")
    assert find_prompts(data, BadSamples()) == [f"colour {i}" for i in range(2 if form == "split" else 7)]


def test_another_caption_is_named(tmp_path: Path) -> None:
    where = shards(tmp_path)
    assert find_prompts(DataConfig(prompts=where, caption="long"), BadSamples())[6] == "the colour 6"
    with pytest.raises(UserError, match=r"00\.tar: sample set/000000\.json has no caption, a text, under 'short'"):
        find_prompts(DataConfig(prompts=where, caption="short"), BadSamples())


def test_a_pattern_of_shards(tmp_path: Path) -> None:
    names = ["a-008.tar", "a-009.tar", "a-010.tar", "b.tar"]
    for name in names:
        (tmp_path / name).touch()
    found = [each.name for each in expand(f"{tmp_path}/{{a-{{008..010}},b}}.tar".replace("{a-{008..010},b}", "a-{008..010}"))]
    assert found == names[:3]
    assert [each.name for each in expand(f"{tmp_path}/{{b,a-009}}.tar")] == ["b.tar", "a-009.tar"], "in the order written"
    assert [each.name for each in expand(f"{tmp_path}/a*.tar")] == names[:3]
    with pytest.raises(UserError, match=r"a-011\.tar: there is no such shard"):
        expand(f"{tmp_path}/a-{{008..011}}.tar")
    with pytest.raises(UserError, match="is more than 1000000 shards"):
        expand(f"{tmp_path}/a-{{0..99999999999}}.tar")


# -- what is wrong is named -------------------------------------------------------------------------

GOOD = {"a.png": png(COLOURS[0]), "a.txt": b"a thing"}
BAD_SHARDS: dict[str, tuple[dict[str, bytes], str]] = {
    "no caption": ({"b.png": png(COLOURS[1])}, "bad.tar: sample b has no caption; it must be in b.txt or .json"),
    "no picture": ({"b.txt": b"words"}, "bad.tar: sample b has no picture (.bmp, .jpeg, .jpg, .png, .webp)"),
    "empty": ({"b.png": png(COLOURS[1]), "b.txt": b" \n"}, "bad.tar: sample b.txt is empty; it must hold the caption"),
    "not text": ({"b.png": png(COLOURS[1]), "b.txt": b"\xff"}, "bad.tar: sample b.txt is not text in UTF-8"),
    "not JSON": ({"b.png": png(COLOURS[1]), "b.json": b"{"}, "bad.tar: sample b.json is not valid JSON"),
    "no key": ({"b.png": png(COLOURS[1]), "b.json": b'{"words": 1}'}, "bad.tar: sample b.json has no 'caption'"),
    "not a picture": ({"b.png": b"no", "b.txt": b"words"}, "bad.tar: b.png: is not a readable picture"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_bad_sample_of_a_shard_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    more, message = BAD_SHARDS[kind]
    data = DataConfig(images=str(shard(tmp_path / "bad.tar", GOOD | more)), cache=None)
    with pytest.raises(UserError) as raised:
        load_source(PIPELINE, data, {"images"})
    assert message in str(raised.value) and "\n" not in str(raised.value) and " at 0x" not in str(raised.value)
    told: list[str] = []
    data.bad_samples = "skip"
    source = load_source(PIPELINE, data, {"images"}, say=told.append)
    assert source.prompts == ["a thing"] and len(source) == 1
    assert message in told[0] and told[-1].endswith("bad.tar: 1 samples cannot be used and were left out, 1 are used")


def broken(path: Path, how: str) -> Path:
    whole = shard(
        path, {f"{i}.{kind}": png(COLOURS[i]) if kind == "png" else b"x" for i in range(3) for kind in ("png", "txt")}
    )
    content = whole.read_bytes()
    path.write_bytes({"cut": content[:3000], "noise": b"nothing" * 300, "gzip": b"\x1f\x8b" + content, "empty": b""}[how])
    return path


@pytest.mark.parametrize(
    ("how", "message", "left"),
    [
        ("cut", "is not a readable .tar after 1 samples", 1),
        ("noise", "is not a readable .tar after 0 samples", 0),
        ("gzip", "is compressed; shards must be plain .tar files (gunzip makes one)", 0),
        ("empty", "is not a readable .tar", 0),
    ],
)
def test_a_broken_shard_is_named_or_left_out(tmp_path: Path, how: str, message: str, left: int) -> None:
    path = broken(tmp_path / "broken.tar", how)
    sound = shard(tmp_path / "sound.tar", GOOD)
    data = DataConfig(images=f"{tmp_path}/{{broken,sound}}.tar", cache=None)
    with pytest.raises(UserError) as raised:
        find_pictures(data, BadSamples())
    assert str(raised.value).startswith(f"{path}: {message}")
    assert len(find_pictures(data, BadSamples("skip"))[0]) == left + 1
    data.images = str(sound)
    assert len(find_pictures(data, BadSamples())[0]) == 1


def test_two_samples_of_one_name_are_told(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"twice\.tar: has two members a\.txt; each sample needs a name of its own"):
        find_pictures(DataConfig(images=str(path)), BadSamples())


def test_a_shard_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = shard(tmp_path / "one.tar", GOOD)
    data = DataConfig(images=str(path))
    before = find_pictures(data, BadSamples())[0][0].identity
    shard(path, {"b.png": png(COLOURS[3]), "b.txt": b"another"})
    pictures, captions = find_pictures(data, BadSamples())
    assert captions == ["another"] and pictures[0].identity != before
    index.cache_clear()


def test_what_is_wrong_with_a_dataset_is_told(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    where = table(tmp_path, "split")

    def wrong(**keys: Any) -> str:
        with pytest.raises(UserError) as raised:
            find_pictures(DataConfig(**{"images": where, **keys}), BadSamples())
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "saved: has no column 'imag', which data.image must name; did you mean 'image'?" in wrong(image="imag")
    assert "has no column 'words', which data.caption must name; there are image, text" in wrong(caption="words")
    assert "saved: has no split 'trian'; did you mean 'train'?; set data.split" in wrong(split="trian")
    assert "column 'text' holds" not in wrong(image="text", caption="nothing")
    assert "none.parquet: cannot be read as a dataset (FileNotFoundError" in wrong(images=str(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    assert "bad.parquet: cannot be read as a dataset" in wrong(images=str(tmp_path / "bad.parquet"))
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).to_parquet(tmp_path / "numbers.parquet")
    assert "column 'image' holds Value('int64'), not pictures" in wrong(images=str(tmp_path / "numbers.parquet"))
    rows = {"image": [png(COLOURS[0]), b"no", png(COLOURS[1])], "text": ["a", "b", " "]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    assert "rows.parquet: row 2 has no caption: column 'text' holds ' '" in wrong(images=str(tmp_path / "rows.parquet"))
    told: list[str] = []
    data = DataConfig(images=str(tmp_path / "rows.parquet"), bad_samples="skip", cache=None)
    assert load_source(PIPELINE, data, {"images"}, say=told.append).prompts == ["a"]
    assert [each.split("rows.parquet: ")[1][:30] for each in told[:2]] == [
        "row 2 has no caption: column '",
        "row 1: is not a readable pictu",
    ]


def test_the_library_of_datasets_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:a/b: is a dataset, for which .* pip install 'fastgen-diffusion\[datasets\]'"):
        find_prompts(DataConfig(prompts="hf:a/b"), BadSamples())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("bucketed", [False, True])
def test_pictures_that_cannot_be_read_are_left_out_when_asked(tmp_path: Path, cached: bool, bucketed: bool) -> None:
    where = folder(tmp_path / "pictures")
    whole = Path(where, "2.png").read_bytes()
    Path(where, "2.png").write_bytes(whole[:60])  # its header is sound
    Path(where, "4.png").write_bytes(b"nothing")
    Path(where, "5.txt").unlink()
    data = DataConfig(images=where, cache=str(tmp_path / "cache") if cached else None, bad_samples="skip", buckets=bucketed)
    for processes in (1, 2):
        told: list[str] = []
        source = load_source(PIPELINE, data, {"images"}, processes=processes, say=told.append)
        assert sorted(source.prompts) == ["colour 0", "colour 1", "colour 3", "colour 6"] and len(source) == 4
        assert told[-1] == f"{where}: 3 samples cannot be used and were left out, 4 are used"
        assert sum("left out: " in line for line in told) == 3
    data.bad_samples = "stop"
    Path(where, "5.txt").write_text("colour 5")
    with pytest.raises(UserError, match=r"[24]\.png: is not a readable picture"):
        load_source(PIPELINE, data, {"images"})
    data.bad_samples = "skip"
    for path in Path(where).glob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"has no sample that can be used; the first: .*is not a readable picture"):
        load_source(PIPELINE, data, {"images"})


# -- other processes --------------------------------------------------------------------------------


def pixels(readers: Readers, paths: list[Path]) -> list[np.ndarray | UserError]:
    with readers:
        return list(readers.read([picture_file(path) for path in paths], (6, 5)))


def test_the_order_is_the_same_whatever_the_number_of_workers(tmp_path: Path) -> None:
    where = folder(tmp_path / "pictures")
    paths = [Path(where, f"{i}.png") for i in range(7)] * 3
    paths[5] = tmp_path / "bad.png"
    paths[5].write_bytes(b"nothing")
    alone = pixels(Readers(), paths)
    for workers in (1, 3):
        readers = Readers(workers)
        for one, other in zip(alone, pixels(readers, paths), strict=True):
            assert str(one) == str(other) if isinstance(one, UserError) else np.array_equal(one, other)
        assert not readers.processes, "all of them have ended"
    data = DataConfig(images=where, cache=None)
    one, other = (load_source(PIPELINE, data, {"images"}, seed=2).batch(8) for data.workers in (0, 2))
    assert torch.equal(one.latents, other.latents) and one.prompts == other.prompts  # type: ignore[arg-type]
    shown = DataConfig(images=table(tmp_path, "parquet"), cache=None)
    one, other = (load_source(PIPELINE, shown, {"images"}, seed=2).batch(8) for shown.workers in (0, 2))
    assert torch.equal(one.latents, other.latents), "bytes that are not in a file of their own too"  # type: ignore[arg-type]


def killing(readers: Readers, name: str, times: int, then: Callable[[], None]) -> threading.Thread:
    """Kill whichever process reads the picture `name`, so many times."""

    def hunt() -> None:
        left = times
        while left:
            for worker in list(readers.processes):
                if worker.reading == name and worker.process.poll() is None:
                    os.kill(worker.process.pid, signal.SIGKILL)
                    worker.process.wait()
                    left -= 1
                    if not left:
                        then()
            time.sleep(0.002)

    thread = threading.Thread(target=hunt, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[tuple[list[Path], Path]]:
    """Seven pictures, one of which never ends: who reads it waits until it is killed."""
    where = folder(tmp_path / "pictures")
    paths = [Path(where, f"{i}.png") for i in range(7)]
    paths[3].unlink()
    os.mkfifo(paths[3])
    yield paths, paths[3]


def test_a_worker_that_dies_is_told_with_the_file_it_had(stuck: tuple[list[Path], Path], tmp_path: Path) -> None:
    paths, pipe = stuck
    readers = Readers(2)
    thread = killing(readers, str(pipe), 2, lambda: None)
    found = pixels(readers, paths)
    thread.join(10)
    assert not thread.is_alive()
    message = f"{pipe}: cannot be read: the process that reads it ended with SIGKILL, as where memory runs out, 2 times"
    assert str(found[3]) == message
    assert all(isinstance(each, np.ndarray) for i, each in enumerate(found) if i != 3), "the others are not lost"


def test_a_worker_killed_by_chance_costs_nothing(stuck: tuple[list[Path], Path], tmp_path: Path) -> None:
    paths, pipe = stuck

    def mend() -> None:
        pipe.with_suffix(".new").write_bytes(png(COLOURS[3]))
        pipe.with_suffix(".new").rename(pipe)  # before another worker has started

    readers = Readers(2)
    thread = killing(readers, str(pipe), 1, mend)
    found = pixels(readers, paths)
    thread.join(10)
    assert not thread.is_alive()
    assert all(isinstance(each, np.ndarray) for each in found) and found[3][0, 0].tolist() == list(COLOURS[3])  # type: ignore


# -- going on in the middle -------------------------------------------------------------------------


def seen(source: Source, size: int, batches: int) -> list[Any]:
    return [[each.tolist() for each in batch.latents[:, 0, 0, 0]] for batch in (source.batch(size) for _ in range(batches))]  # type: ignore[index]


@given(
    stop=st.integers(0, 12), more=st.integers(1, 8), size=st.integers(1, 9), processes=st.integers(1, 3), seed=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_stopped_anywhere_it_goes_on_with_the_same_samples(stop: int, more: int, size: int, processes: int, seed: int) -> None:
    made: list[Callable[..., Source]] = [lambda **options: fake_source(PIPELINE, **options), buckets]
    for make in made:
        for rank in range(processes):
            share = {"rank": rank, "processes": processes, "seed": seed}
            whole, left, found = make(**share), make(**share), make(**share)
            order = seen(whole, size, stop + more)
            seen(left, size, stop)
            found.load_state(json.loads(json.dumps(left.state())))
            assert seen(found, size, more) == order[stop:]
            assert found.state() == whole.state()


@given(
    cut=st.integers(0, 6), batch=st.sampled_from([6, 12]), before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 2, 6])
)
@settings(max_examples=30, deadline=None)
def test_the_joint_order_is_no_matter_of_how_many_share_it(cut: int, batch: int, before: int, after: int) -> None:
    """The same joint batches on another number of processes, from the middle of an epoch too."""

    def joint(processes: int, batches: int, state: Any = None) -> tuple[list[set[float]], Any]:
        parts = [fake_source(PIPELINE, rank=rank, processes=processes) for rank in range(processes)]
        for part in parts:
            if state is not None:
                part.load_state(state)
        drawn = [seen(part, batch // processes, batches) for part in parts]
        return [set().union(*(each[i] for each in drawn)) for i in range(batches)], parts[0].state()

    whole, _ = joint(1, cut + 4)
    first, state = joint(before, cut)
    assert first + joint(after, 4, state)[0] == whole


def test_buckets_are_a_source() -> None:
    assert isinstance(buckets(), Buckets)
