"""Derivatives along trajectories: exact where the answer is known, and differences agree with them to second order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.adapters import LoraOptions
from fastgen.analytic import Gaussian
from fastgen.denoiser import Denoiser, Guided, Predicts, Retimed
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline
from fastgen.pipelines.tiny import builders
from fastgen.process import Trig
from fastgen.tangents import Way, answer_and_derivative, derivative, network_of, plain_attention
from tests.method_fakes import PROCESSES, FakePipeline
from tests.tiny_models import PROMPTS, flux, sd3, sd15, toy

WAYS: tuple[Way, ...] = ("central", "semi")


def as_v(denoiser: Predicts, condition: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: denoiser(x, t, condition).v


def errors(denoiser: Predicts, condition: Any, shape: tuple[int, ...], steps: tuple[float, ...]) -> dict[Way, list[float]]:
    """The greatest difference from the exact derivative of each way and step, over the exact one's greatest value."""
    torch.manual_seed(3)
    x, dx, t = torch.randn(shape).double(), torch.randn(shape).double(), torch.linspace(0.3, 0.8, shape[0]).double()
    along = functools.partial(derivative, as_v(denoiser, condition), denoiser, x, t, dx, 0.7)
    exact = along()
    assert float(exact.abs().max()) > 0.1 and not exact.requires_grad
    return {way: [float((along(way=way, step=h) - exact).abs().max() / exact.abs().max()) for h in steps] for way in WAYS}


@pytest.mark.parametrize("process", ["flow", "trig"])
def test_of_a_closed_form(process: str) -> None:
    """Along the trajectory of a Gaussian x0 moves by what the flow map says of it."""
    p = PROCESSES[process]
    teacher = Gaussian(torch.tensor([0.8, -0.3]), 0.5, p)
    condition, t, h = teacher.unconditional(4), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64), 1e-4
    x = torch.randn(4, 2, dtype=torch.float64)
    before, after = (teacher.flow_map(x, t, t + s, condition) for s in (-h, h))
    moved = teacher(after, t + h, condition).x0 - teacher(before, t - h, condition).x0
    found = derivative(lambda x, t: teacher(x, t, condition).x0, teacher, x, t, (after - before) / (2 * h))
    torch.testing.assert_close(found, moved / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", ["flow", "trig", "vp"])
def test_differences_agree_to_second_order(process: str) -> None:
    """Half the step, a quarter of the error; through a table, whose slope jumps at its entries, the error is only small."""
    pipeline = FakePipeline(PROCESSES[process], (3, 4, 4))
    pipeline.base.double()
    denoiser, condition = Retimed(pipeline.frozen(), Trig()), pipeline.encode_prompts(["0", "1", "0 1"])
    for found in errors(denoiser, condition, (3, 3, 4, 4), (0.02, 0.01, 0.005)).values():
        if process == "vp":
            assert found[-1] < 1e-2
        else:
            assert 3.5 < found[0] / found[1] < 4.5 and 3.5 < found[1] / found[2] < 4.5


def test_at_the_ends_of_time_differences_are_one_sided() -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3,))
    denoiser, condition = pipeline.frozen(), pipeline.encode_prompts(["0"] * 2)
    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return denoiser(x, t, condition).v

    x, t, dx = torch.randn(2, 3), torch.tensor([1.0, 0.0]), torch.randn(2, 3)
    exact = derivative(watched, denoiser, x, t, dx)
    for way in WAYS:
        seen.clear()
        found = derivative(watched, denoiser, x, t, dx, way=way, step=1e-3)
        assert all(bool((at >= 0).all() and (at <= 1).all()) for at in seen)
        torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)


@functools.cache
def tiny(name: str, mode: str) -> tuple[Pipeline, Denoiser]:
    """A student on a tiny diffusers network that is not the teacher, with gradient checkpointing."""
    lora = LoraOptions(rank=4)
    build = {"unet": sd15, "dit": sd3, "flux": flux}[name]
    pipeline = Pipeline.wrap(build(), roles={"student": mode}, lora=lora, gradient_checkpointing=True)  # type: ignore[operator]
    student = pipeline.trainable("student")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return pipeline, student


