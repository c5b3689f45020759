"""The benchmarks of speed: what they count, on whose module, and that docs/fast.md is what was recorded."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.bare import EXAMPLES, BarePipeline, load_module, random_source
from benchmarks.calls import Kind, Watch
from fastgen.adapters import LoraOptions
from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.methods import find
from fastgen.training.loop import Trainer

SMALL = """
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("convolutions", {path!r})
convolutions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convolutions)

def make():
    return convolutions.Convolutions(sample_shape=(4, 4, 4), condition_width=8, width=8)

def bad():
    return convolutions.Block(8, 8, 8)
"""


@pytest.fixture
def module(tmp_path: Path) -> nn.Module:
    """A file of one's own, whose module is the example's but small."""
    path = tmp_path / "mine.py"
    path.write_text(SMALL.format(path=str(EXAMPLES / "convolutions.py")))
    return load_module(f"{path}:make")


def counted(module: nn.Module, name: str, options: dict[str, Any], lora: LoraOptions | None = None) -> tuple[Watch, Counter]:
    """The calls of the third update of a method on a module."""
    torch.manual_seed(0)
    pipeline: Any = BarePipeline(module, lora=lora)
    method = find(name)(**options)
    method.setup(pipeline)
    train = TrainConfig(steps=100, batch=2, lr=1e-6)
    trainer = Trainer(method, random_source(pipeline, method.needs, 8), train, device="cpu")
    watch = Watch(trainer)
    for _ in range(2):
        with watch.watching():
            trainer.update()
        watch.counts()
    with watch.watching():
        trainer.update()
    return watch, watch.counts()


def told(watch: Watch, calls: Counter[Kind]) -> dict[str, int]:
    """The calls in words: of which batch, forward and backward."""
    found: Counter[str] = Counter()
    for kind, number in calls.items():
        if kind.role >= 0:
            forward, backward = kind.names()
            found[f"{kind.shapes[0][0][0]}: {forward}" + (f", {backward}" if backward else "")] += number
    return dict(found)


def test_every_call_of_an_update_is_seen_with_what_its_cost_depends_on(module: nn.Module) -> None:
    watch, calls = counted(module, "lcm", {"guidance_low": 3.0, "guidance_high": 3.0})
    assert told(watch, calls) == {
        "4: forward": 1,
        "2: forward": 1,
        "2: forward with graph, backward to weights": 1,
    }, "guided teacher, target, student"
    assert watch.steps == {"student": 1}
    watch, calls = counted(module, "sid", {"steps": 1, "guidance": 3.0})
    into = "forward with graph, backward to input"
    assert told(watch, calls) == {
        "2: forward": 1,
        "2: forward with graph, backward to weights": 2,
        "4: " + into: 1,
        "2: " + into: 1,
    }, "the student's samples, its turn and the fake score's, and the student's gradient through both scores"
    assert watch.steps == {"fake_score": 1, "student": 1}


def test_passes_for_features_alone_and_heads_are_seen(module: nn.Module) -> None:
    watch, calls = counted(module, "dmd2", {"steps": 1, "guidance": 3.0, "student_every": 1})
    end = ", to the features only"
    assert told(watch, calls) == {
        "2: forward": 2,
        "4: forward": 1,
        "2: forward with graph, backward to weights": 2,
        f"2: forward with graph{end}, backward to weights{end}": 1,
        f"2: forward with graph{end}, backward to input{end}": 1,
    }
    heads = {kind.names() for kind in calls if kind.role < 0}
    assert heads == {
        ("forward with graph", "backward to weights and input"),
        ("forward with graph", "backward to input"),
    }


def test_derivatives_are_seen_and_where_a_step_ends_is_told_through_the_condition(module: nn.Module) -> None:
    watch, calls = counted(module, "mean_flow", {"guidance": 3.0, "apart": 1.0})
    assert told(watch, calls) == {"4: forward": 1, "2: forward with derivative with graph, backward to weights": 1}
    with pytest.raises(UserError, match="condition_width"):
        BarePipeline(load_module(f"{EXAMPLES / 'convolutions.py'}:unconditional")).trainable("student", end_time=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lcm", {"guidance_low": 3.0, "guidance_high": 3.0}),
        ("mean_flow", {"apart": 1.0}),
        ("dmd2", {"steps": 1, "student_every": 1}),
    ],
)
def test_what_is_made_alone_is_the_same_work(module: nn.Module, name: str, options: dict[str, Any]) -> None:
    """Counted by torch's own account of operations: the calls by themselves are all of an update's passes, and no more."""
    from torch.utils.flop_counter import FlopCounterMode

    watch, calls = counted(module, name, options)
    with FlopCounterMode(display=False) as alone:
        for kind, number in calls.items():
            for _ in range(number):
                watch.alone(kind)
    with watch.watching(), FlopCounterMode(display=False) as whole:
        watch.trainer.update()
    assert whole.get_total_flops() == pytest.approx(alone.get_total_flops(), rel=0.02)


def test_alone_leaves_the_weights_as_they_are(module: nn.Module) -> None:
    watch, calls = counted(module, "dmd2", {"steps": 1, "student_every": 1})
    before = {turn.player.name: [weight.clone() for weight in turn.weights] for turn in watch.trainer.turns}
    for kind in calls:
        assert min(watch.alone(kind)) >= 0
    for turn in watch.trainer.turns:
        assert watch.step_alone(turn.player.name) > 0
        assert all(torch.equal(one, other) for one, other in zip(before[turn.player.name], turn.weights, strict=True))
        assert all(weight.grad is None and weight.requires_grad for weight in turn.weights)


def test_a_bare_module_is_trained_as_adapters_too() -> None:
    path = f"{EXAMPLES / 'transformer.py'}:make"
    module = type(load_module(path))(sample_shape=(4, 4, 4), condition_width=8, width=8, depth=2, heads=2)  # type: ignore[call-arg]
    watch, calls = counted(module, "lcm", {"guidance_low": 3.0, "guidance_high": 3.0}, LoraOptions(rank=2))
    assert told(watch, calls)["2: forward with graph, backward to weights"] == 1
    assert len(watch.networks) == 1, "one base"
    assert sum(weight.numel() for weight in watch.trainer.turns[0].weights) == 2 * 2 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)


def test_modules_that_are_none_are_refused_in_a_sentence(tmp_path: Path, module: nn.Module) -> None:
    path = tmp_path / "mine.py"
    for where, problem in (
        (f"{path}:none", "no function none"),
        ("there:make", "FILE.py:FACTORY"),
        (f"{path}:bad", "sample_shape"),
    ):
        with pytest.raises(UserError, match=problem):
            load_module(where)
    with pytest.raises(UserError, match="lora_targets"):
        BarePipeline(module, lora=LoraOptions(rank=2))


def test_step_records_what_was_counted_beside_what_the_plan_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module("benchmarks.step")
    path = tmp_path / "mine.py"
    path.write_text(SMALL.format(path=str(EXAMPLES / "convolutions.py")))
    monkeypatch.setattr(step, "beyond", lambda run, device: {"peak": 1})
    monkeypatch.setattr(step, "keep_freed_memory", lambda: False)  # it would be for good, in the tests' process
    found = step.main(
        ["--module", f"{path}:make", "--batch", "2", "--methods", "lcm", "--rounds", "2", "--output", str(tmp_path / "r")]
    )
    assert json.loads((tmp_path / "r").read_text())["networks"][0]["network"] == f"{path}:make"
    [row] = found["networks"][0]["methods"]
    assert row["samples_through_the_network"] == row["samples_in_costs_json"] == 4
    assert {name: each["a_round"] for name, each in row["calls"].items()} == {
        "network, batch 2: backward to weights": 1,
        "network, batch 2: forward": 1,
        "network, batch 2: forward with graph": 1,
        "network, batch 4: forward": 1,
        "optimiser of the student": 1,
    }
    assert row["ratio"] > 0 and row["updates_a_second"] > 0


def test_every_method_of_the_benchmark_fits_a_bare_module(module: nn.Module) -> None:
    step = importlib.import_module("benchmarks.step")
    for name in step.METHODS:
        trainer = step.make_trainer(name, BarePipeline(module), 2, "fp32", "cpu")
        trainer.update()
        assert trainer.step == 1, name


def test_exponents_and_slopes() -> None:
    scaling = importlib.import_module("benchmarks.scaling")
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert scaling.slope([1, 2, 4], [3, 5, 9]) == pytest.approx(2)


FAULTS = """
import resource, torch
from benchmarks.allocator import keep_freed_memory
kept = keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1_000_000) for _ in range(16)]
    del blocks
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """In a process of its own, as it is for good. Else 64 MB are up to 15,625 pages that the system clears each time anew."""
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=EXAMPLES.parents[1], capture_output=True, text=True, check=True)
    kept, found = (int(each) for each in run.stdout.split())
    assert kept == 1 and found < 100


