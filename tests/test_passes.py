"""Passes that are asked for features alone: they end behind the last layer, with the features and gradients of whole passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.adapters import LoraOptions
from fastgen.analytic import MASK
from fastgen.condition import Condition
from fastgen.critics import FeatureCritic, TransitionCritic
from fastgen.denoiser import Denoiser, Guided, Retimed, features_of
from fastgen.pipelines import Pipeline
from fastgen.process import Trig
from tests import tiny_models as tiny
from tests.method_fakes import TABLE, FakePipeline, Small
from tests.tiny_models import PROMPTS

MODELS = {"toy": tiny.toy, "sd3": tiny.sd3}
CLOSE = 1e-6


def wrap(name: str, mode: Any, **options: Any) -> Pipeline:
    return Pipeline.wrap(MODELS[name](), roles={"student": mode}, lora=LoraOptions(rank=3), **options)


def question(pipeline: Pipeline, count: int = 2) -> tuple[Tensor, Tensor, Condition]:
    xt = torch.randn(count, *pipeline.latent_shape, generator=torch.Generator().manual_seed(5))
    return xt, torch.linspace(0.4, 0.9, count), pipeline.encode_prompts((PROMPTS * count)[:count])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def gradient(denoiser: Denoiser, xt: Tensor, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the features' mean squares: by the samples, and by all weights that they depend on."""
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    loss = torch.stack([(x - 0.3).square().mean() for x in features.values()]).sum()
    found = torch.autograd.grad(loss, [xt, *weights], allow_unused=True)
    return found[0], torch.cat([each.flatten() for each in found[1:] if each is not None])


def saved_bytes(function: Any) -> int:
    """What a function keeps for the backward pass, each memory once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = function()
    del held
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_gradients_are_those_of_a_whole_pass(name: str, mode: str, checkpointing: bool) -> None:
    pipeline = wrap(name, mode, gradient_checkpointing=checkpointing)
    student = pipeline.trainable("student")
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    layers, ended = pipeline.feature_layers, []
    (xt, t, condition), last = question(pipeline), list(student.network.children())[-1]
    last.register_forward_hook(lambda *_: ended.append(1))
    xt.requires_grad_()
    whole = student(xt, t, condition, features=layers).features or {}
    by_whole, ended[:] = gradient(student, xt, whole), []
    part = features_of(student, xt, t, condition, layers)
    with torch.no_grad():  # Another call between a pass that was left and its backward pass.
        pipeline.frozen()(xt, t, condition)
    ended.clear()
    again = features_of(student, xt, t, condition, layers)
    assert not ended, "the pass did not end behind the last layer"
    assert list(part) == list(whole) and all(torch.equal(part[layer], whole[layer]) for layer in layers)
    assert all(torch.equal(again[layer], whole[layer]) for layer in layers)
    by_part = gradient(student, xt, part)
    assert relative(by_part[0], by_whole[0]) < CLOSE and relative(by_part[1], by_whole[1]) < CLOSE
    whole_pass = saved_bytes(lambda: student(xt, t, condition, features=layers).features)
    assert saved_bytes(lambda: features_of(student, xt, t, condition, layers)) < whole_pass
    # Nothing of the pass that was left stays: a plain pass is what it was.
    assert torch.equal(student(xt, t, condition, features=layers).features[layers[-1]], whole[layers[-1]])  # type: ignore[index]
    assert not any(module._forward_hooks for module in student.network.modules() if module is not last)


def test_wrappers_ask_for_the_same_and_guidance_costs_nothing() -> None:
    pipeline = wrap("toy", "full")
    teacher, layers, (xt, t, condition) = pipeline.frozen(), pipeline.feature_layers, question(pipeline)
    rows: list[int] = []
    pipeline.network.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for wrapped in (Guided(teacher, 3.0), Retimed(Guided(teacher, 1.0), Trig()), Guided(teacher, torch.tensor([2.0, 3.0]))):
        whole = wrapped(xt, t, condition, features=layers).features or {}
        rows.clear()
        part = features_of(wrapped, xt, t, condition, layers)
        assert rows == [2] and all(relative(part[layer], whole[layer]) < CLOSE for layer in layers)


def test_without_the_switch_and_before_a_whole_pass_all_is_computed() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    student, (xt, t, condition) = pipeline.trainable("student"), (torch.randn(2, 3, 4, 4), torch.full((2,), 0.5), None)
    condition, ended = pipeline.encode_prompts(["0", "1"]), []
    student.network.leave.register_forward_hook(lambda *_: ended.append(1))
    for expected in (1, 0):  # The first pass is whole, and tells how often layers are called.
        ended.clear()
        features_of(student, xt, t, condition, ("middle",))
        assert len(ended) == expected
    copied = copy.deepcopy(student)
    copied.partial = False
    ended.clear()
    features_of(student, xt, t, condition, ("middle",))
    before = len(ended)
    features_of(copied, xt, t, condition, ("middle",))
    assert (before, len(ended)) == (0, 1)


class Twice(Small):
    """Its middle layer is called twice in a pass."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        h = nn.functional.silu(self.enter(x))
        return self.leave(self.middle(nn.functional.silu(self.middle(h))))


