"""Mistakes seen in other distillation frameworks, each held against ours; those of one module are in that module's tests."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from fastgen import config, losses, methods
from fastgen.config import TrainConfig
from fastgen.pipelines import Pipeline
from fastgen.process import VP, Flow, Process, Trig, dynamic_shift, shift_time
from fastgen.samplers import even_times
from fastgen.training.grids import grid
from fastgen.training.loop import Trainer
from tests import tiny_models
from tests.method_fakes import TABLE
from tests.training_fakes import Duel, FakePipeline, fake_source


def test_times_of_two_processes_are_matched_by_the_ratio_and_not_by_its_square() -> None:
    """On TrigFlow the middle of a flow has the angle 45 degrees."""
    half = torch.tensor([0.5], dtype=torch.float64)
    flow, trig = Flow(), Trig()
    torch.testing.assert_close(trig.time_at(flow.ratio(half)), half)
    torch.testing.assert_close(flow.time_at(trig.ratio(half)), half)
    torch.testing.assert_close(TABLE.time_at(TABLE.ratio(half)), half)


@pytest.mark.parametrize("process", [TABLE, Flow()], ids=["table", "flow"])
def test_alpha_and_sigma_have_derivatives_on_tables_too(process: Process) -> None:
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    for function in (process.alpha, process.sigma):
        _, slope = torch.func.jvp(function, (t,), (torch.ones_like(t),))
        step = 1e-3 if isinstance(process, VP) else 1e-6
        torch.testing.assert_close(slope, (function(t + step) - function(t - step)) / (2 * step), rtol=0.02, atol=1e-3)


def test_flux_at_1024_pixels_is_sampled_at_its_pipelines_own_levels() -> None:
    times = even_times(4, Flow(), dynamic_shift(4096))
    assert [round(t, 3) for t in times] == [1.0, 0.905, 0.76, 0.513]
    assert float(shift_time(torch.tensor(0.5), dynamic_shift(4096))) == pytest.approx(times[2])


def test_one_empty_caption_leaves_its_neighbours_alone() -> None:
    pipeline = Pipeline.wrap(tiny_models.sdxl())
    alone, beside = pipeline.encode_prompts(["a red cube"]), pipeline.encode_prompts(["", "a red cube"])
    x, t = torch.randn(1, *pipeline.latent_shape), torch.tensor([0.5])
    denoiser = pipeline.frozen()
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, t, beside[[1]]).output, denoiser(x, t, alone).output, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(denoiser(x, t, beside[[0]]).output, denoiser(x, t, alone).output)


def test_approximate_r1_moves_the_very_samples_that_the_logits_belong_to() -> None:
    """Of a linear critic it is noise^2 times the squared slope, wherever the samples are."""
    torch.manual_seed(0)
    critic = nn.Linear(6, 1).double()
    x = 3 * torch.randn(20000, 6).double()
    with torch.no_grad():
        found = losses.approximate_r1(critic, x, critic(x), noise=0.1)
    assert float(found / (0.01 * critic.weight.square().sum())) == pytest.approx(1, rel=0.05)


def test_a_run_makes_every_update_and_counts_updates_not_turns() -> None:
    """Of seven updates the critic moves in every third, from two halves of a batch: nine turns, of eighteen losses."""
    torch.manual_seed(0)
    method, pipeline = Duel(critic_every=3), FakePipeline(False)
    method.setup(pipeline)
    options = TrainConfig(steps=7, batch=4, micro_batches=2, lr=1e-2, log_every=1, checkpoint_every=0, ema=0.9)
    loop = Trainer(method, fake_source(pipeline), options, device="cpu")
    moved: list[str] = []
    for turn in loop.turns:
        turn.optimizer.register_step_post_hook(lambda *_, name=turn.player.name: moved.append(name))
    loop.fit()
    third = ["student"] * 3 + ["critic"]
    assert loop.step == 7 and moved == [*third, *third, "student"]
    assert len(method.moves) == 18


def test_any_number_of_pictures_of_any_shape_makes_a_grid(tmp_path: Path) -> None:
    pictures = [torch.rand(6, 3, 16, 24) * 2 - 1, torch.rand(6, 3, 16, 24) * 2 - 1]
    grid(pictures, 2).save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > picture.height


def test_building_one_run_changes_no_other() -> None:
    recipe = Path(__file__).parents[1] / "configs" / "toy" / "quickstart.toml"
    first = config.load(recipe)
    kept = copy.deepcopy(first)
    second = config.load(recipe, ["method.guidance=5", "train.betas=[0.0, 0.9]", "roles.student=lora"])
    assert first == kept and second.method != first.method  # type: ignore[operator]
    assert second.train.betas == (0.0, 0.9) and isinstance(second.train.lr, float)
    assert methods.find(first.method_name)() == methods.find(first.method_name)()
