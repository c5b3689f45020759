"""Gauges: what they say of numbers, when they speak, what a run writes of them, and that docs/health.md lists them all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import health as runs
from fastgen.config import TrainConfig
from fastgen.denoiser import Condition, Denoiser
from fastgen.losses.readings import LEVELS, Readings, listen, record_answers, record_pull, record_scores
from fastgen.method import Batch, Loss
from fastgen.process import Flow
from fastgen.training.calls import Calls
from fastgen.training.gauges import GAUGES, gauge
from fastgen.training.health import FEW, Health, from_losses, moved_and_size, sampled, with_update_sizes
from fastgen.training.loop import Trainer
from fastgen.training.pictures import beside_teacher, contrast, diversity, saturation
from tests.training_fakes import Duel, FakePipeline, fake_source, same, weights

PAGE = Path(__file__).parents[1] / "docs" / "health.md"


# -- gauges -------------------------------------------------------------------------------------------


def test_the_page_lists_every_gauge_as_it_is() -> None:
    assert runs.gauges_text() in PAGE.read_text(encoding="utf-8"), "write it anew: python -m benchmarks.health"


@pytest.mark.parametrize("each", GAUGES, ids=lambda each: each.name)
def test_bounds_are_nested_and_every_side_has_advice(each: Any) -> None:
    assert each.low or each.high
    if each.low:
        assert each.red[0] < each.amber[0]
    if each.high:
        assert each.amber[1] < each.red[1]
    for advice in filter(None, (each.low, each.high)):
        assert not advice.means.endswith(".") and not advice.remedy.endswith(".")
    middle = (max(each.amber[0], -1e9) + min(each.amber[1], 1)) / 2 if each.high else 1.0
    assert each.judge(middle) == ("green", None)
    assert each.judge(math.nan)[0] == "red"


def test_a_bound_must_be_passed_by_twice_the_error() -> None:
    lag = gauge("fake_score_lag")
    above = lag.red[1] + 0.1
    assert lag.judge(above) == ("red", lag.high) and lag.judge(above, 0.04) == ("red", lag.high)
    assert lag.judge(above, 0.2)[0] == "amber" and lag.judge(above, 2.0)[0] == "green"
    assert lag.judge(-above) == ("red", lag.low) and gauge("gradient_norm/student").name == "gradient_norm"


# -- readings -----------------------------------------------------------------------------------------


def test_readings_are_made_of_what_losses_recorded() -> None:
    readings, count = Readings(), 4 * FEW
    x, real = torch.zeros(count, 2), torch.full((count, 2), 2.0)
    t = torch.arange(count) % LEVELS / LEVELS + 0.1
    fake = torch.where(t[:, None] > 0.8, 3.0, 1.0).expand(count, 2)
    with listen(readings):
        record_scores(x, fake, real, t)
        record_pull(x + 4, torch.ones_like(x))
        record_answers(torch.ones(count, 1), torch.where(t[:, None] > 0.3, -1.0, 1.0), t)
    found = from_losses(readings.take())
    assert found["pull"].value == 0.25
    assert found["fake_score_error"].value == 9 / 4 and found["fake_score_error"].levels == (0.25, 0.25, 0.25, 2.25)
    # x - fake times real - fake: -1 where fake is 1, -3 times -1 where it is 3
    assert found["fake_score_lag"].value == pytest.approx((-3 + 3) / 4, abs=1e-6)
    assert found["noise_levels"].value == 0.25 and found["noise_levels"].levels == (0.25,) * 4
    assert found["discriminator"].value == pytest.approx(7 / 8) and found["discriminator"].levels == (0.5, 1, 1, 1)
    assert from_losses({}) == {}


def lines(health: Health, norms: list[float], **more: Any) -> list[tuple[dict[str, float], dict[str, str]]]:
    return [health.line(i, {"a/gradient_norm": norm, **more}, {}, {"a": 10}) for i, norm in enumerate(norms)]  # type: ignore[misc]


def test_a_gradient_is_measured_against_the_first_lines() -> None:
    found = lines(Health(), [50.0, 1, 2, 3, 2, 100, 400, math.inf])
    assert "reading/gradient_norm/a" not in found[3][0] and found[4][0]["reading/gradient_norm/a"] == 1
    assert [each[1].get("gradient_norm/a") for each in found] == [None] * 5 + ["amber", "red", None]


def test_skipped_updates_are_a_share_of_those_since_the_last_line() -> None:
    health = Health()
    shares = [health.line(i, {"a/skipped": n}, {}, {"a": 10})[0]["reading/skipped/a"] for i, n in enumerate((1, 1, 6))]
    assert shares == [0.1, 0, 0.5]


def test_what_turns_is_told_once_with_what_to_try_and_when_it_is_over() -> None:
    said: list[str] = []
    health = Health(said.append)
    for step, ratio in enumerate((1.0, 1.3, 1.0, 1.3, 1.3, 1.3, 2.0, 1.0, 1.0)):
        health.line(step, {}, {"contrast": ratio}, {})
    assert [line.split(" (")[0] for line in said] == [
        "update 4: contrast is amber", "update 6: contrast is red", "update 8: contrast is green again",
    ]  # fmt: skip
    assert gauge("contrast").high.means in said[0] and f"Try: {gauge('contrast').high.remedy}." in said[0]  # type: ignore[union-attr]


def test_quality_is_held_against_the_best_before_it() -> None:
    health = Health()
    found = [health.line(i, {}, {"quality": q}, {}) for i, q in enumerate((4.0, 2.0, 3.0, 9.0))]
    assert [each[0].get("reading/quality") for each in found] == [None, 0.5, 1.5, 4.5]
    assert found[3][1] == {"quality": "red"}


def test_a_run_that_goes_on_remembers(tmp_path: Path) -> None:
    health, path = Health(), tmp_path / "metrics.jsonl"
    first = [5.0, 1.0, 1.0, 1.0]
    text = [json.dumps({"step": i, "a/gradient_norm": norm, "quality": 3 + i}) for i, norm in enumerate(first)]
    path.write_text("\n".join(text) + "\n")
    health.recall(path)
    straight = Health()
    lines(straight, first)
    assert health.norms == straight.norms and health.best == 3
    assert lines(health, [20.0])[0] == lines(straight, [20.0])[0]
    other = Health()
    health.readings.add("x", torch.ones(2))
    other.load_state(json.loads(json.dumps(health.state())))
    assert other.skipped == health.skipped and other.readings.take() == health.readings.take()


def test_the_size_of_an_update_is_a_share_of_the_weights() -> None:
    layer = nn.Linear(3, 2)
    parts = list(layer.parameters())
    before = sampled(parts)
    with torch.no_grad():
        layer.weight.mul_(1.25)
        layer.bias.add_(100)  # vectors do not count
    found = {f"a/{name}": float(each) for name, each in moved_and_size(before, parts, torch.zeros(())).items()}
    assert with_update_sizes({"a/x": 1.0, **found}) == {"a/x": 1.0, "a/update_size": pytest.approx(0.25)}
    assert [float(each) for each in moved_and_size([], parts, torch.ones(())).values()] == [0, 0]


# -- pictures -----------------------------------------------------------------------------------------


def test_pictures_are_compared_with_the_teachers() -> None:
    torch.manual_seed(0)
    teacher = torch.rand(6, 3, 40, 40) * 1.6 - 0.8
    same_as = beside_teacher(teacher, teacher, 3)
    assert same_as == {"saturation": 1, "contrast": 1, "diversity": 1}
    flat = beside_teacher(teacher / 2, teacher, 3)
    assert flat["contrast"] == pytest.approx(0.5, rel=1e-3) and flat["diversity"] == pytest.approx(0.5, rel=1e-3)
    grey = teacher.mean(1, keepdim=True).expand_as(teacher)
    assert beside_teacher(grey, teacher, 3)["saturation"] < 1e-5 and float(contrast(grey).min()) > 0
    collapsed = teacher[[0, 0, 0, 3, 3, 3]]
    assert beside_teacher(collapsed, teacher, 3)["diversity"] == 0
    assert "diversity" not in beside_teacher(teacher, teacher, 1)
    assert "saturation" not in beside_teacher(teacher, torch.zeros_like(teacher), 1)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert float(saturation(red)) == pytest.approx(1) and float(contrast(red)) == pytest.approx(0, abs=1e-6)
    pair = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    assert diversity(pair, 2).tolist() == [0.5]


# -- training against sampling ------------------------------------------------------------------------


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def denoiser() -> Denoiser:
    return Denoiser(Shifted(), lambda network, xt, t, condition, guidance: network(xt), Flow(), "x0")


def gap(learnt: float, times: tuple[float, ...] = (1.0, 0.5)) -> float | None:
    """What is seen where inputs of training have another scale than those of sampling."""
    torch.manual_seed(0)
    student, calls, condition = denoiser(), Calls(), Condition({"x": torch.zeros(64, 1)})
    calls.follow(student, times)
    for t in times:
        for _ in range(6):
            student(learnt * torch.randn(64, 2, 3, 3), torch.full((64,), t), condition)
    with torch.no_grad():
        student(100 * torch.randn(64, 2, 3, 3), torch.full((64,), times[-1]), condition)  # of a rollout, which learns nothing
    with torch.no_grad(), calls.in_sampling():
        for t in times:
            student(torch.randn(256, 2, 3, 3), torch.full((256,), t), condition[[0] * 256])
    found = calls.gap()
    assert calls.gap() is None, "every measurement begins anew"
    return found


def test_inputs_of_training_that_are_not_those_of_sampling_are_seen() -> None:
    alike, other = gap(1.0), gap(0.6)
    assert alike is not None and other is not None
    assert gauge("sampling_gap").judge(alike)[0] == "green" and gauge("sampling_gap").judge(other)[0] != "green"
    assert gap(1.0, (1.0,)) is None, "a single call always starts from noise"


def test_calls_are_told_apart_from_those_of_the_student_before() -> None:
    one, two, calls = denoiser(), denoiser(), Calls()
    calls.follow(one, (1.0, 0.5))
    calls.follow(two, (1.0, 0.5))
    one(torch.randn(4, 2, 3, 3), torch.full((4,), 0.5), Condition({"x": torch.zeros(4, 1)}))
    assert calls.learning is None
    two(torch.randn(4, 2, 3, 3), torch.full((4,), 0.5), Condition({"x": torch.zeros(4, 1)}))
    assert calls.learning is not None and calls.learning[:, 0].tolist() == [0, 4]


# -- in a run -----------------------------------------------------------------------------------------


class Recorded(Duel):
    """A duel whose student tells of its samples, as the losses of score distillation do."""

    tell = True

    def student_loss(self, batch: Batch) -> Loss:
        terms = super().student_loss(batch)
        if self.tell:
            x = torch.full((len(batch.condition), 4, 2, 2), 2.0)
            record_scores(x, x + 1, x + 2, torch.linspace(0, 1, len(x)))
            record_pull(x, x / 8)
        return terms


def run(folder: Path, method: Duel, **options: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    pipeline = FakePipeline()
    method.setup(pipeline)
    train = replace(TrainConfig(steps=6, batch=4, lr=1e-3, log_every=2, checkpoint_every=0), **options)
    loop = Trainer(method, fake_source(pipeline), train, run_directory=folder, device="cpu")
    loop.fit()
    return loop


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_readings_and_is_not_changed_by_them(tmp_path: Path) -> None:
    silent = Recorded()
    silent.tell = False
    loud, quiet = run(tmp_path / "loud", Recorded()), run(tmp_path / "quiet", silent)
    assert same(weights(loud.method.trained), weights(quiet.method.trained))
    found, other = written(tmp_path / "loud"), written(tmp_path / "quiet")
    assert [line["reading/pull"] for line in found] == [0.125] * 3
    assert [line["reading/update_size/student"] > 0 for line in found] == [True] * 3
    assert [line["reading/skipped/critic"] for line in found] == [0] * 3
    assert not any(key.startswith("reading/pull") for line in other for key in line)
    assert all(math.isfinite(value) for line in found for key, value in line.items() if key != "health")


def test_skipped_updates_turn_red(tmp_path: Path) -> None:
    run(tmp_path, Recorded(poison=(2, 3)))
    assert [line.get("health", {}).get("skipped/student") for line in written(tmp_path)] == [None, "red", None]


# -- runs that are broken on purpose ------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    folder, world = tmp_path_factory.mktemp("runs"), runs.World()
    return {name: runs.colours(runs.train(world, case, folder / name)) for name, case in runs.CASES.items()}


@pytest.mark.slow
def test_a_healthy_run_is_green(seen: dict[str, dict[str, dict[str, int]]]) -> None:
    wrong = {name: counts for name, counts in seen["healthy"].items() if counts["amber"] + counts["red"] > counts["green"] / 4}
    assert wrong == {} and {name for case in runs.CASES.values() for name in case.names} <= set(seen["healthy"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in runs.CASES if name != "healthy"])
def test_what_is_broken_is_named(seen: dict[str, dict[str, dict[str, int]]], name: str) -> None:
    for each in runs.CASES[name].names:
        counts = seen[name][each]
        assert counts["amber"] + counts["red"] > counts["green"], f"{each}: {counts}"