def test_the_page_is_what_was_recorded() -> None:
    page = importlib.import_module("benchmarks.fast_page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run python -m benchmarks --page"
    assert set(page.BLOCK.findall(text)[i][1] for i in range(len(page.TABLES))) == set(page.TABLES), "every table is there"


def test_tables_say_what_their_records_say(tmp_path: Path) -> None:
    page = importlib.import_module("benchmarks.fast_page")
    text = "# A\n<!-- table: sampling -->\nold\n<!-- end -->\nB <!-- table: roles -->\n<!-- end -->\n"
    row = {
        "layout": "diffusers",
        "batch": 1,
        "steps": 4,
        "ms": {"diffusers": 12.0},
        "fastgen_over_diffusers": 1.04,
        "fastgen_over_diffusers_calls": 0.99,
        "teacher_over_student": 13.5,
    }
    record = {
        "command": "python -m x",
        "processor": "P",
        "versions": {"torch": "9", "peft": "1"},
        "date": "2026",
        "rows": [row],
    }
    (tmp_path / "sampling.json").write_text(json.dumps(record))
    filled = page.filled(text, tmp_path)
    assert "| `diffusers` | 1 | 4 | 12 | 1.04 | 0.99 | 13.5 |" in filled and "`python -m x`; P; torch 9; 2026." in filled
    assert "old" not in filled and page.MISSING in filled and filled.startswith("# A\n") and "\nB " in filled
    assert page.filled(filled, tmp_path) == filled
    assert page.ratios(tmp_path) == [
        ("sampling", "diffusers, batch 1, 4 steps: calls, fastgen over diffusers", 0.99, "1.00 or less")
    ]


def test_switches_are_shown_wherever_two_ways_are_compared() -> None:
    page = importlib.import_module("benchmarks.fast_page")
    update = {"on_seconds": 0.1, "off_seconds": 0.2, "on_over_off": 0.5, "difference_of_gradients": 1e-7}
    found = {
        "rounds": 3,
        "passes": {"dmd2": update, "bytes_kept": {"on": 1e6, "off": 4e6}},
        "layout": {"last_seconds": 1.0, "plain_seconds": 2.0, "last_over_plain": 0.5, "first_call_seconds": 3.0},
    }
    assert page.switches(found)[2:] == [
        "| passes, dmd2 | on over off | **0.50** | 100, 200 | 1e-07 |",
        "| layout | last over plain | **0.50** | 1e+03, 2e+03 |  |",
        "| passes, kept for the backward pass | on over off | **0.25** | 1 MB, 4 MB |  |",
    ]


def test_the_list_of_benchmarks_is_of_those_that_are_there() -> None:
    main = importlib.import_module("benchmarks.__main__")
    assert {"step", "roles", "sampling", "scaling", "memory"} <= set(main.known()) <= set(main.QUICK)
    with pytest.raises(SystemExit):
        main.main(["--only", "nothing"])
