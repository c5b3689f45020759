"""The shared terms against hand arithmetic, and the critics' heads on every shape of feature."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen import losses
from fastgen.analytic import Gaussian
from fastgen.critics import Heads, ScoreCritic, feature_shapes, groups_for, map_head
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.process import Kind, Prediction
from tests.method_fakes import KINDS, PROCESSES, TABLE, FakePipeline, Small, call


def test_pseudo_huber_by_hand() -> None:
    a, b, c = torch.tensor([[0.0, 3.0], [1e-4, -2.0]]), torch.zeros(2, 2), 0.5
    expected = sum(math.sqrt(d * d + c * c) - c for d in (0.0, 3.0, 1e-4, 2.0)) / 4
    assert abs(float(losses.pseudo_huber(a, b, c)) - expected) < 1e-6
    # Far below c the root loses every digit in float32; d^2 / 2c is left.
    tiny = losses.pseudo_huber(torch.full((1,), 1e-6), torch.zeros(1), 1.0)
    assert abs(float(tiny) / 5e-13 - 1) < 1e-3


@pytest.mark.parametrize("loss", [losses.squared, losses.pseudo_huber])
def test_targets_get_no_gradient_and_sums_are_wide(loss: object) -> None:
    prediction, target = (torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    value = loss(prediction, target)  # type: ignore[operator]
    value.backward()
    assert value.dtype == torch.float32 and target.grad is None and prediction.grad is not None


@pytest.mark.parametrize("process", PROCESSES)
def test_snr(process: str) -> None:
    t, like = torch.tensor([0.0, 0.3, 1.0]), torch.zeros(3, 2, 1, 1)
    alpha, sigma = PROCESSES[process].coefficients(t, like)
    ratio = losses.snr(PROCESSES[process], t, like)
    assert ratio.shape == (3, 1, 1, 1) and ratio.isfinite().all() and (ratio.diff(dim=0) < 0).all()
    torch.testing.assert_close(ratio[1:], (alpha / sigma)[1:] ** 2)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_first_input_is_noise_alone(process: str) -> None:
    p, x0, eps = PROCESSES[process], torch.full((2, 3), 9.0), torch.randn(2, 3)
    xt = losses.noised(p, x0, eps, torch.tensor([1.0, 0.6]))
    torch.testing.assert_close(xt[0], eps[0] * p.initial_scale(torch.ones(())))
    torch.testing.assert_close(xt[1:], p.add_noise(x0[1:], eps[1:], torch.tensor([0.6])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", PROCESSES)
def test_landing_inverts_a_jump(process: str, kind: Kind) -> None:
    p = PROCESSES[process]
    x0, eps = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    t = torch.linspace(0.3, 0.9, 5, dtype=torch.float64)
    end = t - torch.tensor([0.3, 0.1, 0.25, 0.02, 0.001], dtype=torch.float64)
    xt = p.add_noise(x0, eps, t)
    back, noise = losses.landing(p, xt, t, p.add_noise(x0, eps, end), end)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(noise, eps, rtol=0, atol=1e-9)
    jump = Prediction(p.target(kind, back, noise, t), kind, xt, t, p).at(end)
    torch.testing.assert_close(jump, p.add_noise(x0, eps, end), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_is_the_error_of_the_networks_own_output(kind: Kind) -> None:
    torch.manual_seed(3)
    denoiser = Denoiser(Small((2,)), call, TABLE, kind)
    condition = FakePipeline(TABLE).encode_prompts(["0", "1", "", "0"])
    x0, eps, t = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0.1, 0.5, 0.8, 1.0])
    place = (t * 1000).long() - 1
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[place].sqrt()
    alpha, sigma = (x.float()[:, None] for x in (alpha, (1 - alpha**2).sqrt()))
    target = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]
    output = denoiser(alpha * x0 + sigma * eps, t, condition).output
    expected = (output - target).square().mean()
    torch.testing.assert_close(losses.denoising(denoiser, x0, eps, t, condition), expected)


def contrast_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.contrast(x, fake, real), x)
    return gradient


def test_contrast_gradient_by_hand() -> None:
    x, fake, real = torch.randn(3, 5, 2, 4, 4)
    expected = torch.stack([(f - r) / (a - r).abs().mean() for a, f, r in zip(x, fake, real, strict=True)]) / x.numel()
    torch.testing.assert_close(contrast_gradient(x, fake, real), expected, rtol=1e-4, atol=1e-7)
    assert contrast_gradient(x, real, real).abs().max() == 0


def test_contrast_gets_no_gradient_into_the_scores() -> None:
    fake, real = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    losses.contrast(torch.randn(2, 3, requires_grad=True), fake, real).backward()
    assert fake.grad is None and real.grad is None


def test_contrast_survives_what_is_not_a_number() -> None:
    x, fake, real = torch.randn(3, 4, 6)
    real[0] = x[0]  # a normaliser of zero
    fake[1, 2] = math.nan
    fake[2, 3] = math.inf
    gradient = contrast_gradient(x, fake, real)
    assert gradient.isfinite().all() and gradient.abs().max() < 10
    assert (gradient[0] == 0).all() and gradient[1, 2] == 0 and gradient[2, 3] == 0
    torch.testing.assert_close(gradient[3], (fake - real)[3] / (x - real)[3].abs().mean() / x.numel())
    half = contrast_gradient(x.bfloat16(), fake.bfloat16(), real.bfloat16())
    assert half.isfinite().all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_sample_that_is_no_number_is_not_pulled_and_the_others_are(wrong: float) -> None:
    x, direction = torch.randn(2, 4, 6)
    x[1, 3] = wrong
    x.requires_grad_(True)
    loss = losses.pull(x, direction)
    (gradient,) = torch.autograd.grad(loss, x)
    rest = [0, 2, 3]
    assert loss.isfinite() and (gradient[1] == 0).all()
    torch.testing.assert_close(gradient[rest], direction[rest] / x.numel())
    torch.testing.assert_close(loss, 0.5 * direction[rest].square().sum() / x.numel())


@pytest.mark.parametrize("delta", [-0.8, 0.3])
@pytest.mark.parametrize("process", PROCESSES)
def test_contrast_of_two_gaussians_is_the_divergences_derivative(process: str, delta: float) -> None:
    """Student N(m + delta, s^2), teacher N(m, s^2): the derivative of the divergence of the two at time t with respect to the
    student's mean is alpha^2 delta / (alpha^2 s^2 + sigma^2), which is alpha^2 / sigma^2 times the unnormalised contrast."""
    p, m, s = PROCESSES[process], 0.4, 0.7
    teacher, fake = (Gaussian(torch.tensor([mean]), s, p) for mean in (m, m + delta))
    x = m + delta + s * torch.randn(64, 1, dtype=torch.float64)
    t = torch.rand(64, dtype=torch.float64) * 0.9 + 0.05
    xt, condition = p.add_noise(x, torch.randn_like(x), t), teacher.unconditional(64)
    real, noisy = teacher(xt, t, condition).x0, fake(xt, t, condition).x0
    alpha, sigma = p.coefficients(t, x)
    gradient = contrast_gradient(x, noisy, real) * x.numel() * (x - real).abs()
    torch.testing.assert_close(gradient, delta * sigma**2 / (alpha**2 * s**2 + sigma**2), rtol=1e-6, atol=1e-9)
    assert (gradient.sign() == math.copysign(1, delta)).all()
    divergence = alpha**2 * delta / (alpha**2 * s**2 + sigma**2)
    torch.testing.assert_close(gradient * alpha**2 / sigma**2, divergence, rtol=1e-6, atol=1e-9)


