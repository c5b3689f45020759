"""Optimisers and schedules: what they do, that a bad gradient moves nothing, and that a resumed run goes on bit by bit."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastgen.config import PlayerConfig, TrainConfig
from fastgen.errors import UserError
from fastgen.method import Batch, Loss
from fastgen.training import checkpoint, optimizers
from fastgen.training.ema import EMA, exponent, half_life, power
from fastgen.training.loop import Trainer
from fastgen.training.micro_batches import more_parts
from fastgen.training.optimizers import MuonWithAdamW, make_optimizer, step
from fastgen.training.progress import Reporter
from fastgen.training.schedules import pace
from tests.training_fakes import Duel, FakePipeline, fake_source, same, weights

OPTIONS = TrainConfig(steps=6, batch=4, lr=1e-2, log_every=1, checkpoint_every=0)
CAME_THERE = importlib.util.find_spec("pytorch_optimizer") is not None
came_only = pytest.mark.skipif(not CAME_THERE, reason="pytorch-optimizer is not installed")
NAMES = ["adamw", "adamw8bit", "adafactor", "muon", pytest.param("came", marks=came_only)]
NONE, ALL = torch.tensor(1.0), torch.tensor(math.nan)  # norms: a good one, and one of which nothing moves


def trainer(method: Duel | None = None, options: TrainConfig = OPTIONS, **more: Any) -> Trainer:
    torch.manual_seed(0)
    method, pipeline = method or Duel(), FakePipeline()
    method.setup(pipeline)
    return Trainer(method, fake_source(pipeline), options, device="cpu", **more)


def some_weights() -> list[nn.Parameter]:
    """A matrix large enough for moments of 8 bits, a convolution and a bias."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(72, 72), nn.Conv2d(2, 3, 3, bias=False))
    return list(network.parameters())


