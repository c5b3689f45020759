"""The training loop: turns, accumulation, clipping, skipped steps, averages, processes."""

from __future__ import annotations

import io
import json
import math
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from rich.console import Console
from torch import nn

from fastgen.config import TrainConfig
from fastgen.errors import UserError
from fastgen.method import Batch, Loss
from fastgen.training import launch
from fastgen.training.ema import EMA
from fastgen.training.grids import Grids
from fastgen.training.loop import SKIP_LIMIT, Trainer, average_gradients
from fastgen.training.progress import Reporter
from tests.training_fakes import SHAPE, Duel, FakePipeline, fake_source, same, weights

OPTIONS = TrainConfig(steps=6, batch=4, lr=1e-2, log_every=1, checkpoint_every=0)


def trainer(method: Duel | None = None, options: TrainConfig = OPTIONS, adapters: bool = False, **more: Any) -> Trainer:
    torch.manual_seed(0)
    method, pipeline = method or Duel(), FakePipeline(adapters)
    method.setup(pipeline)
    return Trainer(method, fake_source(pipeline), options, device="cpu", **more)


# -- turns ----------------------------------------------------------------------------------------


def test_players_move_in_turn_and_as_often_as_they_say() -> None:
    method = Duel(critic_every=3)
    trainer(method).fit()
    assert method.moves == ["student", "student", "student", "critic"] * 2


def test_only_the_movers_weights_require_a_gradient_and_move() -> None:
    method = Duel()
    loop = trainer(method)
    seen: list[tuple[bool, bool]] = []

    def watched(loss: Any) -> Any:
        def call(batch: Batch) -> Loss:
            seen.append(tuple(all(w.requires_grad for w in d.parameters()) for d in (method.student, method.critic)))  # type: ignore
            return loss(batch)

        return call

    for turn in loop.turns:
        turn.player.loss = watched(turn.player.loss)
        before = {id(t): weights(t.player.weights) for t in loop.turns}
        loop.move(turn)
        for other in loop.turns:
            assert same(before[id(other)], weights(other.player.weights)) == (other is not turn)
    assert seen == [(True, False), (False, True)]


def test_no_gradient_outlives_a_turn() -> None:
    loop = trainer()
    stale = loop.turns[1].weights[0]
    stale.grad = torch.full_like(stale, 1e6)
    loop.move(loop.turns[0])
    assert all(w.grad is None for turn in loop.turns for w in turn.weights)
    assert all(w.requires_grad for turn in loop.turns for w in turn.weights), "trainable again when the turn is over"


def test_a_stale_gradient_of_the_mover_is_not_applied() -> None:
    clean, stained = trainer(), trainer()
    for weight in stained.turns[0].weights:
        weight.grad = torch.full_like(weight, 5.0)
    for loop in (clean, stained):
        torch.manual_seed(1)
        loop.move(loop.turns[0])
    assert same(weights(clean.method.trained), weights(stained.method.trained))


def test_a_frozen_base_shared_by_adapters_stays_frozen() -> None:
    loop = trainer(adapters=True)
    base = loop.method.teacher.network  # type: ignore[attr-defined]
    before = weights(base)
    loop.fit()
    assert same(before, weights(base))
    assert all(w.grad is None and not w.requires_grad for w in base.parameters())
    assert not any(w is b for turn in loop.turns for w in turn.weights for b in base.parameters())


def test_weights_frozen_at_setup_are_never_thawed() -> None:
    method, pipeline = Duel(), FakePipeline()
    method.setup(pipeline)
    frozen = method.student.network.inner.bias
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    Trainer(method, fake_source(pipeline), OPTIONS, device="cpu").fit()
    assert not frozen.requires_grad and torch.equal(before, frozen)


def test_advance_can_start_the_optimisers_afresh() -> None:
    loop = trainer(Duel(restart_at=4))
    loop.fit()
    assert [int(turn.optimizer.state[turn.weights[0]]["step"]) for turn in loop.turns] == [2, 2]
    assert int(trained(trainer(Duel())).turns[0].optimizer.state_dict()["state"][0]["step"]) == 6


def trained(loop: Trainer) -> Trainer:
    loop.fit()
    return loop


