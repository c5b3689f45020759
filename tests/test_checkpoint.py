"""Checkpoints: whole or not there, checked before use, never unpickled; and the run directory around them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastgen import config as configuration
from fastgen.config import DataConfig, RunConfig, TrainConfig
from fastgen.data.source import load_source
from fastgen.errors import UserError
from fastgen.training import checkpoint, run
from fastgen.training.loop import Trainer
from fastgen.training.metrics import MetricsFile
from fastgen.training.random_state import random_state, set_random_state, undisturbed
from tests.training_fakes import Duel, FakePipeline, fake_source, same, weights

OPTIONS = TrainConfig(steps=4, batch=2, lr=1e-2, log_every=1, checkpoint_every=2, ema=0.9)
CPU = torch.device("cpu")


def trained(folder: Path, options: TrainConfig = OPTIONS, method: Duel | None = None) -> Trainer:
    loop = fresh(folder, options, method)
    loop.fit()
    return loop


def fresh(folder: Path | None, options: TrainConfig = OPTIONS, method: Duel | None = None) -> Trainer:
    torch.manual_seed(0)
    method, pipeline = method or Duel(), FakePipeline()
    method.setup(pipeline)
    return Trainer(method, fake_source(pipeline), options, run_directory=folder, device="cpu")


# -- files ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_safetensors_and_json_with_hashes(tmp_path: Path) -> None:
    trained(tmp_path)
    paths = checkpoint.find(tmp_path)
    assert [path.name for path in paths] == ["step-00000002", "step-00000004"]
    assert sorted(each.name for each in paths[1].iterdir()) == [
        "ema.safetensors", "manifest.json", "method.safetensors", "optimizer-critic.safetensors",
        "optimizer-student.safetensors", "player-critic.safetensors", "player-student.safetensors",
        "random-00000.safetensors", "state.json",
    ]  # fmt: skip
    manifest = json.loads((paths[1] / "manifest.json").read_text())
    assert sorted(manifest) == sorted(each.name for each in paths[1].iterdir() if each.name != "manifest.json")
    checkpoint.verify(paths[1])
    assert not [each for each in (tmp_path / "checkpoints").iterdir() if each.name.startswith(".")]


def test_loading_gives_back_everything(tmp_path: Path) -> None:
    left = trained(tmp_path, replace(OPTIONS, steps=3, checkpoint_every=0, log_every=2))
    after = torch.rand(3), random.random(), np.random.rand()
    found = fresh(tmp_path, replace(OPTIONS, steps=3))
    torch.manual_seed(99)
    found.load(tmp_path / "checkpoints" / "step-00000003")
    assert torch.equal(after[0], torch.rand(3)) and after[1:] == (random.random(), np.random.rand())
    assert (found.step, found.data.position) == (3, left.data.position) and found.data.position > 0
    assert found.ema is not None and left.ema is not None
    assert same(left.ema.average, found.ema.average) and left.ema.updates == found.ema.updates == 3
    assert (found.method.seen, left.method.seen) == (3, 3)  # type: ignore[attr-defined]
    assert torch.equal(found.method.trail, left.method.trail)  # type: ignore[attr-defined]
    for one, other in zip(left.turns, found.turns, strict=True):
        assert same(weights(one.player.weights), weights(other.player.weights))
        for a, b in zip(one.weights, other.weights, strict=True):
            assert same(dict(one.optimizer.state[a]), dict(other.optimizer.state[b]))
    assert not found.averages.sums, "a line was written just before the checkpoint"


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, replace(OPTIONS, steps=5, checkpoint_every=1, keep_checkpoints=2))
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000004", "step-00000005"]
    trained(tmp_path / "all", replace(OPTIONS, steps=5, checkpoint_every=1, keep_checkpoints=0), make(tmp_path / "all"))
    assert len(checkpoint.find(tmp_path / "all")) == 5


def make(folder: Path) -> Duel:
    folder.mkdir()
    return Duel()


def test_what_an_interrupted_write_left_is_no_checkpoint_and_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    left = checkpoint.begin(folder, 7)
    checkpoint.write(left, "player-student", {"x": torch.ones(3)})
    assert checkpoint.find(tmp_path) == [] and checkpoint.choose(tmp_path) is None
    checkpoint.begin(folder, 8)
    assert [each.name for each in folder.iterdir()] == [".step-00000008.partial"]


def test_a_checkpoint_can_be_written_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        partial = checkpoint.begin(tmp_path / "checkpoints", 3)
        checkpoint.write(partial, "part", {"x": torch.tensor(value)})
        path = checkpoint.finish(partial, {"value": value})
    assert checkpoint.read_state(path) == {"value": 2.0} and checkpoint.read(path, "part")["x"] == 2
    assert [each.name for each in path.parent.iterdir()] == ["step-00000003"]
    checkpoint.verify(path)


@pytest.mark.parametrize("name", ["player-student.safetensors", "ema.safetensors", "state.json", "random-00000.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    trained(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000004"
    data = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        altered = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        (path / name).write_bytes(data[: len(data) // 2] if damage == "truncated" else altered)
    for resume in ("auto", str(path)):
        with pytest.raises(UserError, match=rf"step-00000004/{name}.*step-00000002"):
            checkpoint.choose(tmp_path, resume)
    with pytest.raises(UserError, match=name):
        fresh(tmp_path).load(path)
    assert checkpoint.latest_good(tmp_path) == path.with_name("step-00000002")
    assert checkpoint.choose(tmp_path, str(path.with_name("step-00000002"))) == path.with_name("step-00000002")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    manifest = tmp_path / "checkpoints" / "step-00000004" / "manifest.json"
    for text in ("{", "[]", '{"state.json": 3}'):
        manifest.write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: is broken"):
            checkpoint.choose(tmp_path)
    manifest.unlink()
    with pytest.raises(UserError, match="incomplete"):
        checkpoint.choose(tmp_path)


@pytest.mark.parametrize("resume", ["nowhere", "auto/../nowhere"])
def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path, resume: str) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.choose(tmp_path, str(tmp_path / resume))
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.choose(tmp_path, str(tmp_path))
    assert checkpoint.choose(tmp_path, "auto") is None and checkpoint.choose(tmp_path, "never") is None


def test_other_networks_are_told_apart(tmp_path: Path) -> None:
    trained(tmp_path)
    path = checkpoint.find(tmp_path)[-1]
    other = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"player-student\.safetensors: does not fit"):
        checkpoint.restore(checkpoint.weights_of(other), path, "player-student")
    loop = fresh(tmp_path)
    loop.method.players = lambda: Duel.players(loop.method)[:1]  # type: ignore
    with pytest.raises(UserError, match=r"players \['critic', 'student'\].*\['student'\]"):
        loop.load(path)


def test_frozen_weights_are_left_out_and_buffers_kept() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    kept = checkpoint.weights_of(module)
    assert sorted(kept) == [
        "0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight", "2.bias",
    ]  # fmt: skip


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    partial = checkpoint.begin(tmp_path, 1)
    checkpoint.write(partial, "part", {"a": x, "b": x, "c": x[2:4], "d": x.view(2, 3).T, "e": torch.ones(1).expand(4)})
    read = checkpoint.read(partial, "part")
    assert torch.equal(read["a"], x) and torch.equal(read["b"], x) and read["c"].tolist() == [2, 3]
    assert read["d"].tolist() == [[0, 3], [1, 4], [2, 5]] and read["e"].tolist() == [1] * 4


def test_random_states_round_trip() -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = random_state(CPU)

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(np.random.rand()), float(torch.randn(()))]

    first = draw()
    assert draw() != first
    set_random_state(state, CPU)
    assert draw() == first
    set_random_state(state, CPU)
    with undisturbed(CPU, seed=5):
        once = draw()
    assert draw() == first
    with undisturbed(CPU, seed=5):
        assert draw() == once


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.cut(3)
    for step in (2, 4, 6):
        file.write(step, {"loss": step / 10})
    with file.path.open("a") as handle:
        handle.write('{"step": 8, "lo')
    file.cut(4)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [2, 4]


def test_a_checkpoint_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"checkpoints: cannot be written.*another --output"):
        fresh(tmp_path).save()


# -- the run directory ------------------------------------------------------------------------------


@pytest.fixture
def duel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of the fakes, whose method needs no registry; `at(steps=...)` gives its config."""

    def at(lr: float = 1e-2, seed: int = 0, method: Duel | None = None, **train: Any) -> RunConfig:
        options = TrainConfig(**{"steps": 4, "batch": 2, "lr": lr, "log_every": 1, "checkpoint_every": 2, "ema": 0.5, **train})
        return RunConfig(method_name="duel", method=method or Duel(), seed=seed, train=options)

    def load(path: Path) -> RunConfig:
        keys = configuration.schema.read(path)[0]
        return at(keys["train"]["lr"], keys["seed"], steps=keys["train"]["steps"])

    monkeypatch.setattr(run, "open_pipeline", lambda config, device, offline: FakePipeline())

    def few(pipeline: Any, data: Any, *args: Any, **options: Any) -> Any:
        return load_source(pipeline, replace(data, pool=12), *args, **options)

    monkeypatch.setattr(run, "load_source", few)
    monkeypatch.setattr(run.configuration, "load", load)
    return at


