"""Our own rules of forward mode give what torch's forward mode gives, operation by operation and in updates of the methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.denoiser import Condition, Denoiser
from fastgen.methods.mean_flow import MeanFlow
from fastgen.methods.rcm import RCM
from fastgen.methods.sana_sprint import SanaSprint
from fastgen.methods.scm import SCM
from fastgen.process import Flow
from fastgen.tangents import Duals, answer_and_derivative, derivative
from fastgen.tangents import attention as tangents_of_attention
from tests.method_fakes import PROCESSES, FakePipeline, batches

MASKS: dict[str, Callable[[], Tensor] | None] = {
    "none": None,
    "of keys": lambda: torch.arange(7) < torch.tensor([[7], [4]])[:, :, None, None],
    "of all, one row sees nothing": lambda: (torch.arange(5)[:, None] + torch.arange(7) > 2) & (torch.arange(5) != 4)[:, None],
    "added": lambda: torch.randn(2, 1, 5, 7),
}


def both(function: Callable[..., Tensor], x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative by our rules."""
    with forward_ad.dual_level(), Duals():
        value, change = forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx)))
    assert change is not None and not change.requires_grad
    return value, change


OPERATIONS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (2, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1, bias=False), (2, 2, 3, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 5)),
    "group norm of tokens": (lambda: nn.GroupNorm(3, 6, affine=False), (2, 6, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 4, 6)),
    "layer norm of two": (lambda: nn.LayerNorm((4, 6), elementwise_affine=False), (2, 4, 6)),
    "root mean square": (lambda: nn.RMSNorm(6), (2, 4, 6)),
    "silu": (nn.SiLU, (2, 6)),
    "silu in place": (lambda: lambda x: F.silu(x + 0, inplace=True), (2, 6)),
    "gelu": (nn.GELU, (2, 6)),
    "gelu, tanh": (lambda: nn.GELU(approximate="tanh"), (2, 6)),
    "product with itself": (lambda: lambda x: x @ x.mT, (2, 4, 6)),
    "product with a constant": (lambda: lambda x: torch.bmm(torch.ones(2, 3, 4, dtype=x.dtype), x), (2, 4, 6)),
    "product of numbers": (lambda: lambda x: torch.mul(x, x.square().sum(-1, keepdim=True)) * 3, (2, 4, 6)),
    "product of numbers with a constant": (lambda: lambda x: 2 * x * torch.arange(6, dtype=x.dtype), (2, 4, 6)),
    "product of complex numbers": (lambda: lambda x: torch.view_as_real(torch.view_as_complex(x) * x[..., 0]), (2, 4, 2)),
    "quotient by a constant": (lambda: lambda x: x / 3 / torch.arange(1, 7, dtype=x.dtype), (2, 4, 6)),
    "quotient": (lambda: lambda x: torch.div(2, x.square() + 1) + x / (x.square() + 1), (2, 4, 6)),
    "no rule": (lambda: lambda x: torch.einsum("bij,bkj->bik", x, x).cumsum(1).softmax(-1).chunk(2, 1)[1], (2, 4, 6)),
    "in place": (lambda: lambda x: (x * x).add_(x).mul_(2), (2, 6)),
    "multi-head": (lambda: functools.partial(itself, nn.MultiheadAttention(6, 2, batch_first=True).double()), (2, 4, 6)),
}


def itself(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    found: Tensor = attention(x, x, x, need_weights=False)[0]
    return found


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation(name: str) -> None:
    """Value, derivative, and the gradient of the value, with gradients enabled and without."""
    torch.manual_seed(0)
    build, shape = OPERATIONS[name]
    function = build()
    if isinstance(function, nn.Module):
        function.double()
        for weight in function.parameters():
            nn.init.normal_(weight)
    x, dx = torch.randn(shape).double(), torch.randn(shape).double()
    with sdpa_kernel(SDPBackend.MATH):
        value, change = torch.func.jvp(function, (x,), (dx,))
    with torch.no_grad():
        torch.testing.assert_close(both(function, x, dx), (value, change), rtol=1e-9, atol=1e-9)
    trained = x.clone().requires_grad_()
    found = both(function, trained, dx)
    torch.testing.assert_close(found, (value, change), rtol=1e-9, atol=1e-9)
    fresh = x.clone().requires_grad_()
    weights = list(function.parameters()) if isinstance(function, nn.Module) else []
    down = torch.randn(value.shape, dtype=torch.float64)
    ours = torch.autograd.grad((found[0] * down).sum(), [trained, *weights])
    theirs = torch.autograd.grad((function(fresh) * down).sum(), [fresh, *weights])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "conv2d", "group norm", "layer norm", "silu", "gelu", "product with itself"])
@pytest.mark.parametrize("mixed", [True, False])
def test_half_precision(name: str, mixed: bool) -> None:
    """In bfloat16, throughout or by autocast, within its rounding; kinds of numbers are the operation's own."""
    torch.manual_seed(0)
    build, shape = OPERATIONS[name]
    function = build()
    x, dx = torch.randn(shape), torch.randn(shape)
    exact = torch.func.jvp(function, (x,), (dx,))[1].detach()
    if not mixed:
        function = function.to(torch.bfloat16) if isinstance(function, nn.Module) else function
        x, dx = x.bfloat16(), dx.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        plain, (value, change) = function(x), both(function, x, dx)
    assert torch.equal(value, plain) and change.dtype == plain.dtype
    assert float((change.float() - exact).abs().max() / exact.abs().max()) < 0.03