# -- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", [0, 1])
def test_micro_batches_add_up_to_the_whole_batch(player: int) -> None:
    moved = []
    for parts in (1, 4):
        options = replace(OPTIONS, batch=8, micro_batches=parts)
        loop = trainer(Duel(drawn=False), options)
        grads: list[torch.Tensor] = []
        loop.apply = lambda turn, grads=grads: grads.extend(w.grad.clone() for w in turn.weights)  # type: ignore
        loop.move(loop.turns[player])
        assert loop.data.position == 8
        moved.append(grads)
    for whole, parts_sum in zip(*moved, strict=True):
        assert whole.abs().max() > 1e-4
        torch.testing.assert_close(whole, parts_sum, atol=1e-6, rtol=0)


def test_gradients_are_clipped_to_the_norm() -> None:
    loop = trainer(options=replace(OPTIONS, max_grad_norm=0.5))
    turn = loop.turns[0]
    for weight in turn.weights:
        weight.grad = torch.full_like(weight, 3.0)
    norm = math.sqrt(sum(w.numel() for w in turn.weights)) * 3
    loop.apply(turn)
    clipped = torch.cat([w.grad.flatten() for w in turn.weights if w.grad is not None])
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.5), atol=1e-4, rtol=0)
    assert loop.averages.take()["student/gradient_norm"] == pytest.approx(norm, rel=1e-5), "the norm before clipping is logged"


def test_no_clipping_when_the_norm_is_zero() -> None:
    loop = trainer(options=replace(OPTIONS, max_grad_norm=0))
    for weight in loop.turns[0].weights:
        weight.grad = torch.full_like(weight, 3.0)
    loop.apply(loop.turns[0])
    assert all(bool((w.grad == 3).all()) for w in loop.turns[0].weights if w.grad is not None)


def test_the_learning_rate_warms_up_and_scales_by_player() -> None:
    loop = trainer(Duel(critic_lr_scale=0.1), replace(OPTIONS, warmup=4))
    rates = []
    for _ in range(6):
        loop.update()
        rates.append([turn.optimizer.param_groups[0]["lr"] for turn in loop.turns])
    expected = [min(1, n / 4) * 1e-2 for n in range(1, 7)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[rate, rate / 10] for rate in expected]))


@pytest.mark.parametrize(
    ("schedule", "fall"), [("linear", lambda share: 1 - share), ("cosine", lambda share: 0.5 + 0.5 * math.cos(math.pi * share))]
)
def test_the_learning_rate_falls_within_every_stage(schedule: str, fall: Callable[[float], float]) -> None:
    loop = trainer(Duel(restart_at=4), replace(OPTIONS, schedule=schedule, warmup=2, steps=9))
    rates = []
    for _ in range(9):
        loop.update()
        rates.append(loop.turns[0].optimizer.param_groups[0]["lr"])
        assert loop.pace(loop.step - 1) * 1e-2 == rates[-1]
    first, second = ([1e-2 * min(1, (n + 1) / 2) * fall(n / length) for n in range(length)] for length in (4, 5))
    assert rates == pytest.approx(first + second)


def test_a_step_without_a_number_is_skipped_and_counted() -> None:
    loop = trainer(Duel(poison=(1,)))
    student, critic = loop.turns
    loop.update()
    before, critic_before = weights(student.player.weights), weights(critic.player.weights)
    moments = {key: value.clone() for key, value in student.optimizer.state[student.weights[0]].items()}
    loop.update()
    assert same(before, weights(student.player.weights)), "a gradient that is not finite moves nothing"
    assert same(moments, dict(student.optimizer.state[student.weights[0]])), "nor the moments"
    assert not same(critic_before, weights(critic.player.weights)), "the other player moved"
    assert (int(student.skipped), int(student.in_a_row), int(critic.skipped)) == (1, 1, 0)
    assert loop.log()["student/skipped"] == 1
    loop.update()
    assert (int(student.skipped), int(student.in_a_row)) == (1, 0)
    assert not same(before, weights(student.player.weights))


def test_training_stops_in_one_sentence_when_no_step_is_finite() -> None:
    loop = trainer(Duel(poison=tuple(range(3, 99))), replace(OPTIONS, steps=99))
    with pytest.raises(UserError, match=rf"'student' was not finite {SKIP_LIMIT} times in a row.*train\.lr.*after update 22"):
        loop.fit()
    assert loop.step == 22