def test_a_whole_run(tmp_path: Path, duel: Any) -> None:
    folder = tmp_path / "runs" / "x"
    assert run.distill(duel(), folder, device="cpu", quiet=True) == 0
    assert sorted(each.name for each in folder.iterdir()) == [
        "checkpoints", "config.toml", "environment.json", "metrics.jsonl", "report.html", "samples",
    ]  # fmt: skip
    assert (folder / "samples" / "step-00000004.png").exists()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]
    assert environment["threads"] >= 1
    last = folder / "checkpoints" / "step-00000004"
    assert (last / "config.toml").read_text() == (folder / "config.toml").read_text() == duel().to_toml()
    before = weights_on_disk(last)
    assert run.distill(duel(), folder, device="cpu", quiet=True) == 0, "trained already: nothing to do"
    assert same(before, weights_on_disk(last))


def weights_on_disk(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "player-student.safetensors")


def test_a_run_is_read_back(tmp_path: Path, duel: Any) -> None:
    run.distill(duel(), tmp_path, device="cpu", quiet=True)
    last = tmp_path / "checkpoints" / "step-00000004"
    loaded = run.load_run(tmp_path)
    assert (loaded.step, loaded.checkpoint, loaded.averaged) == (4, last, True)
    assert same(weights(loaded.student), load_file(last / "ema.safetensors"))
    assert not loaded.student.training and not any(w.requires_grad for w in loaded.student.parameters())
    assert loaded.method.seen == 4  # type: ignore[attr-defined]
    plain = run.load_run(tmp_path, ema=False, checkpoint=last.with_name("step-00000002"))
    assert (plain.step, plain.averaged) == (2, False)
    stored = weights_on_disk(last.with_name("step-00000002"))
    assert all(torch.equal(stored[name], weight) for name, weight in weights(plain.student).items())
    (last / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ema\.safetensors: is broken"):
        run.load_run(tmp_path)
    with pytest.raises(UserError, match="not a run's directory"):
        run.load_run(tmp_path / "samples")


def test_another_configurations_run_is_refused_with_both_values(tmp_path: Path, duel: Any) -> None:
    run.distill(duel(), tmp_path, device="cpu", quiet=True)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"train\.lr = 0\.01.*train\.lr = 0\.5"):
        run.distill(duel(lr=0.5), tmp_path, device="cpu", quiet=True)
    with pytest.raises(UserError, match=r"seed = 0.*seed = 3"):
        run.distill(duel(seed=3), tmp_path, device="cpu", quiet=True)
    with pytest.raises(UserError, match="holds a run already"):
        run.distill(duel(), tmp_path, resume="never", device="cpu", quiet=True)
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, "nothing was overwritten"
    config = duel(log_every=2, checkpoint_every=1)
    assert run.distill(config, tmp_path, device="cpu", quiet=True) == 0, "book-keeping may change"


