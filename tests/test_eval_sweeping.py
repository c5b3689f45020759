"""Drawing for sweeps: resumable batch by batch, shared by processes, pictures that say what they show; and what is recorded."""

from __future__ import annotations

import inspect
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from fastgen.data.toy.scenes import sample_scenes
from fastgen.errors import UserError
from fastgen.eval import TOY
from fastgen.eval.drawing import Processes, draw, finish, is_drawn, part_file
from fastgen.eval.evaluation import real_images
from fastgen.eval.features import Extraction, embed
from fastgen.eval.gathering import gather_parts, load_embedded, save_embedded
from fastgen.eval.images import PictureFolder
from fastgen.eval.pictures import PartOfFolder, read_words, split_reference
from fastgen.eval.protocol import attention, differences, require_same
from fastgen.eval.results import load_json, load_results, save_tensors
from fastgen.eval.sweep import Setting, sweep, teacher
from tests.test_sweep import IMAGES, METRICS, tiny

PROMPTS = [f"a small red circle {i // 2}" for i in range(7)]
SEEDS = [i % 2 for i in range(7)]


def drawn(folder: Path, **options: Any) -> dict[str, bytes]:
    """Draws seven pictures in batches of two; the bytes of the files by name."""
    pipeline = tiny()
    draw(lambda: pipeline, Setting(1, 2.0), PROMPTS, SEEDS, folder, name="teacher", batch=2, **options)
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def means(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"fid": images.double().mean((2, 3))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("whole") / "row"
    return folder, drawn(folder, features=means)


def test_a_picture_says_what_it_shows(whole: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = whole
    assert list(files) == [f"{i:06d}.png" for i in range(7)]
    found = read_words(folder / "000003.png")
    assert {"model": "teacher", "prompt": PROMPTS[3], "seed": "1", "steps": "1", "guidance": "2"}.items() <= found.items()
    assert PictureFolder(folder).shape == (7, 3, 32, 32)
    (folder.parent / "none.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_words(folder.parent / "none.png")


def test_finished_batches_are_not_drawn_again(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = StableDiffusionPipeline.__call__

    def counting(self: StableDiffusionPipeline, *args: Any, **named: Any) -> Any:
        asked.extend(named["prompt"])
        return original(self, *args, **named)

    counting.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counting)
    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "row", tell=stop, features=means)
    assert seen == [2, 4] and asked == PROMPTS[:4] and not is_drawn(tmp_path / "row")
    assert [part_file(tmp_path / "row", start).is_file() for start in (0, 2, 4, 6)] == [True, True, False, False]
    assert drawn(tmp_path / "row", features=means) == whole[1]
    assert asked == PROMPTS, "only what was missing"
    kept: list[dict[str, torch.Tensor]] = []
    finish(tmp_path / "row", 7, 2, kept.extend)
    about = load_json(tmp_path / "row" / "drawn.json")
    assert about["calls"] == 2 and about["seconds"] > 0 and about["sampler"]["scheduler"]["class"] == "DDIMScheduler"
    assert not list((tmp_path / "row").glob("part-*")) and not list(tmp_path.rglob("*.tmp"))
    expected = means(PictureFolder(tmp_path / "row")[:])["fid"]
    assert torch.equal(torch.cat([each["fid"] for each in kept]), expected)
    part_file(tmp_path / "row", 2).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"part-000000\.safetensors is missing or damaged"):
        finish(tmp_path / "row", 7, 2)


def test_features_of_parts_are_those_of_one_pass(tmp_path: Path) -> None:
    images = real_images(sample_scenes(20, torch.Generator().manual_seed(0)), 1)
    whole = embed(images, TOY)
    made = gather_parts([Extraction(TOY).features(images[start : start + 8]) for start in (0, 8, 16)], TOY, 20)
    save_embedded(tmp_path / "features.safetensors", made)
    read = load_embedded(tmp_path / "features.safetensors")
    assert read is not None and load_embedded(tmp_path / "none.safetensors") is None
    for found in (made, read):
        for layer in ("fid", "prc"):
            torch.testing.assert_close(found.rows[layer], whole.rows[layer], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.moments.covariance, whole.moments.covariance, atol=1e-4, rtol=1e-4)
        assert found.moments.count == 20
    save_tensors(tmp_path / "other.safetensors", {"fid": torch.zeros(2)})
    with pytest.raises(UserError, match="does not hold features"):
        load_embedded(tmp_path / "other.safetensors")


def test_two_shares_make_the_whole(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    first = set(drawn(tmp_path / "row", team=Processes(0, 2)))
    assert first == {f"{i:06d}.png" for i in (0, 1, 4, 5)}
    assert drawn(tmp_path / "row", team=Processes(1, 2)) == whole[1]


def test_what_a_worker_cannot_do_is_told(tmp_path: Path) -> None:
    def broken(images: torch.Tensor) -> dict[str, torch.Tensor]:
        raise UserError("no features today")

    with pytest.raises(UserError, match="no features today"):
        drawn(tmp_path / "row", features=broken)
    assert not part_file(tmp_path / "row", 0).exists()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def process(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    PartialState._reset_state()  # an earlier test of this process may have left one
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE="2")
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number), OMP_NUM_THREADS="1")
    rows = sweep([teacher(tiny(), steps=[2, 1], guidance=2.0)], Path(folder), images=IMAGES, metrics=METRICS, batch=4)
    assert len(rows) == (3 if number == 0 else 0)
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_files_that_one_makes(tmp_path: Path) -> None:
    sweep([teacher(tiny(), steps=[2, 1], guidance=2.0)], tmp_path / "one", images=IMAGES, metrics=METRICS, batch=4)
    mp.start_processes(process, (free_port(), str(tmp_path / "two")), nprocs=2, start_method="fork")
    one, two = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))}
        for name in ("one", "two")
    )
    assert len(one) == 3 * IMAGES and one == two
    alone, together = load_results(tmp_path / "one"), load_results(tmp_path / "two")
    assert [row.scores for row in alone.rows] == [row.scores for row in together.rows]
    assert not differences(alone.protocol, together.protocol, ignore=["time", "machine"])