def test_a_layer_that_is_called_twice_is_waited_for() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4), networks={"student": lambda: Twice((3, 4, 4))})
    student, xt, t = pipeline.trainable("student"), torch.randn(2, 3, 4, 4), torch.full((2,), 0.5)
    condition = pipeline.encode_prompts(["0", "1"])
    whole = student(xt, t, condition, features=("middle",)).features or {}
    assert torch.equal(features_of(student, xt, t, condition, ("middle",))["middle"], whole["middle"])


def test_samples_of_several_groups_come_back_in_their_order() -> None:
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    student, xt, t = pipeline.trainable("student"), torch.randn(3, 3, 4, 4), torch.tensor([0.2, 0.5, 0.8])
    condition = pipeline.encode_prompts(["0", "1", "0"])
    whole = student(xt, t, condition, features=("middle",)).features or {}
    parts = [lambda given, k=k: given.inputs[MASK][:, k].nonzero()[:, 0] for k in (1, 0)]
    student.groups = lambda given: [index for part in parts if len(index := part(given))]
    part = features_of(student, xt, t, condition, ("middle",))["middle"]
    assert relative(part, whole["middle"]) < CLOSE


def test_critics_let_the_network_stop() -> None:
    """Those of noised samples (LADD, PCM, SANA-Sprint) and of steps (Lightning)."""
    pipeline = FakePipeline(TABLE, (3, 4, 4))
    condition, ended = pipeline.encode_prompts(["0", "1"]), []
    sample, one = (torch.randn(2, 3, 4, 4), torch.full((2,), 0.5)), pipeline.encode_prompts([""])
    backbone = pipeline.trainable("critic")
    for network in (pipeline.base, backbone.network):
        network.leave.register_forward_hook(lambda *_: ended.append(1))
    features = FeatureCritic(Guided(pipeline.frozen(), 1.0), ("middle",), pipeline.latent_shape, one)
    steps = TransitionCritic(backbone, ("middle",), pipeline.latent_shape, one, paired=False)
    ended.clear()
    features(*sample, condition).sum().backward()
    steps([sample[0]], sample[1], condition)[0].sum().backward()
    assert not ended and all(weight.grad is not None for weight in steps.parameters())


# -- guidance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_guidance_as_two_calls_is_guidance_as_one(name: str) -> None:
    pipeline = wrap(name, "full")
    teacher, student = pipeline.frozen(), pipeline.trainable("student")
    (xt, t, condition), rows = question(pipeline), []
    for denoiser, scale in ((teacher, 3.0), (student, torch.tensor([2.0, 5.0]))):
        denoiser.network.register_forward_pre_hook(lambda module, args, named: rows.append(1), with_kwargs=True)
        rows.clear()
        together = Guided(denoiser, scale)(xt, t, condition, features=pipeline.feature_layers)
        denoiser.batched_guidance = False
        assert len(rows) == 1
        apart = Guided(denoiser, scale)(xt, t, condition, features=pipeline.feature_layers)
        assert len(rows) == 3 and relative(apart.output, together.output) < 1e-5 and relative(apart.x0, together.x0) < 1e-5
        for layer in pipeline.feature_layers:
            assert relative((apart.features or {})[layer], (together.features or {})[layer]) < 1e-5
        denoiser.batched_guidance = True
