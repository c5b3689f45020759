"""What `fastgen methods` says of costs, networks and steps is what is counted on the toy teacher; the page of comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.costs import ROOT, cost
from benchmarks.methods import MOVES, WARM_UP, recipe, trial
from benchmarks.methods_page import page, shown, write_page
from fastgen import methods
from fastgen.cli.methods import costs, listing, spans, summary
from fastgen.training.loop import Trainer

FEW = ("progressive", "lcm", "dmd2")


def test_every_method_is_counted_and_belongs_to_a_family() -> None:
    ours = [name for name in methods.names() if methods.find(name).__module__.startswith("fastgen.methods.")]
    assert list(costs()) == ours
    assert {methods.find(name).family for name in ours} == {  # type: ignore[attr-defined]
        "progressive", "consistency", "distribution matching", "adversarial", "score identity",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in methods.names()]
)
def test_costs_are_those_counted(name: str) -> None:
    assert cost(name) == costs()[name]


def test_an_lcm_update_is_a_student_with_gradient_and_its_target_and_a_guided_teacher_without() -> None:
    assert (costs()["lcm"]["trained"], costs()["lcm"]["forward"]) == (1, 3)
    text = listing([summary("lcm", methods.find("lcm"))])
    assert "1 + 3" in text and "images, prompts" in text and "1-8" in text


def test_spans() -> None:
    assert spans([1, 2, 3, 8]) == "1-3, 8" and spans([4]) == "4" and spans([]) == ""


def test_the_price_of_an_update_leaves_out_the_first_and_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = iter([100.0] * WARM_UP + [1.0, 2.0] * 100)
    steps: list[int] = []

    def distill(run: Any, folder: Path, **options: Any) -> None:
        steps.append(run.train.steps)
        for _ in range(run.train.steps):
            Trainer.update(None)  # type: ignore[arg-type]

    monkeypatch.setattr("benchmarks.methods.distill", distill)
    monkeypatch.setattr("benchmarks.methods.cpu_seconds", lambda update: next(prices))
    assert trial("dmd2", 1) == (1.5, 2) and steps == [2 * MOVES]


@pytest.mark.parametrize("name", list(costs()))
def test_the_short_run_has_an_update_for_every_stage(name: str) -> None:
    assert 0 < recipe(name, 0).method.stage_end(0, MOVES) <= MOVES


def record(name: str, seed: int = 0, own: int = 4, **scores: tuple[float, float]) -> dict[str, Any]:
    """A record whose rows, `step4=(5.0, 0.9)`, have a Fréchet distance and a strict accuracy."""
    others = dict.fromkeys(("precision", "recall", "clip_score", "diversity_ratio"), 0.5)
    rows = [{"steps": int(key[4:]), "scores": {"fd": fd, "accuracy": right, **others}} for key, (fd, right) in scores.items()]
    budget = {"updates": 10, "student_updates": 5, "cpu_minutes": 1.0}
    return {"name": name, "seed": seed, "own_steps": own, "rows": rows, "budget": budget, "images": 600, "command": "..."}


FEW_STEPS = {"step8": (3.0, 0.9), "step4": (6.0, 0.8), "step2": (9.0, 0.5), "step1": (20.0, 0.1)}
TEACHER = record("teacher", step0=(1.0, 1.0), step50=(2.0, 0.9), **FEW_STEPS)


def test_the_page_says_what_passes_and_why_the_others_miss() -> None:
    records = {
        "teacher": [TEACHER],
        "dmd2": [record("dmd2", step4=(5.9, 0.77))],
        "lcm": [record("lcm", step1=(10.1, 0.76), step2=(8.0, 0.8), step4=(5.0, 0.9), step8=(3.1, 0.9))],
        "tcd": [record("tcd", i, 8, step8=scores) for i, scores in enumerate([(4.0, 0.9), (2.0, 0.9), (2.5, 0.7)])],
    }
    text = page(records, {"lcm": "Its target forgets."})
    assert "| `dmd2` |  |  | **passes** |  | 1 |" in text and "- `dmd2`" not in text
    assert "| `lcm` | misses | passes | **passes** | misses | 1 |" in text
    why = "1 step: Fréchet distance 10.10, not 10.00 or less; strict accuracy 0.76, not 0.77 or more. "
    assert f"- `lcm` {why}8 steps: Fréchet distance 3.10, not 3.00 or less. Its target forgets." in text
    assert "| `tcd` |  |  |  | **passes** | 3 |" in text and "| 2.50 (2.00-4.00) |" in text
    assert "Why is not known yet." not in page(records, {}), "at its own number of steps each passes"
    assert "Not run yet: `add`" in text
    records["dmd"] = [record("dmd", own=1, step1=(15.0, 0.8))]
    assert "- `dmd` 1 step: Fréchet distance 15.00, not 10.00 or less. Why is not known yet." in page(records, {})
    with pytest.raises(ValueError, match="findings on dmd7"):
        page(records, {"dmd7": "It flies."})


def test_medians_have_a_range_where_there_are_several() -> None:
    rows = [{"fd": value} for value in (4.0, 1.0, 2.0)]
    assert shown(rows, "fd", 1) == "2.0 (1.0-4.0)" and shown(rows[:1], "fd", 2) == "4.00"


def test_the_page_is_that_of_the_records(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    made = write_page(ROOT / "benchmarks" / "results" / "methods", tmp_path / "methods.md", docs / "methods-findings.json")
    assert made.read_text() == (docs / "methods.md").read_text(), "run python -m benchmarks.methods --page"
