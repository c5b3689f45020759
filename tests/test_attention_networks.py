"""Kernels set on real networks: what they ask for is seen, what is set is what computes, and a run keeps what it began with."""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from fastgen.attention.calls import made_up, watch
from fastgen.attention.kernels import KERNELS
from fastgen.attention.measure import errors
from fastgen.attention.processors import attend, kernel_of, kernel_set, serves, set_kernel, switchable
from fastgen.errors import UserError
from fastgen.eval import protocol
from fastgen.pipelines import Pipeline
from fastgen.pipelines.tiny.transformers import cogview4, qwen_image
from fastgen.tangents import plain_attention
from tests import tiny_models as tiny

CPU = torch.device("cpu")
NETWORKS = {"sd15": tiny.sd15, "sd3": tiny.sd3, "flux": tiny.flux, "qwen-image": qwen_image, "cogview4": cogview4}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    return {name: Pipeline.wrap(make()) for name, make in NETWORKS.items()}


def a_call(pipeline: Pipeline, count: int = 2) -> Any:
    """A call of the pipeline's base network on `count` samples, as a function."""
    condition = pipeline.encode_prompts(["a red cube", "a small blue ball left of a green cone"][:count])
    noise = torch.randn(count, *pipeline.latent_shape, generator=torch.Generator().manual_seed(1))
    times = pipeline.process.snap(torch.full((count,), 0.5))
    denoiser = pipeline.frozen()
    return lambda: denoiser(noise, times, condition).output