def test_bf16_autocast_keeps_weights_and_gradients_in_float32() -> None:
    kinds = set()
    loop = trainer(options=replace(OPTIONS, precision="bf16"))
    inner = loop.method.trained.network.inner  # type: ignore[union-attr]
    inner.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    before = weights(loop.method.trained)
    loop.fit()
    assert kinds == {torch.bfloat16}
    assert {w.dtype for w in loop.method.trained.parameters()} == {torch.float32}
    assert not same(before, weights(loop.method.trained))
    fp32 = trainer()
    kinds.clear()
    fp32.method.trained.network.inner.register_forward_hook(lambda m, a, output: kinds.add(output.dtype))  # type: ignore
    fp32.fit()
    assert kinds == {torch.float32}, "another run in the same process has its own precision"


# -- averages of weights and of losses --------------------------------------------------------------


def test_ema_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.3)
    expected = module.weight.item()
    for n, value in enumerate([1.0, 5.0, -2.0, 4.0, 0.5]):
        module.weight.data.fill_(value)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-6)
    with ema.applied(module):
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 0.5
    with suppress(RuntimeError), ema.applied(module):
        raise RuntimeError
    assert module.weight.item() == 0.5, "the weights are back after an error too"


def test_the_trainer_averages_the_student_once_an_update() -> None:
    loop = trainer(options=replace(OPTIONS, ema=0.9))
    by_hand = EMA(loop.method.trained, 0.9)
    assert loop.ema is not None
    for _ in range(4):
        loop.update()
        by_hand.update()
    assert same(by_hand.average, loop.ema.average) and loop.ema.updates == 4
    assert trainer().ema is None


def test_metrics_are_means_since_the_last_line(tmp_path: Path) -> None:
    trainer(run_directory=tmp_path).fit()
    each = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in each] == [1, 2, 3, 4, 5, 6]
    assert {"student/follow", "student/doubt", "critic/fit", "critic/gradient_norm", "lr"} < set(each[0])
    rare = tmp_path / "rare"
    rare.mkdir()
    trainer(options=replace(OPTIONS, log_every=4), run_directory=rare).fit()
    lines = [json.loads(line) for line in (rare / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    mean = sum(line["student/follow"] for line in each[:4]) / 4
    assert lines[0]["student/follow"] == pytest.approx(mean, rel=1e-5)


def test_a_term_that_is_not_a_number_is_null_in_the_metrics(tmp_path: Path) -> None:
    trainer(Duel(poison=(0,)), replace(OPTIONS, steps=1), run_directory=tmp_path).fit()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["student/follow"] is None and line["student/doubt"] > 0


# -- what is shown ----------------------------------------------------------------------------------


def test_grids_show_the_averaged_student_and_leave_everything_as_it_was(tmp_path: Path) -> None:
    loop = trainer(options=replace(OPTIONS, ema=0.9))
    loop.fit()
    method, pipeline = loop.method, FakePipeline()
    grids = Grids(pipeline, tmp_path / "samples", ["one", "two", "three"], seeds=(0, 1), at_once=4)  # type: ignore[arg-type]
    before, random, mode = weights(method.trained), torch.get_rng_state(), method.trained.training
    path = grids.draw(method, 40, loop.ema)
    assert same(before, weights(method.trained)) and torch.equal(random, torch.get_rng_state())
    assert method.trained.training == mode
    assert path.name == "step-00000040.png"
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["prompts"] == ["one", "two", "three"] and about["seeds"] == [0, 1]
    assert (about["student"]["steps"], about["student"]["averaged"], about["teacher"]["steps"]) == (2, True, 50)
    averaged = Image.open(path).tobytes()
    assert Image.open(grids.draw(method, 40, loop.ema)).tobytes() == averaged, "the same prompts, noise and weights every time"
    assert Image.open(grids.draw(method, 41)).tobytes() != averaged
    assert sorted(each.name for each in (tmp_path / "samples").iterdir()) == [
        *(f"step-000000{step}.{kind}" for step in (40, 41) for kind in ("json", "png")),
        "teacher.safetensors",
    ]
    with loop.ema.applied(method.trained):  # type: ignore[union-attr]
        student = grids.sample(method.trained, method.sampler())
    assert student.shape == (6, 3, 16, 16)
    one = Grids(pipeline, tmp_path, ["one"], seeds=(0,)).sample(method.trained, method.sampler(1))  # type: ignore[arg-type]
    many = grids.sample(method.trained, method.sampler(1))
    torch.testing.assert_close(one[0], many[0]), "a sample does not depend on its company"


def test_grids_are_drawn_when_due(tmp_path: Path) -> None:
    pipeline = FakePipeline()
    grids = Grids(pipeline, tmp_path, ["one"])  # type: ignore[arg-type]
    trainer(options=replace(OPTIONS, steps=7, sample_every=3), grids=grids).fit()
    assert [path.stem for path in sorted(tmp_path.glob("*.png"))] == ["step-00000003", "step-00000006", "step-00000007"]


def test_plain_lines_where_there_is_no_terminal_and_nothing_when_quiet() -> None:
    for quiet in (False, True):
        console = Console(file=io.StringIO(), width=300)
        trainer(reporter=Reporter(quiet=quiet, console=console)).fit()
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("update 6 of 6" in text and "student/follow" in text) != quiet and bool(text) != quiet


def test_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=300, force_terminal=True)
    trainer(reporter=Reporter(console=console)).fit()
    assert "6/6" in console.file.getvalue()  # type: ignore[attr-defined]


def test_threads_never_exceed_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    assert launch.choose_threads(3) == 3, "what the user says"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "available_cores", lambda: 8)
    monkeypatch.setattr(launch, "trial", lambda threads: {1: 4.0, 2: 2.0, 4: 3.0, 8: 30.0}[threads])
    assert launch.choose_threads() == 2, "the fastest, not the most"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.choose_threads() == 1
    assert launch.choose_threads(device="cuda") == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launch.choose_threads() == 1, "processes share the cores"
    assert torch.get_num_threads() == before


