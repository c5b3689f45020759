"""What is predicted at each step, and handing over from teacher to student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.analytic import Mixture
from fastgen.cli import main
from fastgen.denoiser import Condition
from fastgen.errors import UserError
from fastgen.eval import TOY
from fastgen.eval.evaluation import toy_prompts
from fastgen.eval.handover import Handover
from fastgen.eval.visualize import Actor, draw_images, grid, handovers, page, predictions, write_grid
from fastgen.pipelines.base import Pipeline
from fastgen.process import EDM, VP, Flow, Prediction, Process
from fastgen.samplers import FewStep, even_times
from tests.test_samplers import NOTHING, SHAPE, student
from tests.test_sweep import export, tiny

PROCESSES = [VP(torch.linspace(0.999, 0.01, 1000)), Flow(1000)]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_nothing_by_the_teacher_is_the_students_sampler_and_all_the_teachers(process: Process, gamma: float) -> None:
    torch.manual_seed(0)
    mine, theirs = student(process, "v" if isinstance(process, VP) else "flow"), student(process, "eps")
    if not isinstance(process, VP):
        theirs = student(process, "flow")
    noise = torch.randn(SHAPE)
    own = FewStep(even_times(4, process), gamma=gamma)
    seeded = [torch.Generator().manual_seed(3) for _ in range(3)]
    alone = own.sample(mine, noise, NOTHING, generator=seeded[0])
    assert torch.equal(Handover(own, theirs, 0).sample(mine, noise, NOTHING, generator=seeded[1]), alone)
    teachers = FewStep(own.times).sample(theirs, noise, NOTHING)
    assert torch.equal(Handover(own, theirs, 4).sample(mine, noise, NOTHING, generator=seeded[2]), teachers)
    between = Handover(own, theirs, 1).sample(mine, noise, NOTHING, generator=torch.Generator().manual_seed(3))
    assert not torch.allclose(between, alone) and not torch.allclose(between, teachers)


@pytest.mark.parametrize("process", [*PROCESSES, EDM()], ids=lambda process: type(process).__name__)
def test_two_alike_may_hand_over_anywhere(process: Process) -> None:
    """Along the ODE it makes no difference which of two equal networks makes a step."""
    torch.manual_seed(0)
    one = student(process, "x0")
    own, noise = FewStep(even_times(4, process)), torch.randn(SHAPE)
    alone = own.sample(one, noise, NOTHING)
    for first in range(5):
        torch.testing.assert_close(Handover(own, one, first).sample(one, noise, NOTHING), alone, atol=1e-5, rtol=1e-4)
    seen: list[Prediction] = []
    Handover(own, one, 2).sample(one, noise, NOTHING, watch=seen.append)
    assert [round(float(each.t.flatten()[0]), 6) for each in seen] == [round(t, 6) for t in own.times]


def test_the_teachers_first_step_brings_diversity_back() -> None:
    """A student that makes the same of every noise, beside the exact teacher of a mixture of two points."""
    process = Flow(1000)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    teacher = Mixture([1.0, 1.0], means, [0.05, 0.05], process)
    condition = teacher.condition([[0, 1]] * 200)

    class Collapsed:
        embeds_guidance = False

        def __init__(self) -> None:
            self.process = process

        def __call__(self, xt: Tensor, t: Tensor, condition: Condition, **kwargs: object) -> Prediction:
            nearest = torch.stack([xt[:, 0].sign(), torch.zeros(len(xt))], 1)
            found = torch.where(t.view(-1, 1) < 0.9, nearest, torch.tensor([1.0, 0.0]))
            return Prediction(found, "x0", xt, t, process)

    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    own = FewStep((1.0, 0.1))
    spread = [Handover(own, teacher, first).sample(Collapsed(), noise, condition)[:, 0].std().item() for first in (0, 1)]
    assert spread[0] < 1e-6 and spread[1] > 0.8


def test_wrong_handovers_are_refused() -> None:
    own, one = FewStep((1.0, 0.5)), student(Flow(1000), "flow")
    with pytest.raises(UserError, match="can make 0 to 2 of the 2 steps, not 3"):
        Handover(own, one, 3)
    with pytest.raises(UserError, match="guidance scale must be at least 1"):
        Handover(own, one, 1, guidance=0.5)
    with pytest.raises(UserError, match="for sampling alone"):
        Handover(own, one, 1).sample(one, torch.randn(SHAPE), NOTHING, exit_at=0)
    with pytest.raises(UserError, match="no stock diffusers scheduler hands over"):
        Handover(own, one, 1).scheduler(one.process, "flow")


@pytest.fixture(scope="module")
def actor() -> Actor:
    pipeline = Pipeline.wrap(tiny())
    return Actor("tiny", pipeline, pipeline.frozen(), FewStep(even_times(3, pipeline.process), guidance=2.0))


def test_predictions_are_those_of_the_sampler(actor: Actor, tmp_path: Path) -> None:
    prompts, seeds, _ = toy_prompts(2, seeds_per_prompt=1)
    track = predictions(actor, prompts, seeds)
    assert track.images.shape == (2, 3, 3, 32, 32) and track.times == pytest.approx([1.0, 0.667, 0.333], abs=1e-3)
    assert torch.equal(track.images[:, -1], draw_images(actor, prompts, seeds)), "the last is the image itself"
    distances = track.settled()
    assert distances[-1] == 0 and distances[0] > 0
    assert torch.equal(predictions(actor, prompts[1:], seeds[1:]).images[0, 0], track.images[1, 0]), "prompt and seed alone"
    assert grid(track).size == (3 * 34 - 2, 2 * 34 - 2)
    with Image.open(write_grid(track, tmp_path / "grid.png")) as picture:
        assert picture.getpixel((0, 0)) == tuple(track.images[0, 0, :, 0, 0].tolist())
    text = page([track, replace(track, name="<other>")])
    assert text.count("<img") == 2 * 2 * 3 and "<other>" not in text and "&lt;other&gt;" in text and "://" not in text
    with pytest.raises(UserError, match="same prompts and seeds alone"):
        page([track, replace(track, seeds=[7, 7])])
    with pytest.raises(UserError, match="every image needs a prompt and a seed"):
        predictions(actor, prompts, seeds[:1])


def test_handovers_are_measured(actor: Actor) -> None:
    prompts, seeds, scenes = toy_prompts(8)
    student = replace(actor, sampler=FewStep(even_times(2, actor.pipeline.process)))
    found = handovers(student, actor, prompts, seeds, guidance=2.0, scenes=scenes, world=TOY, only=["accuracy", "diversity"])
    assert [(each.first, each.calls) for each in found] == [(0, 2), (1, 3), (2, 4)]
    assert torch.equal(found[0].images, draw_images(student, prompts, seeds))
    teachers = replace(actor, sampler=FewStep(student.sampler.times, guidance=2.0))  # type: ignore[attr-defined]
    assert torch.equal(found[2].images, draw_images(teachers, prompts, seeds))
    assert {"accuracy", "diversity", "diversity_teacher_ratio"} <= found[1].measured.scores.keys()
    text = page([predictions(student, prompts[:1], seeds[:1])], found)
    assert "The teacher makes the first steps" in text and "1 of 2" in text


def test_the_command_shows_exports_and_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = export(tmp_path / "student"), tmp_path / "teacher"
    described = {"class": "FewStep", "steps": 2, "times": [1.0, 0.5], "gamma": 1.0, "guidance": 1.0}
    mark = json.loads((folder / "fastgen.json").read_text())
    (folder / "fastgen.json").write_text(json.dumps(mark | {"sampler": described}))
    tiny().save_pretrained(base)
    common = ["--output", str(tmp_path / "viz"), "--device", "cpu", "--offline", "--quiet"]
    sizes = ["--number", "2", "--handover", str(base), "--handover-images", "6", "--handover-steps", "2"]
    assert main(["viz", str(folder), str(base), *sizes, *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(each["times"]) for each in found["models"]] == [2, 8]
    assert [each["teacher_steps"] for each in found["handovers"]] == [0, 1, 2]
    assert json.loads((tmp_path / "viz" / "viz.json").read_text()) == found
    assert all(Path(each).is_file() for each in [found["report"], *found["grids"]])
    assert main(["viz", str(folder), "--number", "0", *common]) == 2
    assert "--number must be at least 1" in capsys.readouterr().err
    (folder / "fastgen.json").write_text(json.dumps(mark | {"sampler": {"class": "MeanVelocity", "steps": 2}}))
    assert main(["viz", str(folder), *common]) == 2
    assert "its sampler is MeanVelocity; name the run" in capsys.readouterr().err