@pytest.fixture
def calls_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that the dispatcher is asked for, in order."""
    seen: list[str] = []
    dispatch = attention_dispatch.dispatch_attention_fn

    def listen(*args: Any, backend: Any = None, **named: Any) -> Any:
        seen.append(str(getattr(backend, "value", backend)))
        return dispatch(*args, backend=backend, **named)

    monkeypatch.setattr("fastgen.attention.processors.dispatch_attention_fn", listen)
    return seen


# -- watching ---------------------------------------------------------------------------------------


def test_the_calls_of_a_unet_are_seen(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["sd15"]
    found = watch(pipeline.network, a_call(pipeline))
    layers = [module for module in pipeline.network.modules() if hasattr(module, "to_q")]
    assert sum(each.count for each in found) == len(layers) > len(found)
    across = [each for each in found if each.key.shape[2] == tiny.LENGTH]
    along = [each for each in found if each.query.shape == each.key.shape]
    assert across and along and len(across) + len(along) == len(found)
    assert {len(each.query) for each in found} == {2} and {each.mask_kind for each in found} == {None}
    assert {each.dtype for each in found} == {"float32"}


def test_the_calls_of_a_transformer_are_seen_with_their_masks(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["qwen-image"]
    found = watch(pipeline.network, a_call(pipeline))
    assert {each.mask_kind for each in found} == {"keys"}, "prompts of two lengths"
    described = found[0].describe()
    assert json.loads(json.dumps(described)) == described
    assert described["mask"][0] == "keys" and described["mask"][1][-1] == found[0].key.shape[2]


def test_the_precision_is_the_one_that_autocast_gives(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["flux"]
    with torch.autocast("cpu", torch.bfloat16):
        found = watch(pipeline.network, a_call(pipeline))
    assert {each.dtype for each in found} == {"bfloat16"}
    assert found[0].key.dtype == found[0].value.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "kind"), [((2, 9), "keys"), ((2, 1, 1, 9), "keys"), ((2, 1, 6, 9), "pairs"), ((6, 9), "pairs")]
)
def test_kinds_of_masks(shape: tuple[int, ...], kind: str) -> None:
    call = made_up(2, 4, 6, 9, 8)
    assert replace(call, mask=torch.ones(shape, dtype=torch.bool)).mask_kind == kind
    assert replace(call, mask=torch.zeros(shape)).mask_kind == "added"


# -- setting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_computed_by_the_kernel_that_is_set(
    pipelines: dict[str, Pipeline], calls_seen: list[str], name: str
) -> None:
    pipeline = pipelines[name]
    call, network = a_call(pipeline), pipeline.network
    before, classes = call(), [type(each) for each in switchable(network)]
    count = sum(each.count for each in watch(network, call))
    calls_seen.clear()
    assert set_kernel(network, "native_math") == len(classes) > 0
    found = call()
    assert calls_seen == ["_native_math"] * count
    assert kernel_of(network) == "native_math"
    assert [type(each).__name__ for each in switchable(network)] == [each.__name__ for each in classes]
    assert (found - before).norm() < 1e-5 * before.norm()
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native", "of other networks nothing changes"
    set_kernel(network, "native")
    assert [type(each) for each in switchable(network)] == classes and kernel_of(network) == "native"
    assert torch.equal(call(), before)


def test_copies_have_the_kernel_and_go_their_own_way(pipelines: dict[str, Pipeline]) -> None:
    network = pipelines["sd15"].network
    with kernel_set(network, "native_math"):
        twin = copy.deepcopy(network)
        set_kernel(network, "native_flash")
        assert (kernel_of(twin), kernel_of(network)) == ("native_math", "native_flash")
        with plain_attention(twin):
            pass
        assert kernel_of(twin) == "native_math"
    assert (kernel_of(twin), kernel_of(network)) == ("native_math", "native")


@pytest.mark.parametrize("embeds", [False, True])
def test_students_have_the_kernel_also_where_they_are_rebuilt(pipelines: dict[str, Pipeline], embeds: bool) -> None:
    pipeline = pipelines["sd15"]
    with kernel_set(pipeline.network, "native_math"):
        student = pipeline.trainable("student", guidance_embedding=embeds)
    assert student.embeds_guidance == embeds and kernel_of(student.network) == "native_math"


def test_diffusers_own_switch_works_on_what_was_switched(pipelines: dict[str, Pipeline], calls_seen: list[str]) -> None:
    pipeline = pipelines["sd15"]
    with kernel_set(pipeline.network, "native_math"):
        pipeline.network.set_attention_backend("_native_flash")  # type: ignore[operator]
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        a_call(pipeline)()
    assert set(calls_seen) == {"_native_flash"}


def test_the_default_of_the_process_is_not_the_networks(
    pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as DIFFUSERS_ATTN_BACKEND sets it, which may be a kernel without a backward pass."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    network = copy.deepcopy(pipelines["flux"].network)
    set_kernel(network, "native")
    assert {each._attention_backend for each in switchable(network)} == {AttentionBackendName.NATIVE}


def test_a_network_whose_attention_is_written_into_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential is written into its layers.*native_math.*\"native\""):
        set_kernel(nn.Sequential(nn.Linear(2, 2)), "native_math")
    assert set_kernel(nn.Sequential(nn.Linear(2, 2)), "native") == 0


def test_a_kernel_that_is_not_installed_is_refused(pipelines: dict[str, Pipeline]) -> None:
    if not attention_dispatch._CAN_USE_SAGE_ATTN:
        with pytest.raises(UserError, match=r"the attention kernel 'sage' cannot be loaded: .*missing package"):
            set_kernel(pipelines["sd15"].network, "sage")
    assert kernel_of(pipelines["sd15"].network) == "native"


def test_a_compiled_network_has_the_kernel_too(pipelines: dict[str, Pipeline], calls_seen: list[str]) -> None:
    """By the name of its module, torch.compile would find torch's own product in a processor's code."""
    for name in ("sd15", "flux"):
        layers = [module for module in pipelines[name].network.modules() if hasattr(module, "to_q")]
        attention: Any = copy.deepcopy(layers[-1] if name == "flux" else layers[0])  # of image and text together
        set_kernel(attention, "native_math")
        x = torch.randn(1, 4, attention.to_q.in_features)
        calls_seen.clear()
        right = attention(x)
        compiled = torch.compile(attention, backend="eager")(x)
        torch.testing.assert_close(compiled, right)
        assert calls_seen == ["_native_math"] * 2, name


def test_the_gradient_of_a_transformer_is_the_same(pipelines: dict[str, Pipeline]) -> None:
    network = copy.deepcopy(pipelines["flux"].network).requires_grad_(True)
    found = {}
    for name in ("native", "native_math", "native_flash"):
        set_kernel(network, name)
        network.zero_grad()
        condition = pipelines["flux"].encode_prompts(["a red cube"])
        noise = torch.randn(1, *pipelines["flux"].latent_shape, generator=torch.Generator().manual_seed(0))
        pipelines["flux"].call(network, noise, torch.full((1,), 0.5), condition).square().sum().backward()
        found[name] = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])
    for name in ("native_math", "native_flash"):
        assert (found[name] - found["native"]).norm() < 1e-4 * found["native"].norm()


# -- what the dispatcher leaves undone ----------------------------------------------------------------


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A stand-in for xformers that computes attention as it does: [B, N, H, D], a mask as numbers whose rows are aligned."""
    masks: list[Any] = []

    def memory_efficient_attention(q: Any, k: Any, v: Any, bias: Any = None, p: float = 0.0, scale: Any = None) -> Any:
        if isinstance(bias, torch.Tensor):
            assert bias.dtype == q.dtype and bias.stride(-2) % 8 == 0 and bias.ndim == 4
        masks.append(bias)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, bias, p, scale=scale).transpose(1, 2)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_dispatch, "xops", ops)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    yield masks