@pytest.mark.parametrize("piece", [1 << 18, 16, 1])
@pytest.mark.parametrize("varying", ["qkv", "q", "kv", "v"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_attention(mask: str, varying: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any pieces, masks and constants, shared heads among them."""
    monkeypatch.setitem(tangents_of_attention.PIECE, "cpu", piece)
    torch.manual_seed(0)
    shapes = {"q": (2, 4, 5, 3), "k": (2, 2, 7, 3), "v": (2, 2, 7, 6)}
    places = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    along = tuple(torch.randn_like(places[name]) for name in varying)
    build = MASKS[mask]
    chosen = None if build is None else build()
    chosen = chosen.double() if chosen is not None and chosen.dtype != torch.bool else chosen

    def attend(*moved: Tensor) -> Tensor:
        q, k, v = {**places, **dict(zip(varying, moved, strict=True))}.values()
        return F.scaled_dot_product_attention(q, k, v, chosen, scale=0.7, enable_gqa=True)

    at = tuple(places[name] for name in varying)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(attend, at, along)
    for graph in (False, True):
        with torch.set_grad_enabled(graph), forward_ad.dual_level(), Duals():
            moved = [forward_ad.make_dual(x.clone().requires_grad_(graph), dx) for x, dx in zip(at, along, strict=True)]
            value, change = forward_ad.unpack_dual(attend(*moved))
        assert value.requires_grad == graph and change is not None and not change.requires_grad
        torch.testing.assert_close((value.detach(), change), expected, rtol=1e-9, atol=1e-9)


def test_causal_attention_and_dropout() -> None:
    """With dropout it is torch's own forward mode, under whose seed both are the same."""
    torch.manual_seed(0)
    x, dx = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    for options in ({"is_causal": True}, {"dropout_p": 0.5}):
        attend = functools.partial(F.scaled_dot_product_attention, **options)  # type: ignore[arg-type]
        torch.manual_seed(1)
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.func.jvp(lambda x: attend(x, x, x), (x,), (dx,))  # noqa: B023
        torch.manual_seed(1)
        torch.testing.assert_close(both(lambda x: attend(x, x, x), x, dx), expected, rtol=1e-9, atol=1e-9)  # noqa: B023


class Layered(nn.Module):
    """Two convolutions with a norm and dropout between; it counts its calls and the samples in them."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(drop)
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.second(self.dropout(F.silu(self.norm(self.first(x) * (1 + t.view(-1, 1, 1, 1))))))


def layered(drop: float = 0.0) -> tuple[Layered, Denoiser, Callable[[Any], Callable[[Tensor, Tensor], Tensor]]]:
    torch.manual_seed(0)
    network = Layered(drop)
    denoiser = Denoiser(network, lambda network, x, t, condition, guidance: network(x, t), Flow(), "flow")
    return network, denoiser, lambda index: lambda x, t: denoiser(x, t, Condition({})).flow


@pytest.mark.parametrize(
    ("drop", "mixed", "calls"), [(0.0, False, [4]), (0.5, False, [4, 4]), (0.0, True, [4, 4])], ids=["one", "dropout", "mixed"]
)
def test_one_pass_where_both_are_the_same(drop: float, mixed: bool, calls: list[int]) -> None:
    network, denoiser, of = layered(drop)
    x, dx, t = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.rand(4)
    expected = derivative(of(None), denoiser, x, t, dx, way="plain")
    network.seen.clear()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        value, change = answer_and_derivative(of, denoiser, x, t, dx)
        torch.manual_seed(7)
        plain = of(None)(x, t)
    assert network.seen[:-1] == calls and torch.equal(value, plain) and value.requires_grad and not change.requires_grad
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("needed", "one_pass", "calls"),
    [
        ([True, False, True, True], True, [4]),
        ([True, False, True, False], True, [4, 2]),
        ([True, False, True, True], False, [4, 3]),
        ([True] * 4, True, [4]),
        ([False] * 4, True, [4]),
    ],
)
def test_only_where_it_is_needed(needed: list[bool], one_pass: bool, calls: list[int]) -> None:
    """A few samples have a pass of their own in forward mode; answers and their gradients are those of one batch."""
    network, denoiser, of = layered()
    x, dx, t, where = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.rand(4), torch.tensor(needed)
    value, change = answer_and_derivative(of, denoiser, x, t, dx, where=where, one_pass=one_pass)
    assert network.seen == calls
    plain, everywhere = answer_and_derivative(of, denoiser, x, t, dx, way="plain", where=where)
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change[where], everywhere[where], rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(network.parameters())) for y in (value, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("off", [{"tangent": "plain"}, {"one_pass": False}], ids=["plain", "two passes"])
@pytest.mark.parametrize("kind", [SCM, RCM, SanaSprint, MeanFlow])
@pytest.mark.parametrize("process", ["flow", "vp"])
def test_an_update_is_the_same(process: str, kind: Any, off: dict[str, Any]) -> None:
    """Losses and gradients of the student to 1e-5, with our rules in one pass and without either."""
    found = []
    for options in ({}, off):
        torch.manual_seed(0)
        pipeline = FakePipeline(PROCESSES[process], (3, 4, 4), "flow" if process == "flow" else "v")
        method = kind(guidance=1.0, **({} if kind is MeanFlow else {"warmup": 0}), **options)
        method.setup(pipeline)
        with torch.no_grad():
            for weight in method.student.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        torch.manual_seed(1)
        loss = sum(method.loss(next(batches(pipeline, 8))).values())
        gradients = torch.autograd.grad(loss, list(method.student.parameters()), allow_unused=True)
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (one, ours), (other, theirs) = found
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5 and theirs.abs().max() > 0
