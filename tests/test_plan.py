"""What a plan says of memory is what a real update takes, and no weight is read for it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgen import config as configuration
from fastgen.cli import main
from fastgen.cli.plan import parse_size, size
from fastgen.config import RunConfig
from fastgen.data.encoding import free_text_encoders
from fastgen.errors import UserError
from fastgen.pipelines.quantization import linear_layers
from fastgen.plan import advice
from fastgen.plan.advice import advise
from fastgen.plan.estimate import Blank, estimate
from fastgen.plan.folding import fold
from fastgen.plan.ledger import Hollow, Ledger, empty
from fastgen.plan.record import Plan, Row, Turn
from fastgen.training.loop import Trainer
from fastgen.training.run import open_pipeline
from tests import tiny_models as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans")
    tiny.toy().save_pretrained(path / "toy")
    (path / "prompts.txt").write_text("a red cube\n")
    return path


def written(folder: Path, method: str, role: str = "full", **train: object) -> Path:
    lines = [f"pipeline = {str(folder / 'toy')!r}", "[method]", f"name = {method!r}", "[roles]", f"student = {role!r}"]
    lines += [
        "[lora]",
        "rank = 4",
        "[data]",
        f"prompts = {str(folder / 'prompts.txt')!r}",
        f"images = {str(folder)!r}",
        "[train]",
    ]
    lines += [f"{key} = {json.dumps(value)}" for key, value in {"batch": 8, "ema": 0.9, **train}.items()]
    file = folder / "run.toml"
    file.write_text("\n".join(lines))
    return file


def run_of(folder: Path, method: str, role: str = "full", **train: object) -> RunConfig:
    return configuration.load(written(folder, method, role, **train))


def changed(folder: Path, method: str, role: str, override: str) -> RunConfig:
    return configuration.load(written(folder, method, role), [override])


def measured(config: RunConfig, update: int = 0) -> list[int]:
    """The peaks of one real move of every player in `update`, from the storages that are alive, with real weights."""
    ledger = Ledger()
    with ledger:
        pipeline = open_pipeline(config)
        for component in pipeline.diffusers.components.values():
            if isinstance(component, nn.Module):
                for weight in [*component.parameters(), *component.buffers()]:
                    ledger.enter(weight)
        method = config.method
        method.setup(pipeline)
        trainer = Trainer(method, Blank(pipeline, method), config.train, device="cpu")  # type: ignore[arg-type]
        free_text_encoders(pipeline)
        begin, total = 0, config.train.steps
        while begin < total and begin <= update:
            trainer.step = begin
            if method.advance(begin, total):
                trainer.start_players()
                trainer.ema = trainer.start_ema()
            begin = method.stage_end(begin, total)
        method.advance(update, total)
        peaks = []
        for again in (False, True):  # the second time the optimiser's moments are there from the start
            for turn in trainer.turns:
                ledger.restart()
                trainer.move(turn)
                peaks += [ledger.peak] if again else []
    return peaks


@pytest.mark.parametrize(("method", "role"), [("dmd2", "full"), ("lcm", "lora"), ("progressive", "full")])
def test_the_peak_is_that_of_a_real_update(folder: Path, method: str, role: str) -> None:
    plan = estimate(run_of(folder, method, role))
    real = measured(run_of(folder, method, role))
    assert len(real) == len(plan.turns)
    for turn, peak in zip(plan.turns, real, strict=True):
        assert turn.peak == pytest.approx(peak, rel=0.1)


STAGED = {
    "hyper_sd": ["method.segments=[1]"],  # at last the fake score moves, and an anchor is asked
    "flash": ["method.grid=4"],  # no adversary at first
    "lightning": [
        "method.start_steps=4",
        "method.student_steps=[2, 1]",
        "method.objectives=['mse', 'conditional']",
    ],
}


@pytest.mark.parametrize(
    "method", ["hyper_sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flash", "lightning"))]
)
def test_a_method_in_stages_is_planned_at_the_dearest(folder: Path, method: str) -> None:
    config, real = (configuration.load(written(folder, method), STAGED[method]) for _ in range(2))
    plan = estimate(config)
    assert plan.looked_at >= 2 and plan.update > 0
    found = measured(real, plan.update)
    assert len(found) == len(plan.turns)
    for turn, peak in zip(plan.turns, found, strict=True):
        assert turn.peak == pytest.approx(peak, rel=0.1)
    assert plan.held == pytest.approx(sum(r.kept for r in plan.rows if "freed" not in r.name), rel=0.1)
    first = measured(configuration.load(written(folder, method), STAGED[method]))
    assert max(first) < 0.97 * plan.peak


def row(plan: Plan, name: str) -> dict[str, int]:
    (found,) = [vars(each) for each in plan.rows if each.name == name]
    return found


def test_the_rows_are_what_the_roles_hold(folder: Path) -> None:
    plan = estimate(run_of(folder, "dmd2"))
    count = sum(p.numel() for p in tiny.toy().unet.parameters())
    for role in ("student", "fake_score"):
        told = row(plan, role)
        assert told["parameters"] == told["trainable"] == count
        assert told["weights"] == told["gradients"] == 4 * count and told["optimizer"] == 8 * count
    assert row(plan, "student")["ema"] == 4 * count and row(plan, "fake_score")["ema"] == 0
    teacher = row(plan, "teacher (unet)")
    assert teacher["parameters"] == count and teacher["trainable"] == teacher["gradients"] == 0
    assert row(plan, "fake_score: heads")["trainable"] > 0
    assert plan.held == pytest.approx(sum(r.kept for r in plan.rows if "freed" not in r.name), rel=0.1)
    assert plan.sharded(1) == plan.peak > plan.sharded(8)


def test_adapters_share_the_base(folder: Path) -> None:
    plan = estimate(run_of(folder, "dmd2", "lora"))
    base = sum(p.numel() for p in tiny.toy().unet.parameters())
    assert row(plan, "teacher (unet)")["parameters"] == base
    assert row(plan, "student")["parameters"] == row(plan, "student")["trainable"] < base


def test_two_calls_of_half_the_batch_take_less(folder: Path) -> None:
    """Where a student waits with its graph for what a guided teacher says."""
    one = estimate(run_of(folder, "swiftbrush"))
    two = estimate(changed(folder, "swiftbrush", "full", "speed.batched_guidance=false"))
    assert two.turns[1].peak < one.turns[1].peak and one.turns[1].player == "student"


def test_no_weights_are_needed(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny.toy().save_pretrained(bare)
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    config = run_of(folder, "lcm")
    config.pipeline = str(bare)
    assert estimate(config).peak == estimate(run_of(folder, "lcm")).peak


def test_a_base_in_reduced_form_and_offloaded_parts(folder: Path) -> None:
    whole, reduced = estimate(run_of(folder, "lcm", "lora")), estimate(changed(folder, "lcm", "lora", 'quantize="nf4"'))
    layers = [layer for _, layer in linear_layers(tiny.toy().unet)]
    packed = sum(math.ceil(layer.weight.numel() / 64) * (64 // 2 + 4) + 256 * 4 for layer in layers)
    dropped = sum(layer.weight.numel() for layer in layers) * 4 - packed
    rows = [row(plan, "teacher (unet)") for plan in (whole, reduced)]
    assert rows[0]["parameters"] == rows[1]["parameters"] and rows[0]["weights"] - rows[1]["weights"] == dropped
    assert whole.held - reduced.held == dropped and whole.peak - reduced.peak == pytest.approx(dropped, rel=0.2)
    here, there = (estimate(changed(folder, "lcm", "lora", 'offload="encoders"'), device=name) for name in ("cpu", "cuda"))
    assert (here.held, here.peak) == (estimate(run_of(folder, "lcm", "lora"), device="cpu").held, here.peak)
    assert whole.held - there.held == row(whole, "vae")["weights"] > 0 == row(there, "vae, in the CPU's memory")["weights"]
    encoder = row(whole, "text_encoder, freed before training")["weights"]
    assert whole.preparing - there.preparing > 0.5 * encoder


def test_only_the_ends_of_blocks_alike_are_computed() -> None:
    class Block(nn.Module):
        calls: ClassVar[list[int]] = []

        def __init__(self, number: int):
            super().__init__()
            self.number, self.linear = number, nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, again: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.calls.append(self.number)
            x = self.linear(x).sin()
            return x, again

    def used(folded: bool, grown: bool) -> tuple[list[int], int, int]:
        ledger = Ledger(Hollow())
        with ledger:
            network = nn.ModuleList(Block(i) for i in range(6))
        assert ledger.hollow is not None
        empty(network, ledger.hollow)
        if folded:
            fold(nn.Sequential(network), ledger)
        Block.calls.clear()
        with ledger:
            x, again = torch.randn(128, 64, requires_grad=True), torch.ones(128, 64)
            start = ledger.restart()
            for block in copy.deepcopy(network):
                x, again = checkpoint(block, x, again, use_reentrant=False) if grown else block(x, again)
            saved = ledger.live - start
            x.sum().backward()
        return list(Block.calls), saved, ledger.peak - start

    for grown in (False, True):
        whole, folded = used(False, grown), used(True, grown)
        assert len(whole[0]) > 1.5 * len(folded[0]) and {0, 5} <= set(folded[0]) and 3 not in folded[0]
        assert folded[1:] == pytest.approx(whole[1:], rel=0.05)


@pytest.mark.slow
def test_advice_is_checked_by_planning_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[RunConfig] = []
    monkeypatch.setattr(advice, "estimate", lambda config, **kw: planned.append(config) or estimate(config, **kw))
    config = run_of(folder, "lcm", batch=2)
    plan = estimate(config)
    fitting = advise(config, plan, plan.peak)
    assert fitting.fits and not fitting.changes
    some = advise(config, plan, int(0.95 * plan.peak))
    assert some.fits and some.changes
    assert estimate(configuration.load(written(folder, "lcm", batch=2), some.changes)).peak == some.peak <= 0.95 * plan.peak
    assert len(planned) == 1
    nothing = advise(config, plan, 1000)
    assert len(planned) == 2
    assert not nothing.fits and nothing.peak < plan.peak and "the least found" in nothing.in_words()


def test_no_micro_batch_is_planned_in_vain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn takes 400 bytes whatever the micro-batch, and 10 for each of its samples."""
    planned: list[int] = []

    def known(config: RunConfig, **options: object) -> Plan:
        size = config.train.batch // config.train.micro_batches
        planned.append(size)
        turn = Turn("student", saved=10 * size, peak=1000 + 400 + 10 * size, gradients=0, spare=0, block=0)
        sizes = {"preparing": 500, "held": 1000, "samples": 1000, "block": 1, "per_rank": 1, "reducible": 0, "shardable": 0}
        words = {"pipeline": "p", "network": "n", "method": "m", "precision": "bf16", "latent_shape": (4, 8, 8)}
        rows = (Row("student", 10, 10, 40),)
        counts = {"batch": config.train.batch, "micro_batch": size, "update": 0, "looked_at": 1}
        return Plan(rows=rows, turns=(turn,), **counts, **sizes, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(advice, "estimate", known)
    config = run_of(folder, "lcm", batch=64, gradient_checkpointing=True, precision="bf16")
    plan = known(config)
    assert plan.peak == 2040
    fitting = advise(config, plan, 1425)
    # Were all of it proportional, 16 would do, then 8, then 4; from 64 and 16 it is known that it takes 2.
    assert fitting.fits and fitting.changes == ("train.micro_batches=32",) and fitting.peak == 1420
    assert planned == [64, 16, 2]


@pytest.mark.slow
def test_changes_are_scaled_to_about_what_they_give(folder: Path) -> None:
    config = run_of(folder, "dmd2")
    plan, seen = estimate(config), 0
    for override, change in advice.candidates(config):
        if override.startswith(("train.micro_batches=4", "train.gradient", 'roles.student="lora"')):
            assert advice.scaled(plan, config, change(config)) == pytest.approx(estimate(change(config)).peak, rel=0.3)
            seen += 1
    assert seen == 3


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(folder, "lcm", "lora")
    assert main(["plan", str(file), "train.batch=2", "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "peak on one GPU" in text and "turn of student" in text and "batch 2" in text and "each of 4 GPUs" in text
    assert main(["plan", str(file), "--json", "--memory", "1TB"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["changes"] == [] and {each["name"] for each in told["rows"]} >= {"student", "teacher (unet)"}


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(folder, "lcm"))
    for arguments, message in [
        ([file, "--memory", "24 parsecs"], "--memory '24 parsecs': must be a number and a unit"),
        ([file, "--memory", "0GB"], "must be a number and a unit"),
        ([file, "--gpus", "0"], "--gpus 0: must be at least 1"),
        ([file, "pipeline='/nowhere'"], "'/nowhere' does not exist"),
        ([file, "train.batches=2"], "train.batches"),
        (["/nowhere.toml"], "/nowhere.toml"),
    ]:
        assert main(["plan", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    broken = folder / "broken"
    tiny.toy().save_pretrained(broken)
    (broken / "unet" / "config.json").write_text("{")
    assert main(["plan", file, f"pipeline={str(broken)!r}"]) == 2
    assert "does not describe a UNet2DConditionModel" in capsys.readouterr().err


def test_sizes() -> None:
    assert parse_size("24GB") == 24 * 10**9 and parse_size(" 1.5 gib ") == 3 * 2**29
    assert (size(0), size(999), size(1.26e9), size(123.4e6)) == ("-", "999 B", "1.3 GB", "123 MB")
    with pytest.raises(UserError, match="such as 24GB"):
        parse_size("24")


def test_a_ledger_follows_storages() -> None:
    ledger = Ledger()
    with ledger:
        x = torch.ones(1000)
        view = x[:10]
        y = x + 1
        assert ledger.live == ledger.peak == 8000
        del y
        assert ledger.live == 4000 and ledger.peak == 8000
        del x
        assert ledger.live == 4000
        del view
        assert ledger.live == 0
        assert ledger.restart() == 0 == ledger.peak


def test_tensors_without_values_answer() -> None:
    with Ledger(Hollow()) as ledger:
        large = torch.ones(100, 100)
        assert ledger.live == 40_000 and not bool((large > 0).all()) and float(large.sum()) == 0
        assert float(torch.ones(10).sum()) == 10