def test_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([[2.0], [-0.5]]), torch.tensor([[0.3], [-3.0]])

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    right = -(log_sigmoid(2.0) + log_sigmoid(-0.5)) / 2 - (log_sigmoid(-0.3) + log_sigmoid(3.0)) / 2
    assert abs(float(losses.nonsaturating_critic(real, fake)) - right) < 1e-6
    assert abs(float(losses.nonsaturating_student(fake)) + (log_sigmoid(0.3) + log_sigmoid(-3.0)) / 2) < 1e-6
    assert abs(float(losses.hinge_critic(real, fake)) - ((0 + 1.5) / 2 + (1.3 + 0) / 2)) < 1e-6
    assert abs(float(losses.hinge_student(fake)) - 1.35) < 1e-6


def test_times_of_a_table_are_uniform_over_its_entries() -> None:
    t = losses.uniform_times(TABLE, 200_000)
    index = TABLE.timestep(t)
    assert torch.equal(index, index.round()) and index.min() == 0 and index.max() == 999
    counts = torch.bincount(index.long(), minlength=1000)
    assert counts.min() > 120 and counts.max() < 290  # 200 expected, standard deviation 14
    some = TABLE.timestep(losses.uniform_times(TABLE, 20_000, low=0.02, high=0.98))
    assert some.min() == 20 and some.max() == 979