@pytest.mark.parametrize("kind", ["none", "keys", "flat", "pairs", "added"])
def test_xformers_is_given_masks_as_it_takes_them(xformers: list[Any], kind: str) -> None:
    call = made_up(2, 4, 6, 9, 8)
    seen = torch.arange(9) < torch.tensor([[5], [8]])
    masks = {"none": None, "keys": seen[:, None, None], "flat": seen, "pairs": torch.rand(2, 4, 6, 9) > 0.4}
    call = replace(call, mask=masks.get(kind, torch.randn(2, 1, 1, 9)))
    found = errors(KERNELS["xformers"], [call], training=True)
    assert found.output < 1e-6 and found.gradient is not None and found.gradient < 1e-6
    assert xformers and (xformers[0] is None) == (kind == "none")


def test_the_dispatcher_alone_adds_true_and_false_to_the_scores(xformers: list[Any]) -> None:
    """The fault that `attend` is there for; should diffusers mend it, our conversion can go."""
    call = made_up(1, 2, 4, 8, 8)
    mask = (torch.arange(8) < 3)[None, None, None]
    q, k, v = (each.transpose(1, 2) for each in (call.query, call.key, call.value))
    backend = AttentionBackendName.XFORMERS
    right = F.scaled_dot_product_attention(call.query, call.key, call.value, mask).transpose(1, 2)
    torch.testing.assert_close(attend(backend, q, k, v, mask), right)
    wrong = attention_dispatch.dispatch_attention_fn(q, k, v, mask, backend=backend)
    assert (wrong - right).norm() > 0.1 * right.norm()


def test_xformers_computes_a_unet_and_its_gradient(pipelines: dict[str, Pipeline], xformers: list[Any]) -> None:
    pipeline = pipelines["sd15"]
    call = a_call(pipeline)
    before = call()
    with kernel_set(pipeline.network, "xformers"):
        torch.testing.assert_close(call(), before)
        assert xformers and protocol.attention(pipeline.diffusers) == "xformers"
    assert protocol.attention(pipeline.diffusers) == "native"


def test_a_foreign_kernel_computes_in_the_precision_of_autocast(pipelines: dict[str, Pipeline], xformers: list[Any]) -> None:
    """Normalised queries come in float32 under autocast, which torch's own kernels are brought out of by torch."""
    pipeline = pipelines["flux"]
    call = a_call(pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        before = call()
        with kernel_set(pipeline.network, "xformers"):
            found = call()
    assert xformers and (found - before).norm() < 0.02 * before.norm()


def test_what_a_kernel_does_not_take_is_left_to_torchs_own_choice(calls_seen: list[str]) -> None:
    """Calls in single precision by a kernel of half precision, and masks by one that takes none."""
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    expected = attend(AttentionBackendName.NATIVE, q, k, v)
    assert torch.equal(attend(AttentionBackendName.FLASH, q, k, v), expected)
    keys = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    masked = attend(AttentionBackendName.NATIVE, q, k, v, keys)
    assert torch.equal(attend(AttentionBackendName._NATIVE_FLASH, q, k, v, keys), masked)
    assert calls_seen == ["native"] * 4 and not torch.equal(masked, expected)
    torch.testing.assert_close(attend(AttentionBackendName._NATIVE_FLASH, q, k, v), expected, rtol=1e-4, atol=1e-5)
    assert calls_seen[-1] == "_native_flash"
    assert serves(AttentionBackendName.FLASH, torch.bfloat16, None, q, k)
    assert not serves(AttentionBackendName.FLASH, torch.bfloat16, keys, q, k)
    assert serves(AttentionBackendName.FLASH_VARLEN_HUB, torch.bfloat16, keys, q, k)


def test_masks_of_keys_serve_all_of_torchs_kernels() -> None:
    call = replace(made_up(1, 2, 4, 8, 8), mask=(torch.arange(8) < 3)[None])
    for name in ("native", "native_math"):
        assert errors(KERNELS[name], [call], training=False).output < 1e-6