def draw_gradients(some: Sequence[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in some:
        weight.grad = torch.randn(weight.shape, generator=generator)


def copies(some: Sequence[Tensor]) -> list[Tensor]:
    return [each.detach().clone() for each in some]


def tensors_of(state: Any) -> list[Tensor]:
    """Every tensor in an optimiser's state_dict, in order."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


# -- optimisers -----------------------------------------------------------------------------------


def test_the_default_is_torchs_fused_adamw() -> None:
    ours, theirs = some_weights(), some_weights()
    one = make_optimizer(ours, TrainConfig(weight_decay=0.1), 1e-2)
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), fused=True)
    for seed in range(4):
        draw_gradients(ours, seed)
        draw_gradients(theirs, seed)
        step(one, NONE)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_gradient_moves_neither_weights_nor_moments(name: str) -> None:
    some = some_weights()
    optimizer = make_optimizer(some, replace(OPTIONS, optimizer=name, weight_decay=0.1), 1e-2)
    draw_gradients(some)
    start = copies(some)
    step(optimizer, NONE)
    assert not any(torch.equal(a, b) for a, b in zip(start, some, strict=True)), "a good one moves everything"
    before, moments = copies(some), copies(tensors_of(optimizer.state_dict()["state"]))
    some[0].grad = torch.full_like(some[0], torch.nan)
    step(optimizer, ALL)
    assert all(torch.equal(a, b) for a, b in zip(before, some, strict=True))
    after = tensors_of(optimizer.state_dict()["state"])
    assert len(moments) >= 5 and all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    ours, theirs = some_weights(), some_weights()
    optimizer = make_optimizer(ours, replace(OPTIONS, optimizer="muon", weight_decay=0.1), 1e-2)
    muon = torch.optim.Muon(theirs[:1], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[1:], lr=1e-2, weight_decay=0.1, fused=True)
    for seed in range(3):
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 0.01 / (seed + 1)  # what the trainer sets reaches both
        draw_gradients(ours, seed)
        draw_gradients(theirs, seed)
        step(optimizer, NONE)
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [set(entry) for entry in optimizer.state_dict()["state"].values()] == [
        {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "exp_avg_sq"},
    ]  # fmt: skip


def test_muons_update_has_the_size_of_adamws() -> None:
    """0.2 a number (arXiv:2502.16982, eq. 4), up to Newton-Schulz's singular values between 0.7 and 1.2."""
    some = some_weights()
    before = copies(some)[0]
    optimizer = make_optimizer(some, replace(OPTIONS, optimizer="muon"), 1e-2)
    draw_gradients(some)
    step(optimizer, NONE)
    assert float((some[0].detach() - before).square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.25)


def test_muon_without_matrices_is_adamw_and_with_nothing_else_is_muon_alone() -> None:
    options = replace(OPTIONS, optimizer="muon")
    assert type(make_optimizer([nn.Parameter(torch.ones(3))], options, 1e-2)) is torch.optim.AdamW
    alone = make_optimizer([nn.Parameter(torch.ones(3, 2))], options, 1e-2)
    assert isinstance(alone, MuonWithAdamW) and len(alone.param_groups) == 1


def test_eight_bits_are_eight_bits_and_near_to_adamw() -> None:
    ours, theirs = some_weights(), some_weights()
    optimizer = make_optimizer(ours, replace(OPTIONS, optimizer="adamw8bit"), 1e-2)
    exact = make_optimizer(theirs, OPTIONS, 1e-2)
    start = copies(ours)
    for seed in range(5):
        for some, each in ((ours, optimizer), (theirs, exact)):
            draw_gradients(some, seed)
            step(each, NONE)
    kinds = {name: tensor.dtype for name, tensor in optimizer.state[ours[0]].items() if isinstance(tensor, Tensor)}
    assert kinds["state1"] == kinds["state2"] == torch.uint8
    assert optimizer.state[ours[1]]["state1"].dtype == torch.float32, "small weights keep whole moments"
    moved, apart = (theirs[0] - start[0]).norm(), (ours[0] - theirs[0]).norm()
    assert 0 < apart < 0.1 * moved


@came_only
def test_came_is_the_papers() -> None:
    """Algorithm 2 of arXiv:2307.02047 on a matrix, with AdamW's decoupled decay."""
    some = [nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))]
    optimizer = make_optimizer(some, replace(OPTIONS, optimizer="came", weight_decay=0.1, betas=(0.8, 0.99)), 1e-2)
    theta, m = some[0].detach().double(), torch.zeros(5, 4, dtype=torch.float64)
    r, c, big_r, big_c = torch.zeros(5), torch.zeros(4), torch.zeros(5), torch.zeros(4)
    for seed in range(4):
        draw_gradients(some, seed)
        g = some[0].grad.double()  # type: ignore[union-attr]
        r, c = (0.99 * old + 0.01 * (g**2 + 1e-30).mean(over) for old, over in ((r, 1), (c, 0)))
        u = g / (r[:, None] * c / r.mean()).sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        m = 0.8 * m + 0.2 * u
        doubt = (u - m) ** 2 + 1e-16
        big_r, big_c = (0.9999 * old + 0.0001 * doubt.mean(over) for old, over in ((big_r, 1), (big_c, 0)))
        theta = theta * (1 - 1e-2 * 0.1) - 1e-2 * m / (big_r[:, None] * big_c / big_r.mean()).sqrt()
        step(optimizer, NONE)
        torch.testing.assert_close(some[0].detach().double(), theta, rtol=1e-4, atol=1e-5)
    held = sum(value.numel() for value in optimizer.state[some[0]].values() if isinstance(value, Tensor) and value.ndim)
    assert held == 5 * 4 + 2 * (5 + 4), "one moment whole, the others by rows and columns"


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r'train\.optimizer = "adamw8bit" needs bitsandbytes; pip install'):
        make_optimizer(some_weights(), replace(OPTIONS, optimizer="adamw8bit"), 1e-2)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r'train\.optimizer = "came" needs pytorch-optimizer; pip install'):
        make_optimizer(some_weights(), replace(OPTIONS, optimizer="came"), 1e-2)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r'"muon" needs torch 2\.9'):
        make_optimizer(some_weights(), replace(OPTIONS, optimizer="muon"), 1e-2)


