"""Prompt sets: ours by name, other people's by content, and what is wrong with a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fastgen.errors import UserError
from fastgen.eval.prompt_sets import SHIPPED, PromptSet, read_prompt_set

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    '"Fly" is written, on a wall\tOutdoor Scenes\tComplex\t\n'
)
DRAWBENCH = 'Prompts,Category\nA red colored car.,Colors\n"A sign that says ""Hi"", please.",Text\n'
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
]
COCO = {
    "info": {"year": 2014},
    "images": [{"id": 42, "file_name": "b.jpg"}, {"id": 7, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 42, "id": 9, "caption": "later words"},
        {"image_id": 42, "id": 3, "caption": "A man on a hill.\n"},
        {"image_id": 7, "id": 5, "caption": "Two dogs"},
    ],
}
MJHQ = {"126c": {"category": "plants", "prompt": "a garden"}, "9f00": {"category": "people", "prompt": "a face"}}


def write(folder: Path, text: str, name: str = "given") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_our_own_set():
    found = read_prompt_set("varied")
    assert set(SHIPPED) == {"varied"} and found.name == "varied"
    assert Counter(found.categories) == dict.fromkeys(
        ("object", "count", "colour", "position", "binding", "scene", "people", "text", "style", "long"), 20
    )
    assert len(set(found.prompts)) == len(found) == 200
    assert all(prompt == prompt.strip() and prompt.isprintable() for prompt in found.prompts)


def test_a_subset_keeps_every_category():
    found = read_prompt_set("varied").subset(30)
    assert len(found) == 30 and set(Counter(found.categories).values()) == {3}
    assert found.name == "varied, 30 of 200" and found.sha256 != read_prompt_set("varied").sha256
    assert found.subset(30) is found
    with pytest.raises(UserError, match="at least 1 prompt, not 0"):
        found.subset(0)


@pytest.mark.parametrize("name", ["given", "given.txt", "given.any"])
def test_formats_are_recognised_by_content(tmp_path: Path, name: str):
    def read(text: str) -> PromptSet:
        return read_prompt_set(write(tmp_path, text, name))

    parti = read(PARTI)
    assert parti.prompts == ("bond", '"Fly" is written, on a wall') and parti.categories == ("Abstract", "Outdoor Scenes")
    assert parti.extra[0] == {"challenge": "Basic", "note": "Biology-inspired concepts"}
    drawn = read(DRAWBENCH)
    assert drawn.prompts == ("A red colored car.", 'A sign that says "Hi", please.') and drawn.categories == ("Colors", "Text")
    geneval = read("\n".join(map(json.dumps, GENEVAL)) + "\n")
    assert geneval.categories == ("single_object", "colors") and geneval.extra[1]["include"][0]["color"] == "red"
    assert {**geneval.extra[0], "prompt": geneval.prompts[0]} == GENEVAL[0]
    coco = read(json.dumps(COCO))
    assert coco.prompts == ("Two dogs", "A man on a hill.") and coco.extra[1] == {"image_id": 42, "file_name": "b.jpg"}
    mjhq = read(json.dumps(MJHQ, indent=1))
    assert mjhq.prompts == ("a garden", "a face") and mjhq.categories == ("plants", "people")
    assert mjhq.extra[0] == {"name": "126c"}
    hpd = read(json.dumps(["a knight", "a castle"]))
    assert hpd.prompts == ("a knight", "a castle") and set(hpd.categories) == {"given"}
    ranked = read(json.dumps([{"prompt": "a knight", "image_path": ["1.jpg"], "rank": [1]}]))
    assert ranked.prompts == ("a knight",) and ranked.extra[0]["rank"] == [1]
    plain = read("a dog, running\n\n  [V] a cat \n{odd\n")
    assert plain.prompts == ("a dog, running", "[V] a cat", "{odd") and plain.categories == (None,) * 3


def test_the_hash_is_that_of_the_prompts(tmp_path: Path):
    plain = read_prompt_set(write(tmp_path, "a knight\na castle\n", "a.txt"))
    listed = read_prompt_set(write(tmp_path, '["a knight", "a castle"]', "b.json"))
    assert plain.sha256 == listed.sha256 != read_prompt_set(write(tmp_path, "a castle\na knight\n", "c.txt")).sha256


def test_a_folder_of_styles(tmp_path: Path):
    for style in ("photo", "anime"):
        write(tmp_path, json.dumps([f"one {style}", f"two {style}"]), f"{style}.json")
    found = read_prompt_set(tmp_path)
    assert found.prompts == ("one anime", "two anime", "one photo", "two photo")
    assert found.categories == ("anime", "anime", "photo", "photo") and found.name == tmp_path.name


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{"caption": "y"}\n', "line 2 must be an object with a prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": " "}\n', "line 2 has no prompt"),
        ("a.jsonl", '{"prompt": "x", "category": 3}\n', "line 1 has the category 3"),
        ("a.json", '{"annotations": [\n{"image_id" 3}]}', "line 2 is not JSON"),
        ("a.json", '{"annotations": [{"image_id": 3}]}', "annotation 1 must have an image_id and a caption"),
        ("a.json", '["a", 3]', "entry 2 must be an object with a prompt, not 3"),
        ("a.json", '["a", ""]', "entry 2 has no prompt"),
        ("a.json", '{"x": {"category": "y"}}', "entry 'x' must be an object with a prompt"),
        ("a.json", '{"images": []}', "no prompt set that is known"),
        ("a.json", "[]", "holds no prompts"),
        ("a.csv", 'Prompts,Category\na,b\n"c,d\n', "line 3 cannot be read as a table"),
        ("a.csv", "Prompts,Category\na,b\nc,d,e\n", "line 3 has 3 columns, the first line has 2"),
        ("a.tsv", "Prompt\tCategory\na\tb\n\tb\n", "line 3 has no prompt"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, text: str, message: str):
    path = write(tmp_path, text, name)
    with pytest.raises(UserError, match=message) as caught:
        read_prompt_set(path)
    assert str(caught.value).startswith(str(path))


def test_names_and_folders_that_are_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"variety: there is no such file, and no prompt set of that name; there are varied"):
        read_prompt_set("variety")
    with pytest.raises(UserError, match=r"is a folder without \.json files"):
        read_prompt_set(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(UserError, match="line 2 is not text in UTF-8"):
        read_prompt_set(tmp_path / "a.txt")
