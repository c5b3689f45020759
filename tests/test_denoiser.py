"""Conditions as nests of tensors, and denoisers with what wraps them."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen.denoiser import Condition, Denoiser, Guided, Nest, Retimed, map_tensors
from fastgen.process import Flow, Prediction, Trig
from tests.test_process import PROCESSES

BATCH = 4


def leaf(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, *((), (3,), (2, 3))[seed % 3])
    if seed % 4 == 3:
        return torch.randint(0, 9, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=(torch.float32, torch.bfloat16)[seed % 2])


leaves = st.one_of(st.integers(0, 10_000).map(leaf), st.none(), st.booleans(), st.text(max_size=3))
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc_", min_size=1, max_size=4), inner, max_size=3),
    ),
    max_leaves=6,
)
inputs = st.fixed_dictionaries({"prompt": st.integers(0, 10_000).map(leaf), "rest": nests})


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    yes, shared = draw(inputs), draw(st.dictionaries(st.sampled_from("xyz"), nests, max_size=2))
    null = Condition(map_tensors(lambda x: x.flip(0) * 0 - 1, yes), shared) if draw(st.booleans()) else None
    return Condition(yes, shared, null)


def same(one: Nest, two: Nest) -> None:
    """Equal structure, types and tensors, to the bit."""
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            same(left, right)
    elif isinstance(one, Condition):
        same([one.inputs, one.shared, one.null], [two.inputs, two.shared, two.null])
    else:
        assert one == two


@given(conditions(), st.integers(0, BATCH))
def test_parts_of_a_condition_make_it_whole_again(condition: Condition, cut: int) -> None:
    assert len(condition) == BATCH
    first, second = condition[:cut], condition[cut:]
    assert len(first) == cut
    same(Condition.cat([first, second]), condition)


@given(conditions(), st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=6))
def test_indexing_takes_lists_and_tensors(condition: Condition, index: list[int]) -> None:
    chosen = condition[index]
    assert torch.equal(chosen.inputs["prompt"], condition.inputs["prompt"][torch.tensor(index)])
    same(chosen, condition[torch.tensor(index)])
    mask = torch.tensor([i in index for i in range(BATCH)])
    same(condition[mask], condition[sorted(set(index))])


@given(conditions(), st.integers(1, 3))
def test_repeating_keeps_the_copies_together(condition: Condition, times: int) -> None:
    repeated = condition.repeat(times)
    assert len(repeated) == BATCH * times
    same(repeated, condition[[i for i in range(BATCH) for _ in range(times)]])
    same(condition.repeat(1), condition)


@given(conditions(), st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
def test_dropout_takes_the_null_twin_sample_by_sample(condition: Condition, drop: list[bool]) -> None:
    mask = torch.tensor(drop)
    if condition.null is None:
        with pytest.raises(ValueError, match="no unconditional twin"):
            condition.dropout(mask)
        return
    dropped = condition.dropout(mask)
    for i, gone in enumerate(drop):
        expected = condition.null if gone else condition
        same(dropped[[i]].inputs, expected[[i]].inputs)
    same(dropped.null, condition.null)
    same(dropped.shared, condition.shared)


@given(conditions())
def test_saving_and_loading_is_the_identity(condition: Condition) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "condition.safetensors"
        condition.save(path)
        blank = condition._map(torch.zeros_like, torch.zeros_like)
        same(blank.load(path), condition)


@given(conditions())
def test_casting_touches_floating_point_only(condition: Condition) -> None:
    def check(before: Tensor, after: Tensor) -> None:
        assert after.dtype == (torch.float64 if before.is_floating_point() else before.dtype)
        assert torch.equal(after.to(before.dtype), before)

    cast = condition.to(dtype=torch.float64)
    map_tensors(check, condition.inputs, cast.inputs)
    map_tensors(check, condition.shared, cast.shared)
    same(condition.to("cpu"), condition)


class Network(nn.Module):
    """Linear in the sample and the condition, and not in the time; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls: list[tuple[int, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.layer(x) * torch.cos(t)[:, None] + label * torch.sin(t)[:, None]


def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    assert isinstance(network, Network)
    network.calls.append((len(xt), guidance))
    output: Tensor = network(xt, t, condition.inputs["label"])
    return output if guidance is None else output * guidance[:, None]


def denoiser(*, embeds_guidance: bool = False) -> Denoiser:
    return Denoiser(Network(), call, Flow(), "flow", embeds_guidance=embeds_guidance)


def labels(batch: int = 3, *, null: bool = True) -> Condition:
    twin = Condition({"label": torch.zeros(batch, 2)}) if null else None
    return Condition({"label": torch.randn(batch, 2)}, {}, twin)


def test_one_batched_guided_call_equals_two() -> None:
    student, condition, x, t = denoiser(), labels(), torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    yes, no = student(x, t, condition).output, student(x, t, condition.null).output
    student.network.calls.clear()
    guided = Guided(student, 7.5)(x, t, condition)
    assert [size for size, _ in student.network.calls] == [6]
    torch.testing.assert_close(guided.output, no + 7.5 * (yes - no))
    assert guided.kind == "flow"
    torch.testing.assert_close(guided.x0, x - t[:, None] * guided.output)


def test_each_sample_may_have_its_own_scale() -> None:
    student, condition, x, t = denoiser(), labels(), torch.randn(3, 2), torch.full((3,), 0.5)
    scales = torch.tensor([1.0, 2.0, 7.5])
    batched = Guided(student, scales)(x, t, condition).output
    told = Guided(student, 3.0)(x, t, condition, guidance=scales).output
    torch.testing.assert_close(batched, told)
    for i, scale in enumerate(scales.tolist()):
        alone = Guided(student, scale)(x[i : i + 1], t[i : i + 1], condition[[i]]).output
        torch.testing.assert_close(batched[i : i + 1], alone)


def test_scale_one_is_a_single_plain_call() -> None:
    student, condition, x, t = denoiser(), labels(), torch.randn(3, 2), torch.full((3,), 0.5)
    plain = student(x, t, condition).output
    student.network.calls.clear()
    torch.testing.assert_close(Guided(student, 1.0)(x, t, condition).output, plain, atol=0, rtol=0)
    assert [size for size, _ in student.network.calls] == [3]


def test_embedded_guidance_is_told_and_not_applied_twice() -> None:
    student, condition, x, t = denoiser(embeds_guidance=True), labels(), torch.randn(3, 2), torch.full((3,), 0.5)
    guided = Guided(student, 3.5)(x, t, condition)
    (size, scale), *others = student.network.calls
    assert size == 3
    assert not others
    assert scale is not None
    torch.testing.assert_close(scale, torch.full((3,), 3.5))
    torch.testing.assert_close(guided.output, 3.5 * student.network(x, t, condition.inputs["label"]))


def test_a_guided_denoiser_returns_the_conditional_features() -> None:
    student, condition, x, t = denoiser(), labels(), torch.randn(3, 2), torch.full((3,), 0.5)
    expected = student(x, t, condition, features=("layer",)).features
    features = Guided(student, 2.0)(x, t, condition, features=("layer",)).features
    assert expected is not None
    assert features is not None
    torch.testing.assert_close(features["layer"], expected["layer"])
    assert student(x, t, condition).features is None
    assert not student.network.layer._forward_hooks


def test_a_denoiser_owns_its_weights_or_its_adapter_alone() -> None:
    whole = denoiser()
    assert set(whole.state_dict()) == {"own.layer.weight", "own.layer.bias"}
    adapter = nn.Linear(1, 1)
    shared = Denoiser(Network(), call, Flow(), "flow", own=adapter)
    assert {id(p) for p in shared.parameters()} == {id(p) for p in adapter.parameters()}
    assert set(shared.state_dict()) == {"own.weight", "own.bias"}


class FlowOfGaussian:
    """The exact flow velocity for data N(mean, std^2)."""

    embeds_guidance = False
    process = Flow()

    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std

    def __call__(self, xt: Tensor, t: Tensor, condition: Condition, **unused: object) -> Prediction:
        alpha, sigma = self.process.coefficients(t, xt)
        variance = alpha**2 * self.std**2 + sigma**2
        x0 = self.mean + alpha * self.std**2 * (xt - alpha * self.mean) / variance
        eps = sigma * (xt - alpha * self.mean) / variance
        return Prediction(eps - x0, "flow", xt, t, self.process)


@given(st.floats(0.0, 1.0))
def test_a_flow_seen_as_trigflow_is_the_training_free_conversion(time: float) -> None:
    teacher, condition = FlowOfGaussian(0.7, 0.3), Condition({})
    t = torch.full((5,), time, dtype=torch.float64)
    theta, x = t * math.pi / 2, torch.randn(5, dtype=torch.float64)
    prediction = Retimed(teacher, Trig())(x, t, condition)
    # The conversion as SANA-Sprint writes it, at unit data scale.
    t_flow = theta.sin() / (theta.sin() + theta.cos())
    d = (t_flow**2 + (1 - t_flow) ** 2).sqrt()
    x_flow = x * d
    u = teacher(x_flow, t_flow, condition).output
    f = ((1 - 2 * t_flow) * x_flow + (1 - 2 * t_flow + 2 * t_flow**2) * u) / d
    torch.testing.assert_close(prediction.v, f, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(prediction.x0, theta.cos() * x - theta.sin() * f, atol=1e-7, rtol=1e-7)
    # And it is the posterior mean of the Gaussian under TrigFlow itself.
    variance = theta.cos() ** 2 * 0.09 + theta.sin() ** 2
    mean = 0.7 + theta.cos() * 0.09 * (x - theta.cos() * 0.7) / variance
    torch.testing.assert_close(prediction.x0, mean, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", sorted(PROCESSES))
@given(st.floats(0.01, 0.99))
def test_retiming_there_and_back_changes_nothing(name: str, time: float) -> None:
    teacher, condition = FlowOfGaussian(0.7, 0.3), Condition({})
    # Only levels that the process between has: a plain table stops short of pure noise.
    t, x = torch.full((5,), time * 0.9, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    back = Retimed(Retimed(teacher, PROCESSES[name]), Flow())(x, t, condition)
    torch.testing.assert_close(back.flow, teacher(x, t, condition).output, atol=1e-6, rtol=1e-6)


def test_retiming_is_accurate_in_single_precision_at_both_ends() -> None:
    teacher, condition, x = FlowOfGaussian(0.7, 0.3), Condition({}), torch.randn(64)
    for time in (0.0, 1e-4, 1e-2, 0.5, 0.99, 1.0):
        t = torch.full((64,), time)
        single = Retimed(teacher, Trig())(x, t, condition).v
        double = Retimed(teacher, Trig())(x.double(), t.double(), condition).v
        torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=1e-5)


def test_retiming_has_the_derivative_that_consistency_training_needs() -> None:
    teacher, condition, x = FlowOfGaussian(0.7, 0.3), Condition({}), torch.randn(5, dtype=torch.float64)
    t = torch.full((5,), 0.4, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: Retimed(teacher, Trig())(x, t, condition).v, (t,), (torch.ones_like(t),))
    near = [Retimed(teacher, Trig())(x, t + h, condition).v for h in (-1e-6, 1e-6)]
    torch.testing.assert_close(slope, (near[1] - near[0]) / 2e-6, atol=1e-6, rtol=1e-5)
