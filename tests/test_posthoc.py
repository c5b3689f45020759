"""Averages of any width, made after training from snapshots of two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastgen.cli import main
from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.training import checkpoint, posthoc
from fastgen.training.ema import EMA, exponent, power
from fastgen.training.loop import Trainer
from tests.process_worlds import build, source


def test_inner_products_are_integrals_of_profiles() -> None:
    tau = (np.arange(200_000) + 0.5) / 200_000 * 7

    def profile(t: float, gamma: float) -> np.ndarray:
        return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)

    for a, b in (((3.0, 16.97), (7.0, 6.94)), ((7.0, 16.97), (3.0, 6.94)), ((5.0, 4.0), (5.0, 4.0))):
        by_sum = (profile(*a) * profile(*b)).sum() * 7 / 200_000
        assert posthoc.inner(*(np.array(each) for each in (*a, *b))) == pytest.approx(by_sum, rel=1e-3)


def test_a_width_that_was_tracked_is_found_as_it_is() -> None:
    times = [time for time in range(25, 401, 25) for _ in posthoc.TRACKED]
    for place, width in enumerate(posthoc.TRACKED):
        found = posthoc.coefficients(times, [*posthoc.TRACKED] * 16, 400, width)
        assert found == pytest.approx([float(i == 30 + place) for i in range(32)], abs=1e-6)
    assert sum(posthoc.coefficients(times, [*posthoc.TRACKED] * 16, 400, 0.075)) == pytest.approx(1, abs=1e-2)


def walk(folder: Path, updates: int, every: int, widths: list[float]) -> tuple[dict[float, EMA], EMA]:
    """A module whose weights walk at random, its averages of some widths, and checkpoints of the tracked ones."""
    torch.manual_seed(0)
    module = nn.Linear(20, 20)
    tracked, direct = posthoc.Tracked(module, 0), {width: EMA(module, power(width)) for width in widths}
    for step in range(1, updates + 1):
        with torch.no_grad():
            for weight in module.parameters():
                weight += 0.1 * torch.randn_like(weight)
        tracked.update()
        for ema in direct.values():
            ema.update()
        if step % every == 0:
            partial = checkpoint.begin(folder / "checkpoints", step)
            checkpoint.write(partial, "averages", tracked.tensors())
            posthoc.keep(checkpoint.finish(partial, {"step": step}, keep=1), folder)
    last = EMA(module, 0.0)
    return direct, last


@pytest.mark.parametrize("width", [0.06, 0.075, 0.1, 0.12])
def test_any_width_is_near_the_one_that_is_tracked_from_the_start(width: float, tmp_path: Path) -> None:
    direct, last = walk(tmp_path, 400, 25, [width])
    path = checkpoint.find(tmp_path)[-1]
    assert len(checkpoint.find(tmp_path)) == 1 and len(list((tmp_path / "averages").iterdir())) == 16
    found = posthoc.reconstruct(tmp_path, path, width)
    for name, wanted in direct[width].average.items():
        away = (wanted - last.average[name]).std()  # how far averages are from the weights: the scale of an error
        assert (found[name] - wanted).std() < 0.03 * away


def test_averages_of_another_stage_are_left_out(tmp_path: Path) -> None:
    walk(tmp_path, 100, 25, [])
    first = tmp_path / "averages" / "step-00000025.safetensors"
    broken = {**checkpoint.read(first.parent, first.stem), "started": torch.tensor(7)}
    before = posthoc.reconstruct(tmp_path, checkpoint.find(tmp_path)[-1], 0.08)
    first.unlink()
    without = posthoc.reconstruct(tmp_path, checkpoint.find(tmp_path)[-1], 0.08)
    checkpoint.write(first.parent, first.stem, broken)
    other = posthoc.reconstruct(tmp_path, checkpoint.find(tmp_path)[-1], 0.08)
    assert all(torch.equal(other[name], each) for name, each in without.items())
    assert not all(torch.equal(before[name], each) for name, each in without.items())


def test_a_run_keeps_what_it_takes(tmp_path: Path) -> None:
    method, pipeline = build("dmd2", {"steps": 2, "student_every": 2}, lora=True)
    options = TrainConfig(steps=8, batch=2, checkpoint_every=2, keep_checkpoints=1, ema_sigma_rel=0.1, ema_posthoc=True)
    trainer = Trainer(method, source(pipeline), options, run_directory=tmp_path, device="cpu")
    trainer.fit()
    assert len(list((tmp_path / "averages").iterdir())) == 4 and len(checkpoint.find(tmp_path)) == 1
    found = posthoc.reconstruct(tmp_path, checkpoint.find(tmp_path)[-1], 0.1)
    assert trainer.ema is not None and trainer.ema.updates == 4, "an average takes in what the student has become"
    assert found.keys() == trainer.ema.average.keys()
    for name, wanted in trainer.ema.average.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-4)


def test_the_command_line_asks_for_one_kind_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["export", str(tmp_path), "--output", str(tmp_path / "x"), "--ema-sigma-rel", "0.1"]
    assert main([*asked, "--weights", "raw"]) == 2
    assert "--ema-sigma-rel 0.1 and --no-ema contradict each other" in capsys.readouterr().err


def test_what_cannot_be_had(tmp_path: Path) -> None:
    walk(tmp_path, 25, 25, [])
    path = checkpoint.find(tmp_path)[-1]
    with pytest.raises(UserError, match=r"must be above 0 and at most 0\.28, not 0\.5"):
        posthoc.reconstruct(tmp_path, path, 0.5)
    (path / "averages.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no averages .* train\.ema_posthoc = true"):
        posthoc.reconstruct(tmp_path, path, 0.1)
    assert exponent(0.1) == pytest.approx(6.94, abs=0.01) and exponent(0.05) == pytest.approx(16.97, abs=0.01)
