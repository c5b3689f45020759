"""Flags of `fastgen eval` and `fastgen sweep` that say what is measured, and by which networks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fastgen.cli import main
from fastgen.cli.eval import protocol, toy_guidance
from fastgen.cli.sweep import scales
from fastgen.cli.targets import plain_folder
from fastgen.errors import UserError
from fastgen.eval.evaluation import real_images
from fastgen.eval.features import embed
from fastgen.eval.statistics import Statistics
from fastgen.eval.world import PHOTO, TOY
from tests.test_sweep import export, tiny

FLAGS = {"number": 8, "seeds_per_prompt": 2, "batch": 4, "reference": None, "prompts": None, "weights": None, "features": None}
FLAGS |= {"clip": None, "offline": True, "seed": None, "device": "cpu"}


def asked(**flags: object) -> dict:
    return protocol(argparse.Namespace(**{**FLAGS, **flags}))


def test_flags_become_a_world_and_a_prompt_set(tmp_path: Path) -> None:
    assert asked()["world"] == TOY and asked()["prompts"] is None
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(10)))
    found = asked(prompts=str(tmp_path / "prompts.txt"), weights=tmp_path, features="dinov2-vit-b-14", clip="ViT-g-14/x")
    world = found["world"]
    assert (world.name, world.features, world.clip, world.weights) == ("photo", "dinov2-vit-b-14", "ViT-g-14/x", tmp_path)
    assert world.offline and not asked(offline=False)["world"].offline
    assert len(found["prompts"]) == 4 and found["prompts_from"] == "prompts, 4 of 10", "8 pictures, 2 of each prompt"
    assert asked(prompts=str(tmp_path / "prompts.txt"))["world"] == PHOTO
    for flags, words in (
        ({"weights": tmp_path / "none"}, "--weights .*none: is not a folder"),
        ({"reference": tmp_path / "none"}, "--reference .*none: is neither a folder of pictures nor a file of statistics"),
        ({"prompts": "no-such-set"}, "there is no such file, and no prompt set of that name"),
        ({"batch": 0}, "--batch must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            asked(**flags)


def test_the_shipped_teacher_is_guided_as_it_should_be(tmp_path: Path) -> None:
    folder = plain_folder("toy")
    assert toy_guidance(folder, None) == 3.0 and toy_guidance(folder, 1.5) == 1.5
    assert toy_guidance(str(tmp_path), None) is None


def test_several_guidance_scales() -> None:
    assert scales("1,3,7.5") == [1.0, 3.0, 7.5]
    for wrong in ("0.5", "1,x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="numbers from 1"):
            scales(wrong)


def test_eval_keeps_pictures_times_calls_and_reads_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastgen.eval.evaluation import toy_prompts

    scenes = toy_prompts(8)[2]
    Statistics.of(embed(real_images(scenes, 1), TOY).moments, TOY).save(tmp_path / "real.npz")
    tiny().save_pretrained(tmp_path / "model")
    common = ["--number", "8", "--steps", "1", "--device", "cpu", "--offline", "--quiet"]
    more = ["--reference", str(tmp_path / "real.npz"), "--metrics", "fidelity,accuracy", "--latency"]
    assert main(["eval", str(tmp_path / "model"), *common, *more, "--images", str(tmp_path / "images"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"].keys() >= {"fd", "accuracy"} and "kd" not in found["scores"]
    assert found["protocol"]["reference"]["count"] == 8 and found["protocol"]["model"]["name"] == str(tmp_path / "model")
    assert [each["batch"] for each in found["settings"]["latency"]["batches"]] == [1, 8]
    assert json.loads((tmp_path / "images" / "evaluation.json").read_text()) == found
    assert main(["eval", str(tmp_path / "model"), *common, "--metrics", "accuracy", "-o", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("accuracy") and (tmp_path / "out.values.safetensors").is_file()
    assert main(["eval", str(tmp_path / "model"), *common, "--metrics", "acuracy"]) == 2
    assert "did you mean 'accuracy'" in capsys.readouterr().err


def test_pictures_for_genevals_own_scorer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path / "model")
    record = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    other = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
    (tmp_path / "prompts.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(other)}\n")
    common = ["eval", str(tmp_path / "model"), "--number", "4", "--steps", "1", "--device", "cpu", "--offline", "--quiet"]
    more = ["--prompts", str(tmp_path / "prompts.jsonl"), "--geneval", str(tmp_path / "geneval"), "--metrics", "colour"]
    assert main([*common, *more]) == 0
    found = sorted(str(path.relative_to(tmp_path / "geneval")) for path in (tmp_path / "geneval").rglob("*.*"))
    assert found == [
        f"0000{i}/{name}" for i in range(2) for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    ]
    assert json.loads((tmp_path / "geneval" / "00001" / "metadata.jsonl").read_text()) == other
    capsys.readouterr()
    assert main([*common, *more]) == 2 and "exists already" in capsys.readouterr().err
    assert main([*common, "--geneval", str(tmp_path / "x")]) == 2 and "needs GenEval's prompts" in capsys.readouterr().err


def test_sweep_of_several_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(tmp_path / "student", steps=1)
    tiny().save_pretrained(tmp_path / "teacher")
    flags = ["--teacher", str(tmp_path / "teacher"), "--teacher-steps", "1", "--guidance", "1,2", "--metrics", "accuracy"]
    command = ["sweep", str(folder), *flags, "--number", "4", "--device", "cpu", "--offline", "--quiet", "--json"]
    assert main([*command, "--output", str(tmp_path / "sweep")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["role"], row["guidance"]) for row in rows] == [
        ("real", None),
        ("teacher", 1.0),
        ("teacher", 2.0),
        ("student", 1.0),
    ]