@pytest.mark.parametrize("process", PROCESSES)
def test_laws_of_time(process: str) -> None:
    p = PROCESSES[process]
    t = losses.uniform_times(p, 20_000, low=0.2, high=0.6)
    assert t.min() >= 0.2 and t.max() <= 0.6 and abs(float(t.mean()) - 0.4) < 0.01
    shifted = losses.uniform_times(p, 20_000, shift=3.0)
    # The median of shift u / (1 + (shift - 1) u) is its value at a half.
    assert abs(float(shifted.median()) - 0.75) < 0.01
    logit = losses.logit_normal_times(p, 20_000, mean=0.5, std=0.8).logit()
    assert abs(float(logit.mean()) - 0.5) < 0.03 and abs(float(logit.std()) - 0.8) < 0.03


def test_choices_are_fair() -> None:
    drawn = torch.tensor([losses.shared_choice(4) for _ in range(2000)])
    assert torch.bincount(drawn).min() > 420


@pytest.mark.slow
def test_choices_are_shared_between_processes(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom fastgen.losses import shared_choice\nfrom torch import distributed\n"
        "rank = int(sys.argv[1])\n"
        "distributed.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "torch.manual_seed(rank)\nprint([shared_choice(1000) for _ in range(5)], int(torch.randint(1000, ())))\n"
    )
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True, cwd=root, env=env)
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].rsplit(maxsplit=1) for process in both)
    assert first[0] == second[0] and first[1] != second[1], "the choices are equal, the streams are each process's own"


# -- critics --------------------------------------------------------------------------------------

SHAPES = [(8, 16, 16), (40, 4, 4), (40, 2, 2), (3, 1, 1), (16, 5, 9), (8, 1, 7), (12, 20), (6,), (4, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_take_every_shape_and_every_input_counts(shape: tuple[int, ...]) -> None:
    heads = Heads([shape])
    feature = torch.randn(3, *shape, requires_grad=True)
    logits = heads([feature])
    assert logits.shape == (3, {1: 1, 2: shape[0], 3: 1, 4: shape[1 % len(shape)]}[len(shape)])  # tokens; frames
    logits.square().sum().backward()
    assert feature.grad is not None and feature.grad.isfinite().all()
    # A group normalisation over a single element would send zero back.
    assert (feature.grad.abs().flatten(1).sum(1) > 1e-6).all()
    assert all(weight.grad is not None for weight in heads.parameters())
    torch.testing.assert_close(heads([feature[:1]]), logits[:1], rtol=1e-4, atol=1e-5)


def test_the_map_head_of_dmd2() -> None:
    """On SDXL's 1280 x 32 x 32 three convolutions of stride 2, one over 4 x 4 and one over a pixel (checked at 64 channels)."""
    convolutions = [layer for layer in map_head(64, 32, 32, 64) if isinstance(layer, torch.nn.Conv2d)]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert [c.kernel_size for c in convolutions] == [(4, 4)] * 4 + [(1, 1)]
    assert (groups_for(1280), groups_for(320), groups_for(40), groups_for(3)) == (32, 32, 10, 1)


def test_several_features_side_by_side() -> None:
    heads = Heads([(8, 4, 4), (5, 12)], width=16)
    assert heads([torch.randn(2, 8, 4, 4), torch.randn(2, 5, 12)]).shape == (2, 6)
    assert not any(isinstance(p, torch.nn.UninitializedParameter) for p in heads.parameters())


def test_shapes_are_found_by_one_call_without_gradient() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    denoiser = pipeline.trainable("fake_score")
    shapes = feature_shapes(denoiser, ("middle", "enter"), (3, 4, 4), pipeline.encode_prompts([""]))
    assert shapes == [(16, 4, 4), (16, 4, 4)]
    critic = ScoreCritic(denoiser, ("middle",), shapes[:1])
    own = {id(p) for p in critic.parameters()}
    assert {id(p) for p in denoiser.parameters()} < own and len(own) > len(list(denoiser.parameters()))
    with pytest.raises(UserError, match=r"layer 'known' gives features of shape \(1,\)"):
        denoiser.network.known.register_forward_hook(lambda module, args, output: output[0, :1])
        feature_shapes(denoiser, ("known",), (3, 4, 4), pipeline.encode_prompts([""]))