def test_threads_are_tried_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "available_cores", lambda: 2)
    assert launch.choose_threads() in (1, 2)
    assert torch.get_num_threads() == before


# -- several processes ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def process(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number))
    dist.init_process_group("gloo", rank=number, world_size=2)
    torch.manual_seed(100 + number)  # networks differ until the trainer shares the first process's
    pipeline, method = FakePipeline(adapters=True), Duel(drawn=False)
    if number == 0:
        torch.manual_seed(0)
    method.setup(pipeline)
    data = fake_source(pipeline, rank=number, processes=2)
    loop = Trainer(method, data, replace(OPTIONS, batch=4, micro_batches=2), run_directory=Path(folder), device="cpu")
    loop.fit()
    torch.save({"student": weights(method.student), "critic": weights(method.critic)}, f"{folder}/weights-{number}.pt")
    if number == 1:
        loop.turns[0].weights[0].grad = torch.ones_like(loop.turns[0].weights[0])
    average_gradients(loop.turns[0].weights)
    assert [w.grad is not None for w in loop.turns[0].weights] == [True, False], "what only one process has counts half"
    assert bool((loop.turns[0].weights[0].grad == 0.5).all())
    dist.destroy_process_group()


def test_two_processes_stay_identical_and_equal_one_with_the_same_joint_batch(tmp_path: Path) -> None:
    mp.start_processes(process, (free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"weights-{number}.pt") for number in range(2))
    assert same(first["student"], second["student"]) and same(first["critic"], second["critic"])
    alone = trainer(Duel(drawn=False), replace(OPTIONS, batch=8, micro_batches=2), adapters=True)
    alone.fit()
    for name, weight in weights(alone.method.trained).items():
        torch.testing.assert_close(first["student"][name], weight, atol=1e-5, rtol=0)
    saved = tmp_path / "checkpoints" / "step-00000006"
    assert (saved / "random-00000.safetensors").exists() and (saved / "random-00001.safetensors").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6, "one process writes"


def test_batches_have_the_shape_that_methods_expect() -> None:
    batch = fake_source(FakePipeline()).batch(3)
    assert batch.shape == (3, *SHAPE) and len(batch.condition) == 3 and batch.latents is not None