def test_a_bitsandbytes_that_needs_a_gpu_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import AdamW8bit

    def fails(self: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(AdamW8bit, "step", fails)
    with pytest.raises(UserError, match="does not work on a CPU"):
        make_optimizer(some_weights(), replace(OPTIONS, optimizer="adamw8bit"), 1e-2)


# -- in the trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, optimizer=name, steps=8, ema=0.9, warmup=3, schedule="wsd", weight_decay=0.01)
    straight = trainer(Duel(poison=(2,)), options, run_directory=tmp_path)
    for _ in range(4):
        straight.update()
    path = straight.save()
    assert path is not None
    back = trainer(Duel(poison=(2,)), options)
    back.load(path)
    for loop in (straight, back):
        back_to = torch.get_rng_state()
        for _ in range(4):
            loop.update()
        torch.set_rng_state(back_to)
    for one, other in zip(straight.turns, back.turns, strict=True):
        assert same(weights(one.player.weights), weights(other.player.weights))
        moments = [tensors_of(turn.optimizer.state_dict()["state"]) for turn in (one, other)]
        assert len(moments[0]) >= 3 and all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
        assert int(one.skipped) == int(other.skipped) == (one.player.name == "student")
    assert straight.ema is not None and back.ema is not None and same(straight.ema.average, back.ema.average)


def test_one_player_may_have_settings_of_its_own() -> None:
    own = PlayerConfig(optimizer="adafactor", lr=1e-3, weight_decay=0.5, max_grad_norm=0.25)
    loop = trainer(Duel(critic_lr_scale=3.0), replace(OPTIONS, warmup=2, players={"critic": own}))
    student, critic = loop.turns
    assert isinstance(student.optimizer, torch.optim.AdamW) and isinstance(critic.optimizer, torch.optim.Adafactor)
    assert critic.optimizer.param_groups[0]["weight_decay"] == 0.5
    loop.update()
    assert [turn.optimizer.param_groups[0]["lr"] for turn in loop.turns] == [0.5e-2, 0.5e-3], "its rate is not scaled"
    assert loop.log()["critic/lr"] == 0.5e-3
    for turn, limit in ((student, 1.0), (critic, 0.25)):
        for weight in turn.weights:
            weight.grad = torch.full_like(weight, 3.0)
        loop.apply(turn)
        norm = torch.cat([w.grad.flatten() for w in turn.weights if w.grad is not None]).norm()
        assert float(norm) == pytest.approx(limit, rel=1e-3)


def test_a_rate_that_is_common_is_scaled_by_the_method() -> None:
    loop = trainer(Duel(critic_lr_scale=3.0), replace(OPTIONS, players={"critic": PlayerConfig(betas=(0.0, 0.9))}))
    loop.update()
    assert loop.turns[1].optimizer.param_groups[0]["lr"] == 3e-2
    assert loop.turns[1].optimizer.param_groups[0]["betas"] == (0.0, 0.9)


def test_a_player_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError) as raised:
        trainer(options=replace(OPTIONS, players={"critc": PlayerConfig(lr=1e-3)}))
    assert str(raised.value) == ("train.players.critc: there is no such player; this run has 'student' and 'critic'")
    later = trainer(Duel(restart_at=3), replace(OPTIONS, players={"fake_score": PlayerConfig(lr=1e-3)}))
    assert len(later.turns) == 2, "a later stage may bring it"