def test_the_teachers_images_are_evidence_for_the_other_rows(tmp_path: Path) -> None:
    candidates = [teacher(tiny(), steps=[1, 2], guidance=[2.0, 1.0])]
    rows = sweep(candidates, tmp_path, images=IMAGES, metrics=["teacher_pixels", "accuracy"], batch=12)
    assert [(row.steps, row.guidance) for row in rows[1:]] == [(1, 2.0), (2, 2.0), (1, 1.0), (2, 1.0)]
    results, best = load_results(tmp_path), rows[2]
    assert "teacher_rms" not in best.scores and "teacher" not in best.protocol
    for row in (rows[1], rows[3], rows[4]):
        assert row.protocol["teacher"]["fingerprint"] == best.fingerprint
        mine, theirs = (results.images(each)[:].double() / 255 for each in (row, best))
        each = (mine - theirs).square().flatten(1).mean(1).sqrt()
        assert row.scores["teacher_rms"] == pytest.approx(each.mean().item(), rel=1e-6)
        torch.testing.assert_close(results.values(row)["teacher_rms"].double(), each, atol=1e-6, rtol=0)
        low, high = row.intervals["teacher_rms"]
        assert low < row.scores["teacher_rms"] < high


def test_records_are_compared_field_by_field() -> None:
    a = {
        "images": {"count": 8},
        "metrics": {"x": {"version": 1}},
        "machine": {"device": "a"},
        "model": {"name": "m"},
        "time": 1,
    }
    b = {"images": {"count": 8}, "metrics": {"x": {"version": 1}, "y": {"version": 1}}, "machine": {"device": "b"}, "time": 2}
    assert differences(a, a) == []
    assert differences(a, b) == [
        *(("machine.device", "a", "b"), ("metrics.y.version", None, 1), ("model.name", "m", None), ("time", 1, 2))
    ]
    assert differences(a, b, ignore=["machine", "time", "metrics.y", "model.name"]) == []
    require_same(a, b)
    b["metrics"] = {"x": {"version": 2}}
    with pytest.raises(UserError, match=r"metrics\.x\.version is 1 in A and 2 in B; measure both in the same way"):
        require_same(a, b)
    b["images"] = {"count": 9}
    with pytest.raises(UserError, match=r"images\.count is 8 in one and 9 in two, and so do metrics\.x\.version; measure"):
        require_same(a, b, names=("one", "two"))
    require_same(a, b, ignore=["images.count", "metrics"])


def test_attention_is_named() -> None:
    pipeline = tiny()
    assert attention(pipeline) == "native"
    pipeline.unet.set_attn_processor(AttnProcessor())
    assert attention(pipeline) == "unfused"
    pipeline.enable_attention_slicing()
    assert "sliced" in attention(pipeline)


def test_a_reference_is_split_without_being_read(tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    real, floor = split_reference(PictureFolder(tmp_path), 2)
    assert isinstance(real, PartOfFolder) and tuple(real.shape) == (3, 3, 4, 4) and len(floor) == 2
    assert real[:][:, 0, 0, 0].tolist() == [0, 1, 2] and floor[:][:, 0, 0, 0].tolist() == [3, 4]
    assert real[1:9][:, 0, 0, 0].tolist() == [1, 2] and len(floor[2:4]) == 0


def test_an_evaluation_with_images_explains_itself(tmp_path: Path) -> None:
    from fastgen.eval import evaluate

    found = evaluate(tiny(), number=6, steps=1, guidance=1.0, only=["accuracy"], images_folder=tmp_path / "images")
    record = json.loads((tmp_path / "images" / "evaluation.json").read_text())
    assert record["protocol"]["sampler"]["steps"] == 1 and record["protocol"]["images"] == {"count": 6}
    assert record["scores"] == found.scores and PictureFolder(tmp_path / "images").shape[0] == 6
    assert read_words(tmp_path / "images" / "000001.png")["prompt"] == found.prompts[1]