def test_a_longer_run_goes_on_unless_its_curriculum_depends_on_the_length(tmp_path: Path, duel: Any) -> None:
    class Plain(Duel):
        advance = run.Method.advance

    run.distill(duel(method=Plain()), tmp_path / "plain", device="cpu", quiet=True)
    assert run.distill(duel(method=Plain(), steps=6), tmp_path / "plain", device="cpu", quiet=True) == 0
    assert checkpoint.find(tmp_path / "plain")[-1].name == "step-00000006"
    with pytest.raises(UserError, match=r"6 updates already, more than train\.steps = 3"):
        run.distill(duel(method=Plain(), steps=3), tmp_path / "plain", device="cpu", quiet=True)
    run.distill(duel(), tmp_path / "staged", device="cpu", quiet=True)
    with pytest.raises(UserError, match=r"train\.steps = 4.*train\.steps = 6"):
        run.distill(duel(steps=6), tmp_path / "staged", device="cpu", quiet=True)


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path, duel: Any) -> None:
    run.distill(duel(), tmp_path, device="cpu", quiet=True)
    straight = weights_on_disk(tmp_path / "checkpoints" / "step-00000004")
    first = tmp_path / "checkpoints" / "step-00000002"
    assert run.distill(duel(), tmp_path, resume=str(first), device="cpu", quiet=True) == 0
    assert sorted(each.name for each in first.parent.iterdir()) == [
        "set-aside-step-00000004", "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert same(straight, weights_on_disk(tmp_path / "checkpoints" / "step-00000004"))
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


def test_an_output_that_cannot_be_used_is_told_in_words(tmp_path: Path, duel: Any) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"--output .*file/run: cannot be written"):
        run.distill(duel(), file / "run", device="cpu", quiet=True)
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints but no config\.toml"):
        run.distill(duel(), other, device="cpu", quiet=True)


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path: Path, duel: Any) -> None:
    config = replace(duel(), data=DataConfig(prompts="toy", images=str(tmp_path / "none")))
    with pytest.raises(UserError, match="there is no such folder"):
        run.distill(config, tmp_path / "x", device="cpu", quiet=True)
    assert not (tmp_path / "x").exists()