def test_the_bad_step_is_decided_without_waiting_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: bool(waited.append(self)) or self.item() != 0)
    some = some_weights()
    for name, times in (("adamw", 0), ("muon", 1)):
        waited.clear()
        optimizer = make_optimizer(some, replace(OPTIONS, optimizer=name), 1e-2)
        draw_gradients(some)
        before = [weight.clone() for weight in some]
        flag = optimizers.step(optimizer, torch.tensor(math.inf), 1.0)
        assert sum(each is flag for each in waited) == times
        assert flag.item() == 1 and all(torch.equal(a, b) for a, b in zip(some, before, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_clipping_is_torchs_own(name: str) -> None:
    """Also where the fused optimiser does it: gradients of norm 3 to norm 1, and gradients below that untouched."""
    for size, most in ((3.0, 1.0), (0.5, 1.0), (3.0, None)):
        weights = [some_weights(), some_weights()]
        ours, theirs = (make_optimizer(each, replace(OPTIONS, optimizer=name), 1e-2) for each in weights)
        for _ in range(3):
            draw_gradients(weights[0])
            factor = size / torch.nn.utils.get_total_norm([weight.grad for weight in weights[0]])
            for mine, other in zip(*weights, strict=True):
                mine.grad *= factor
                other.grad = mine.grad.clone()
            optimizers.step(ours, torch.nn.utils.get_total_norm([weight.grad for weight in weights[0]]), most)
            if most:
                torch.nn.utils.clip_grad_norm_(weights[1], most)
            theirs.step()
            for mine, other in zip(*weights, strict=True):
                torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


# -- schedules ------------------------------------------------------------------------------------

HALF = math.sqrt(0.5)
BY_HAND: dict[tuple[str, int], list[float]] = {  # (schedule, warm-up) -> the factor in each of ten updates
    ("constant", 0):     [1] * 10,
    ("constant", 4):     [0.25, 0.5, 0.75] + [1] * 7,
    ("linear", 0):       [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    ("linear", 2):       [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    ("cosine", 0):       [0.5 + 0.5 * math.cos(math.pi * n / 10) for n in range(10)],
    ("wsd", 2):          [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
    ("inverse-sqrt", 3): [1 / 3, 2 / 3, 1, math.sqrt(3 / 4), math.sqrt(3 / 5), HALF, *(math.sqrt(3 / n) for n in range(7, 11))],
}  # fmt: skip


@pytest.mark.parametrize(("case", "factors"), BY_HAND.items(), ids=str)
def test_the_course_of_the_learning_rate_by_hand(case: tuple[Any, int], factors: list[float]) -> None:
    schedule, warmup = case
    assert [pace(schedule, n, 10, warmup=warmup, cooldown=0.4) for n in range(10)] == pytest.approx(factors, abs=1e-12)


def test_inverse_sqrt_without_a_warmup_falls_late() -> None:
    assert pace("inverse-sqrt", 9_999, 50_000) == 1 and pace("inverse-sqrt", 39_999, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_trainer_starts_every_stage_anew(schedule: Any) -> None:
    loop = trainer(Duel(restart_at=4), replace(OPTIONS, schedule=schedule, cooldown=0.5, steps=9))
    rates = []
    for _ in range(9):
        loop.update()
        rates.append(loop.turns[0].optimizer.param_groups[0]["lr"])
    course: Callable[[int, int], float] = lambda n, length: 1e-2 * pace(schedule, n, length, cooldown=0.5)  # noqa: E731
    assert rates == pytest.approx([course(n, 4) for n in range(4)] + [course(n, 5) for n in range(5)])


# -- fp16 -------------------------------------------------------------------------------------------


FP16 = replace(OPTIONS, precision="fp16")


def test_fp16_scales_losses_and_steps_on_whole_gradients() -> None:
    kinds, scaled = set(), []
    loop = trainer(Duel(drawn=False), FP16)
    loop.method.trained.network.inner.register_forward_hook(lambda m, a, output: kinds.add(output.dtype))  # type: ignore
    backward = loop.accelerator.backward
    loop.accelerator.backward = lambda loss: (scaled.append(loss.item()), backward(loss))  # type: ignore
    loop.update()
    plain = trainer(Duel(drawn=False))
    plain.update()
    losses = loop.averages.take()
    assert kinds == {torch.float16}
    assert scaled[0] == pytest.approx(2**16 * (losses["student/follow"] + losses["student/doubt"]), rel=1e-3)
    for one, other in zip(loop.turns, plain.turns, strict=True):
        assert float(losses[f"{one.player.name}/gradient_norm"]) > 0
        for a, b in zip(one.weights, other.weights, strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
            assert a.dtype == torch.float32
    assert losses["student/gradient_norm"] == pytest.approx(plain.averages.take()["student/gradient_norm"], rel=0.02)


def test_every_optimiser_has_a_scaler_of_its_own_that_checkpoints_keep(tmp_path: Path) -> None:
    loop = trainer(Duel(poison=(1,)), FP16, run_directory=tmp_path)
    loop.update()
    loop.update()
    assert [turn.scaler.get_scale() for turn in loop.turns] == [2**15, 2**16], "only the student's gradient was not finite"
    assert [int(turn.skipped) for turn in loop.turns] == [1, 0]
    path = loop.save()
    assert path is not None
    back = trainer(options=FP16)
    back.load(path)
    assert [turn.scaler.state_dict() for turn in back.turns] == [turn.scaler.state_dict() for turn in loop.turns]
    assert (
        back.turns[0].scaler.state_dict()["_growth_tracker"] == 0 and back.turns[1].scaler.state_dict()["_growth_tracker"] == 2
    )
    start = torch.get_rng_state()
    for each in (loop, back):
        torch.set_rng_state(start)
        each.update()
    for one, other in zip(loop.turns, back.turns, strict=True):
        assert same(weights(one.player.weights), weights(other.player.weights))


# -- memory -----------------------------------------------------------------------------------------


@dataclass
class Hungry(Duel):
    """Runs out of memory where the student's part of a batch is of more than `fits` samples."""

    fits: int = 3

    def student_loss(self, batch: Batch) -> Loss:
        terms = super().student_loss(batch)
        if len(batch.condition) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return terms


SEARCHING = replace(OPTIONS, batch=12, micro_batches=0)


def test_memory_that_runs_out_is_answered_by_more_parts_of_the_same_batch(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    reporter = Reporter(console=console)
    loop = trainer(Hungry(drawn=False), SEARCHING, run_directory=tmp_path, reporter=reporter)
    fixed = trainer(Duel(drawn=False), replace(SEARCHING, micro_batches=4))
    for _ in range(3):
        loop.update()
        fixed.update()
    assert loop.micro_batches == 4, "12 samples in 1, 2 and then 4 parts"
    for one, other in zip(loop.turns, fixed.turns, strict=True):
        assert same(weights(one.player.weights), weights(other.player.weights)), "the parts that failed have left nothing"
    assert loop.data.state() == fixed.data.state() and loop.averages.state() == fixed.averages.state()
    said = [line for line in console.file.getvalue().splitlines() if "memory" in line]  # type: ignore[attr-defined]
    assert said == [
        "update 1, player 'student': out of memory; a batch of 12 is now computed in 4 parts (train.micro_batches = 4)"
    ]
    path = loop.save()
    assert path is not None and checkpoint.read_state(path)["micro_batches"] == 4
    back = trainer(Hungry(drawn=False), SEARCHING)
    back.load(path)
    assert back.micro_batches == 4


def test_the_same_noise_is_drawn_for_the_batch_that_is_begun_anew() -> None:
    loops = [
        trainer(method, options) for method, options in ((Hungry(), SEARCHING), (Duel(), replace(SEARCHING, micro_batches=4)))
    ]
    for loop in loops:
        torch.manual_seed(4)
        loop.update()
    assert same(*(weights(loop.method.trained) for loop in loops))


def test_one_sample_that_does_not_fit_is_said_and_no_number_is_overruled() -> None:
    with pytest.raises(UserError, match=r"train\.micro_batches = 0: .* even with 1 sample at a time; LoRA"):
        trainer(Hungry(fits=0), SEARCHING).fit()
    with pytest.raises(torch.OutOfMemoryError):
        trainer(Hungry(), replace(SEARCHING, micro_batches=1)).fit()


def test_parts_are_equal() -> None:
    assert [more_parts(parts, 12) for parts in (1, 2, 4, 6, 12)] == [2, 4, 12, 12, None]
    assert more_parts(1, 7) == 7 and more_parts(1, 1) is None


# -- averages ---------------------------------------------------------------------------------------


def averaged(decay: Any, values: Sequence[float]) -> float:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1e6)  # where training began, of which nothing must be left
    ema = EMA(module, decay)
    for value in values:
        module.weight.data.fill_(value)
        ema.update()
    return ema.average["weight"].item()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_power_average_weighs_time_by_a_power(sigma_rel: float) -> None:
    """Its closed form: weights prod (1 - 1/s)^(gamma + 1) over s > t make t^(gamma + 1) - (t - 1)^(gamma + 1), over n^..."""
    gamma = exponent(sigma_rel)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)
    n = 400
    shares = [(t ** (gamma + 1) - (t - 1) ** (gamma + 1)) / n ** (gamma + 1) for t in range(1, n + 1)]
    values = [math.sin(t) for t in range(n)]
    assert averaged(power(sigma_rel), values) == pytest.approx(sum(map(math.prod, zip(shares, values, strict=True))), abs=1e-4)
    times = [(t - 0.5) / n for t in range(1, n + 1)]
    mean = sum(map(math.prod, zip(shares, times, strict=True)))
    deviation = math.sqrt(sum(share * (time - mean) ** 2 for share, time in zip(shares, times, strict=True)))
    assert deviation == pytest.approx(sigma_rel, rel=0.01)


def test_exponents_are_the_papers() -> None:
    """arXiv:2312.02696, section 3.1: sigma_rel of 0.05 and 0.10 are gamma of 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)


def test_half_life_in_samples() -> None:
    decay = half_life(1000, batch=10)
    assert decay(0) == 0, "the beginning is forgotten"
    assert decay(100) == pytest.approx(0.5 ** (10 / 50)), "at first a twentieth of the 1000 samples seen"
    assert math.prod(decay(n) for n in range(2000, 2100)) == pytest.approx(0.5), "100 updates of 10 samples"
    assert averaged(half_life(20, batch=10), [3.0]) == 3


def test_the_trainer_averages_as_the_options_say(tmp_path: Path) -> None:
    for options, course in (({"ema_halflife": 8}, half_life(8, 4)), ({"ema_sigma_rel": 0.2}, power(0.2))):
        loop = trainer(options=replace(OPTIONS, **options), run_directory=tmp_path)
        by_hand = EMA(loop.method.trained, course)
        for _ in range(3):
            loop.update()
            by_hand.update()
        assert loop.ema is not None and same(by_hand.average, loop.ema.average)
        path = loop.save()
        assert path is not None
        back = trainer(options=replace(OPTIONS, **options))
        back.load(path)
        loop.ema.update()
        back.ema.update()  # type: ignore[union-attr]
        assert same(loop.ema.average, back.ema.average)  # type: ignore[union-attr]


def test_two_averages_are_refused() -> None:
    with pytest.raises(UserError, match=r"ema = 0\.9 and ema_halflife = 100 are kinds of one average"):
        TrainConfig(ema=0.9, ema_halflife=100)


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r'"fp16" does not go with train\.sharding = "fsdp"; take "bf16"'):
        trainer(options=replace(FP16, sharding="fsdp"))
    monkeypatch.setattr("fastgen.training.optimizers.processes", lambda: 2)
    with pytest.raises(UserError, match="micro_batches = 0 is for one process"):
        optimizers.check_options(SEARCHING, Duel())
