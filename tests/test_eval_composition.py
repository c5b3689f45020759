"""GenEval: prompts, rules on boxes made by hand, its layout on disk, and our detector with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from fastgen.data.toy.scenes import Scenes
from fastgen.errors import UserError
from fastgen.eval import PHOTO, World
from fastgen.eval.detector import REPOSITORY, ColourReader, cut_out, detect, load_detector, objects, prepare
from fastgen.eval.evaluation import gather, measure_images, real_images, toy_prompts
from fastgen.eval.geneval import CLASSES, COLOURS, Detection, judge, kept, relations, requirements, write_geneval
from fastgen.eval.images import read_images
from fastgen.eval.measures.accuracy import binding
from fastgen.eval.prompt_sets import read_prompt_set

Box = tuple[float, float, float, float]


def seen(*boxes: Box, confidence: float = 0.95) -> list[Detection]:
    return [Detection(box, confidence - 0.001 * i) for i, box in enumerate(boxes)]


def no_colours(found, name):
    raise AssertionError("no colour was asked for")


def right(prompt: str, found: dict[str, list[Detection]], colours=no_colours) -> bool:
    wanted = requirements(prompt)
    return judge(wanted, kept(found, wanted["tag"]), colours)[0]


# -- prompts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag, prompt, include, exclude",
    [
        ("single_object", "a photo of an orange", [{"class": "orange", "count": 1}], None),
        ("two_object", "a photo of a tv remote and an apple", [{"class": "tv remote"}, {"class": "apple"}], None),
        ("counting", "a photo of three buses", [{"class": "bus", "count": 3}], [{"class": "bus", "count": 4}]),
        ("counting", "a photo of two skises", [{"class": "skis", "count": 2}], [{"class": "skis", "count": 3}]),
        ("counting", "a photo of four vases", [{"class": "vase", "count": 4}], [{"class": "vase", "count": 5}]),
        ("colors", "a photo of an orange orange", [{"class": "orange", "color": "orange"}], None),
        (
            "position",
            "a photo of a dog left of a wine glass",
            [{"class": "wine glass"}, {"class": "dog", "position": ["left of", 0]}],
            None,
        ),
        (
            "color_attr",
            "a photo of a red cup and a black teddy bear",
            [{"class": "cup", "color": "red"}, {"class": "teddy bear", "color": "black"}],
            None,
        ),
    ],
)
def test_what_a_prompt_asks_for(tag: str, prompt: str, include: list[dict], exclude: list[dict] | None):
    wanted = {"tag": tag, "include": [{"count": 1, **clause} for clause in include], "prompt": prompt}
    assert requirements(prompt) == wanted | ({"exclude": exclude} if exclude else {})


@pytest.mark.parametrize("prompt", ["a dog", "a photo of a dragon", "a photo of two dog", "a photo of a mauve cup", ""])
def test_other_prompts_ask_for_nothing_we_know(prompt: str):
    assert requirements(prompt) is None


# -- rules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, expected",
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((40, 40, 60, 60), set()),  # the same place
        ((44, 40, 64, 60), set()),  # 4 pixels apart, and 0.1 * (20 + 20) are asked for
        ((45, 40, 65, 60), set()),  # (5 - 4) / 5 = 0.2, not beyond one half
        ((49, 40, 69, 60), {"right of"}),  # (9 - 4) / 9 = 0.56
        ((48, 40, 68, 60), set()),  # (8 - 4) / 8 = 0.5
    ],
)
def test_relations_of_boxes(a: Box, expected: set[str]):
    assert relations(Detection(a, 1), Detection((40, 40, 60, 60), 1)) == expected


def test_single_and_two_objects():
    boxes = [(0, 0, 9, 9), (20, 0, 29, 9)]
    assert right("a photo of a cat", {"cat": seen(*boxes)})  # more than one is no mistake here
    assert not right("a photo of a cat", {"dog": seen(*boxes)})
    assert not right("a photo of a cat", {"cat": seen(boxes[0], confidence=0.3)})
    assert right("a photo of a cat", {"cat": seen(boxes[0], confidence=0.31)})
    assert right("a photo of a cat and a dog", {"cat": seen(boxes[0]), "dog": seen(boxes[1])})
    assert not right("a photo of a cat and a dog", {"cat": seen(*boxes)})


def test_counting_wants_neither_less_nor_more_and_more_confidence():
    boxes: list[Box] = [(20.0 * i, 0, 20.0 * i + 9, 9) for i in range(4)]
    assert [right("a photo of three cups", {"cup": seen(*boxes[:n])}) for n in range(5)] == [False, False, False, True, False]
    doubtful = seen(boxes[3], confidence=0.9)
    assert right("a photo of three cups", {"cup": [*seen(*boxes[:3]), *doubtful]})
    wanted = requirements("a photo of three cups")
    assert judge(wanted, kept({"cup": seen(*boxes[:2])}, "counting"), no_colours)[1] == "3 cup expected, 2 found"


def test_of_a_class_at_most_sixteen_count_the_most_confident_first():
    many = [Detection((0, 0, 1, 1), 0.3 + 0.01 * i) for i in range(30)]
    found = kept({"cup": many, "dog": many[:1]}, "single_object")
    assert list(found) == ["cup"] and [round(one.confidence, 2) for one in found["cup"][:2]] == [0.59, 0.58]
    assert len(found["cup"]) == 16


def test_colours_are_asked_of_the_most_confident_objects_and_bound_to_their_class():
    asked: list[tuple[str, int]] = []

    def colours(found, name):
        asked.append((name, len(found)))
        return [{"cup": "red", "dog": "black"}[name]] * len(found)

    both = {"cup": seen((0, 0, 9, 9), (9, 9, 12, 12)), "dog": seen((20, 0, 29, 9))}
    assert right("a photo of a red cup", both, colours) and asked == [("cup", 1)]
    assert not right("a photo of a white cup", both, colours)
    assert right("a photo of a red cup and a black dog", both, colours)
    assert not right("a photo of a black cup and a red dog", both, colours)


def test_positions_are_those_of_the_first_objects_and_fail_without_a_target():
    found = {"cup": seen((0, 40, 20, 60), (80, 40, 99, 60)), "dog": seen((40, 40, 60, 60))}
    assert right("a photo of a cup left of a dog", found)
    assert not right("a photo of a cup right of a dog", found)
    assert right("a photo of a dog right of a cup", found)
    wanted = requirements("a photo of a cup left of a dog")
    assert judge(wanted, {"cup": found["cup"]}, no_colours) == (
        False,
        "1 dog expected, 0 found; nothing there for cup to be left of",
    )
    said = judge(requirements("a photo of a cup above a dog"), found, no_colours)[1]
    assert said == "cup expected above its target, found left of"


# -- on disk ---------------------------------------------------------------------------------------------------------------


def test_images_in_genevals_layout(tmp_path: Path):
    prompts = ["a photo of a cat", "a photo of a red cup", "a photo of two dogs"]
    lines = [requirements(prompt) for prompt in prompts]
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = read_prompt_set(file)
    records = [extra | {"prompt": prompt} for prompt, extra in zip(known.prompts, known.extra, strict=True)]
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    texts = [prompts[2], prompts[0], prompts[2], prompts[0]]
    assert write_geneval(images, texts, tmp_path / "out", records=records) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000", "00002"]
    assert json.loads((tmp_path / "out" / "00002" / "metadata.jsonl").read_text()) == lines[2]
    samples = tmp_path / "out" / "00002" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["00000.png", "00001.png"]
    assert torch.equal(read_images(samples), images[[0, 2]])
    assert write_geneval(images, texts, tmp_path / "other") == 2
    assert json.loads((tmp_path / "other" / "00000" / "metadata.jsonl").read_text()) == lines[2]


def test_what_cannot_be_written_is_named(tmp_path: Path):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="1 prompts are not GenEval's, the first is 'a unicorn'"):
        write_geneval(images, ["a unicorn"], tmp_path / "a")
    with pytest.raises(UserError, match="2 prompts for 1 images"):
        write_geneval(images, ["a", "b"], tmp_path / "a")
    write_geneval(images, ["a photo of a cat"], tmp_path / "a")
    with pytest.raises(UserError, match="holds something already"):
        write_geneval(images, ["a photo of a cat"], tmp_path / "a")


# -- the detector ----------------------------------------------------------------------------------------------------------


@cache
def tiny_detector() -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=10,
        id2label={i: name for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config).eval().requires_grad_(False)


def logits_for(*wanted: tuple[int, float]) -> Tensor:
    """Logits of queries [Q, 81], each with a probability for one class."""
    found = torch.full((len(wanted), len(CLASSES) + 1), -30.0)
    for row, (index, probability) in zip(found, wanted, strict=True):
        row[index], row[-1] = torch.tensor([probability, 1 - probability]).log()
    return found


def test_objects_from_queries_and_masks():
    masks = torch.full((4, 16, 16), -20.0)
    masks[0, 4:8, 2:12] = 20
    masks[1, 10:14, 10:16] = 20
    masks[3, :4, :4] = 20
    found = objects(logits_for((15, 0.9), (15, 0.99), (16, 0.9), (17, 0.2)), masks, (32, 32))
    assert list(found) == ["cat"]  # the dog has no mask, the horse too little confidence
    assert [round(one.confidence, 2) for one in found["cat"]] == [0.99, 0.9]
    assert found["cat"][1].box == (4, 8, 24, 16) and found["cat"][0].box == (20, 20, 32, 28)
    assert found["cat"][1].mask.sum() == 20 * 8
    # A mask that is unsure of itself lowers the confidence to nothing.
    assert objects(logits_for((15, 0.5)), torch.full((1, 4, 4), 0.1), (8, 8)) == {}


def test_confidences_are_those_of_transformers():
    torch.manual_seed(3)
    logits, masks = 6 * torch.randn(1, 10, len(CLASSES) + 1), torch.randn(1, 10, 24, 24)
    outputs = type("Outputs", (), {"class_queries_logits": logits, "masks_queries_logits": masks})()
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(outputs, threshold=0.3, return_binary_maps=True)[0]
    ours = objects(logits[0], masks[0], (384, 384))
    by_name = sorted((one.confidence, CLASSES.index(name)) for name, found in ours.items() for one in found)
    expected = sorted((segment["score"], segment["label_id"]) for segment in theirs["segments_info"])
    # They take as many pairs as there are queries, we a hundred: ours begin with theirs.
    top = sorted(by_name)[-len(expected) :]
    assert len(expected) > 2 and [index for _, index in top] == [index for _, index in expected]
    assert [score for score, _ in top] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_pictures_are_prepared_as_transformers_prepares_them():
    images = torch.randint(256, (1, 3, 60, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})(images[0], return_tensors="pt")
    torch.testing.assert_close(prepare(images), theirs["pixel_values"], atol=0.03, rtol=0)


def test_a_tiny_network_detects_and_is_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastgen.eval.detector.SHORTER", 64)
    folder = tmp_path / REPOSITORY
    folder.mkdir(parents=True)
    network = tiny_detector()
    network.save_pretrained(folder)  # under the names that the published weights have
    names = set(load_file(folder / "model.safetensors"))
    assert "model.pixel_level_module.encoder.embeddings.patch_embeddings.projection.weight" in names
    assert "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight" in names
    world = replace(PHOTO, weights=tmp_path)
    read = load_detector(world)
    load_detector.cache_clear()
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    inputs = prepare(images)
    assert inputs.shape == (2, 3, 64, 64)
    torch.testing.assert_close(
        read(pixel_values=inputs).class_queries_logits, network(pixel_values=inputs).class_queries_logits
    )
    for name, value in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    assert len(detect(images, read)) == 2
    save_file({"class_predictor.bias": torch.zeros(81)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors does not hold the weights of .* is missing or of another shape"):
        load_detector(world)
    (folder / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(UserError, match="it is of another network"):
        load_detector(world)
    (folder / "config.json").write_text(json.dumps(network.config.to_dict() | {"id2label": {"0": "cat"}}))
    with pytest.raises(UserError, match="a detector of 1 classes; COCO has 80"):
        load_detector(world)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"mask2former-swin-small-coco-instance/resolve/main/config\.json"):
        load_detector(world)


# -- colours ---------------------------------------------------------------------------------------------------------------


class FakeClip:
    """Sees the mean colour of a crop; knows the words for three."""

    def see(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.float().mean((2, 3)) / 255 - 0.1, dim=1)

    def read(self, prompts: list[str]) -> Tensor:
        known = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
        words = [next((vector for word, vector in known.items() if word in text), (-1.0, -1.0, -1.0)) for text in prompts]
        return nn.functional.normalize(torch.tensor(words), dim=1)


def fake_clip(name: str, world: World, device: str = "cpu") -> FakeClip:
    assert name == "ViT-L-14/openai" and world is PHOTO
    return FakeClip()


def test_an_object_is_cut_out_on_grey():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 2:4] = True
    cut = cut_out(image, Detection((1, 2, 5, 6), 1, mask))
    assert cut.shape == (3, 4, 4) and (cut[:, :2, 1:3] == 200).all() and (cut == 200).sum() == 3 * 4
    assert (cut[:, 0, 0] == 0x99).all()
    assert (cut_out(image, Detection((0, 0, 3, 2), 1)) == 200).all()


def test_colours_and_the_score_from_end_to_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastgen.eval.detector.known_clip", fake_clip)
    images = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = torch.tensor([220, 10, 10], dtype=torch.uint8)[:, None, None]
    images[2, :, 4:12, 4:12] = torch.tensor([10, 10, 220], dtype=torch.uint8)[:, None, None]
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    cup = Detection((4, 4, 12, 12), 0.95, mask)
    reader = ColourReader(PHOTO)
    assert [reader(image, [cup], "cup") for image in images[[0, 2]]] == [["red"], ["blue"]]
    assert reader.classifier("cup").shape == (len(COLOURS), 3)
    monkeypatch.setattr("fastgen.eval.measures.composition.load_detector", lambda world, device: None)
    monkeypatch.setattr(
        "fastgen.eval.measures.composition.detect", lambda images, network, device: [{"cup": [cup]} for _ in images]
    )
    prompts = ["a photo of a red cup", "a photo of a dog", "a photo of a red cup", "a teapot"]
    measured = measure_images(gather(images, prompts, world=PHOTO), ["geneval_compatible"])
    assert measured.scores == {
        "geneval_compatible": 0.25, "geneval_compatible_colors": 0.5, "geneval_compatible_single_object": 0.0,
    }  # fmt: skip
    assert "pass over 1 of 4 images" in measured.notes[0]
    alone = measure_images(gather(images[:1], ["a teapot"], world=PHOTO), ["geneval_compatible"])
    assert alone.scores == {} and "none of the prompts is one of GenEval's" in alone.notes[0]


# -- bindings in the toy world ---------------------------------------------------------------------------------------------


def scene(shapes: tuple[int, int], colours: tuple[int, int], axis: int = 0, count: int = 2) -> Scenes:
    zero = torch.zeros(1, 2, dtype=torch.long)
    return Scenes(
        torch.tensor([count]), torch.tensor([shapes]), torch.tensor([colours]), zero, zero, torch.tensor([axis]), zero[:, 0]
    )


@pytest.mark.parametrize(
    "seen, expected",
    [
        (scene((1, 2), (3, 4)), (True, True)),
        (scene((2, 1), (4, 3)), (True, False)),
        (scene((1, 2), (3, 4), axis=1), (True, False)),
        (scene((1, 2), (4, 3)), (False, False)),
        (scene((1, 2), (3, 3)), (False, False)),
        (scene((1, 2), (3, 4), count=3), (False, False)),
    ],
)
def test_binding_and_relation(seen: Scenes, expected: tuple[bool, bool]):
    bound, placed = binding(seen, scene((1, 2), (3, 4)))
    assert (bound.item(), placed.item()) == expected


def test_mirrored_pictures_keep_bindings_and_lose_relations():
    prompts, _, scenes = toy_prompts(120)
    images = real_images(scenes, 11)
    right = measure_images(gather(images, prompts, scenes=scenes), ["accuracy"])
    assert right.scores["accuracy_binding"] > 0.95 and right.scores["accuracy_relation"] > 0.95
    assert "accuracy_relation" in right.intervals
    mirrored = measure_images(gather(images.flip(3), prompts, scenes=scenes), ["accuracy"])
    assert mirrored.scores["accuracy_binding"] > 0.9
    vertical = (scenes.axis[scenes.count == 2] == 1).float().mean().item()
    assert mirrored.scores["accuracy_relation"] == pytest.approx(vertical, abs=0.1)
