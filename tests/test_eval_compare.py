"""Comparing two models: what is known to differ is seen, what does not differ is not, and unlike protocols are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgen.cli import main
from fastgen.errors import UserError
from fastgen.eval import evaluate
from fastgen.eval.compare import Subject, compare, frechet_verdict, holm, mean_verdict, open_subject, sign_flip
from fastgen.eval.features import Embedded
from fastgen.eval.moments import Moments
from fastgen.eval.sweep import sweep, teacher
from tests.test_sweep import IMAGES, tiny

PROMPTS = [f"prompt {i // 2}" for i in range(80)]
SEEDS = [i % 2 for i in range(80)]


def subject(name: str, values: torch.Tensor, **more: torch.Tensor) -> Subject:
    values = {"clip_score": values, **more}  # type: ignore[assignment]
    scores = {key: each.double().mean().item() for key, each in values.items()}  # type: ignore[attr-defined]
    protocol = {"images": {"count": 80}, "metrics": {"clip": {"version": 1}}}
    return Subject(name, protocol, scores, PROMPTS, SEEDS, values)  # type: ignore[arg-type]


def noise(seed: int) -> torch.Tensor:
    return torch.randn(80, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_what_differs_is_seen_and_told() -> None:
    base = 5 * noise(0)
    a = subject("first", base, accuracy=(base > 0).double(), teacher_rms=base)
    b = subject("second", base + 0.8 + 0.3 * noise(1), accuracy=(base > 0).double(), teacher_rms=base + 0.5)
    found = compare(a, b)
    score, accuracy, distance = found.verdicts
    assert (found.images, found.prompts) == (80, 40)
    assert score.difference == pytest.approx(b.scores["clip_score"] - a.scores["clip_score"])
    assert score.seen and score.low < score.difference < score.high and score.low < 0.8 < score.high
    assert score.sentence.startswith("B's CLIP score is higher by 0.") and score.sentence.endswith("B is better.")
    assert not accuracy.seen and accuracy.p == 1 and "the same for both in every image" in accuracy.sentence
    assert distance.seen and distance.sentence.endswith("B is worse."), "of a distance, less is better"
    back = compare(b, a).verdicts[0]
    assert back.difference == pytest.approx(-score.difference) and "lower by 0." in back.sentence
    assert [each.key for each in compare(a, b, only=["clip_score"]).verdicts] == ["clip_score"]
    parts = [replace(each, scores={**each.scores, "accuracy_one": 0.5}) for each in (a, b)]
    parts = [replace(each, values={**each.values, "accuracy_one": each.values["accuracy"]}) for each in parts]
    assert "accuracy_one" not in {each.key for each in compare(*parts).verdicts}, "a part of a score, unless it is asked for"
    assert [each.key for each in compare(*parts, only=["accuracy_one"]).verdicts] == ["accuracy_one"]


def test_what_does_not_differ_is_not_seen() -> None:
    a, b = subject("first", noise(0)), subject("second", noise(1))
    (verdict,) = compare(a, b).verdicts
    assert not verdict.seen and verdict.low < 0 < verdict.high
    width = (verdict.high - verdict.low) / 2
    assert "No difference in CLIP score can be seen at 80 images" in verdict.sentence
    assert f"larger than {width:.3f}" in verdict.sentence


def test_images_of_a_prompt_are_no_independent_witnesses() -> None:
    once = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.double) + 0.35
    twice = once.repeat_interleave(2)
    alone = mean_verdict("clip_score", torch.zeros(40), once, [f"{i}" for i in range(40)])
    together = mean_verdict("clip_score", torch.zeros(80), twice, PROMPTS)
    assert together.p == pytest.approx(alone.p, abs=0.01)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=1e-6)


def test_the_sign_flip_test_is_the_exact_one_for_few_prompts() -> None:
    prompts = ["a", "b", "c", "d"]
    assert sign_flip(torch.tensor([1.0, 1.0, 1.0, 1.0]), prompts) == 2 / 16, "all signs alike, either way"
    assert sign_flip(torch.tensor([3.0, 1.0, 1.0, -1.0]), prompts) == 8 / 16, "half of the signs of the rest give at least 1"
    assert sign_flip(torch.zeros(4), prompts) == 1
    many = [f"{i}" for i in range(60)]
    shares = [sign_flip(torch.randn(60, generator=torch.Generator().manual_seed(i)), many, flips=400) for i in range(100)]
    assert 0 < sum(share < 0.2 for share in shares) / 100 < 0.35, "p values of nothing are spread evenly"


def test_holms_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def embedded(rows: torch.Tensor) -> Embedded:
    return Embedded(Moments.of(rows), {"fid": rows, "prc": rows})


def test_distances_are_paired_by_their_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    real, rows = (torch.randn(count, 3, generator=generator, dtype=torch.double) for count in (4000, 80))
    prompts = [f"{i}" for i in range(80)]
    a = replace(subject("a", noise(0)), prompts=prompts, features=embedded(rows), reference=embedded(real))
    worse = replace(a, features=embedded(rows + 0.7))
    alike = replace(a, features=embedded(rows + 0.02 * torch.randn(80, 3, generator=generator, dtype=torch.double)))
    found, other = frechet_verdict(a, worse), frechet_verdict(a, alike)
    assert found is not None and other is not None
    assert found.difference > 0.5 and found.p < 0.01 and found.low > 0
    assert other.p > 0.05 and other.high - other.low < 0.2 * (found.high - found.low), "what both share cancels"
    draws = []
    for _ in range(200):
        chosen = torch.randint(80, (80,), generator=generator)
        pair = [replace(each, features=embedded(each.features.rows["fid"][chosen])) for each in (a, worse)]  # type: ignore[union-attr]
        draws.append(frechet_verdict(*pair).difference)  # type: ignore[union-attr]
    spread = torch.tensor(draws).std().item()
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(spread, rel=0.3), "the bootstrap's spread"
    assert frechet_verdict(a, replace(worse, reference=embedded(real + 1))) is None
    assert frechet_verdict(a, replace(worse, features=None)) is None


def test_unlike_protocols_are_refused() -> None:
    a = subject("a", noise(0))
    b = replace(subject("b", noise(1)), protocol={"images": {"count": 81}, "metrics": {}, "model": {"name": "b"}})
    with pytest.raises(UserError, match=r"images\.count is 80 in A and 81 in B"):
        compare(a, b)
    assert compare(a, b, ignore=["images.count"]).verdicts
    with pytest.raises(UserError, match="share the pictures of fewer than two prompts"):
        compare(a, replace(a, prompts=["other"] * 80))
    with pytest.raises(UserError, match="fd cannot be tested between these two"):
        compare(
            replace(a, scores={**a.scores, "fd": 1.0}), replace(a, scores={**a.scores, "fd": 2.0}), only=["fd", "clip_score"]
        )


def test_rows_of_sweeps_and_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny()
    pipeline.save_pretrained(tmp_path / "pipeline")
    sweep(
        [teacher(pipeline, steps=[2, 1], guidance=[2.0])], tmp_path / "sweep", images=IMAGES, metrics=["accuracy", "fidelity"]
    )
    for steps in (1, 2):
        evaluate(
            tmp_path / "pipeline", number=IMAGES, steps=steps, guidance=2.0, only=["accuracy", "fidelity"],
            images_folder=tmp_path / f"eval{steps}", output=tmp_path / f"eval{steps}.json",
        )  # fmt: skip
    row = f"{tmp_path / 'sweep'}::teacher/1"
    assert main(["compare", row, "::teacher/2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["a"], found["b"]) == ("teacher, 1 step, guidance 2", "teacher, 2 steps, guidance 2")
    assert {"accuracy", "fd"} <= {each["key"] for each in found["verdicts"]} and "Precision" in found["notes"][0]
    assert main(["compare", str(tmp_path / "eval1"), str(tmp_path / "eval2.json")]) == 0
    told = capsys.readouterr().out
    assert f"{IMAGES} images of {IMAGES // 2} prompts, paired by prompt and seed" in told
    assert main(["compare", row, str(tmp_path / "eval2"), "--json"]) == 0, "a row of a sweep and an evaluation"
    mixed = {each["key"]: each["b"] for each in json.loads(capsys.readouterr().out)["verdicts"]}
    assert mixed["accuracy"] == next(each["b"] for each in found["verdicts"] if each["key"] == "accuracy")
    for arguments, words in (
        ([row, "::student/1"], "no rows are called 'student/1'; there are ::teacher/2/2, ::teacher/1/2"),
        ([str(tmp_path / "sweep"), row], "which row is meant?"),
        (["::teacher/1", row], "names a row, but no sweep"),
        ([str(tmp_path), row], "is neither a sweep, nor a record"),
        ([f"{tmp_path}::teacher/1", row], "is not a sweep"),
    ):
        assert main(["compare", *arguments]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "eval1.values.safetensors").unlink()
    with pytest.raises(UserError, match="which holds the values of single images, cannot be read"):
        open_subject(str(tmp_path / "eval1.json"))