def answers(student: Denoiser, condition: Any, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Value, derivative (in two passes, and in one) and gradients of the value, by our rules and by torch's own."""
    torch.manual_seed(5)
    kind = torch.float64 if student.network.dtype == torch.float64 else torch.float32
    x, dx = torch.randn(2, *shape, dtype=kind)
    t, down = torch.linspace(0.3, 0.8, len(x), dtype=kind), torch.randn(shape, dtype=kind)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    function = as_v(Retimed(student, Trig()), condition)
    found = []
    for way in ("exact", "plain"):
        one_way: Any = {"way": way}
        alone = derivative(function, student, x, t, dx, 0.7, **one_way)
        value, change = answer_and_derivative(lambda index: function, student, x, t, dx, 0.7, **one_way)
        slopes = torch.autograd.grad((value * down).sum(), weights, allow_unused=True)
        found.append([value.detach(), alone, change, *(slope for slope in slopes if slope is not None)])
    return found[0], found[1]


FAMILIES = ("StableDiffusionPipeline", "StableDiffusion3Pipeline")


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_our_rules_and_those_of_torch_agree(name: str, mode: str) -> None:
    """In single precision, value, derivative and gradients to 1e-5 of the largest."""
    pipeline = Pipeline.wrap(builders()[name](), roles={"student": mode}, lora=LoraOptions(rank=4))
    student = pipeline.trainable("student")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    condition = pipeline.encode_prompts(list(PROMPTS[:2]))
    for ours, theirs in zip(*answers(student, condition, (2, *pipeline.latent_shape)), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_through_a_diffusers_network(name: str, mode: str) -> None:
    """In double precision, so that the differences are not drowned; the student's own adapter is differentiated."""
    pipeline, student = tiny(name, mode)
    pipeline.network.double()
    student.double()
    condition = pipeline.encode_prompts(list(PROMPTS[:2])).to(dtype=torch.float64)
    shape = (2, *pipeline.latent_shape)
    # Times reach the network in single precision and thousandths, where its fastest wave has a length of 6.3 / 1000.
    found = errors(Retimed(student, Trig()), condition, shape, (4e-4, 2e-4))
    for some in found.values():
        assert some[1] < 0.05
        if name == "dit":
            assert 3.5 < some[0] / some[1] < 4.5
    as_plain = answers(student, condition, shape)
    torch.testing.assert_close(as_plain[0], as_plain[1], rtol=1e-9, atol=1e-9)
    if mode == "lora":
        x, t = torch.randn(shape).double(), torch.tensor([0.4, 0.6]).double()
        own, base = (derivative(as_v(d, condition), d, x, t, x) for d in (student, pipeline.frozen()))
        assert (own - base).abs().max() > 1e-3


def test_the_network_is_as_it_was() -> None:
    pipeline, student = tiny("unet", "full")
    student.float().train()
    blocks = [m for m in student.network.modules() if getattr(m, "gradient_checkpointing", False)]
    dropout = next(m for m in student.network.modules() if isinstance(m, nn.Dropout))
    dropout.p = 0.5
    condition = pipeline.encode_prompts(list(PROMPTS[:2]))
    states: list[tuple[bool, bool]] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        states.append((any(m.training for m in student.network.modules()), any(m.gradient_checkpointing for m in blocks)))
        return student(x, t, condition).v

    x, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([0.4, 0.6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        twice = [derivative(watched, student, x, t, x) for _ in range(2)]
    dropout.p = 0.0
    assert torch.equal(*twice) and twice[0].dtype == torch.float32 and not twice[0].requires_grad
    assert set(states) == {(False, False)} and blocks
    assert all(m.training for m in student.network.modules()) and all(m.gradient_checkpointing for m in blocks)
    # And it still learns, under mixed precision too.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(x, t, condition).v.square().mean().backward()
    assert all(w.grad is not None for w in student.parameters() if w.requires_grad)
    student.zero_grad()


def test_a_chosen_kernel_is_left_for_plain_products_and_taken_up_again() -> None:
    pipeline, student = tiny("flux", "full")
    condition = pipeline.encode_prompts(list(PROMPTS[:2]))
    x, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([0.4, 0.6])
    plain = derivative(as_v(student, condition), student, x, t, x)
    network: Any = student.network
    network.set_attention_backend("native")
    try:
        processors = [p for m in network.modules() if (p := getattr(m, "processor", None)) is not None]
        with plain_attention(network):
            assert {p._attention_backend.value for p in processors} == {"_native_math"}
        assert {p._attention_backend.value for p in processors} == {"native"}
        torch.testing.assert_close(derivative(as_v(student, condition), student, x, t, x), plain)
    finally:
        network.reset_attention_backend()


@pytest.mark.parametrize("way", WAYS)
def test_fine_differences_of_half_precision_are_refused(way: Any) -> None:
    """Coarse ones show through its rounding."""
    pipeline = Pipeline.wrap(toy())
    denoiser, condition = pipeline.frozen(), pipeline.encode_prompts(["a red cube"] * 4)
    function, x, t = as_v(denoiser, condition), torch.randn(4, *pipeline.latent_shape), torch.full((4,), 0.5)
    whole = derivative(function, denoiser, x, t, x, way=way, step=0.02)
    denoiser.network.to(torch.bfloat16)
    coarse = derivative(function, denoiser, x, t, x, way=way, step=0.02)
    assert 0 < (coarse - whole).norm() < 0.25 * whole.norm()
    with pytest.raises(UserError, match=f"'{way}' .* at a step of 0.001 needs float32 weights, not torch.bfloat16"):
        derivative(function, denoiser, x, t, x, way=way)


def test_the_network_is_found_through_wrappers() -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3,))
    assert network_of(Retimed(Guided(pipeline.frozen(), 2.0), Trig())) is pipeline.base
    assert network_of(Gaussian(torch.zeros(2), 1.0, PROCESSES["flow"])) is None
