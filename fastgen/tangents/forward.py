"""Forward mode at the cost of two forwards: own derivatives of the few operations in which a network spends its time.

torch's forward mode multiplies the tangent of a layer's weights although it is zero, which makes a third pass of every
convolution and linear layer, and it writes the derivative of a norm or of attention as a dozen operations on full tensors.
Here a layer's tangent is the layer's own kernel without its bias. The derivative of a norm (without weights) and of a
pointwise function is a symmetric matrix, so that its product with a tangent is what torch's backward kernel computes.
Everything else is torch's forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastgen.tangents.attention import attention

Rule = Callable[..., Any]
aten = torch.ops.aten


class Duals(TorchFunctionMode):
    """Within, under `torch.autograd.forward_ad.dual_level`, what has a rule here is differentiated by it.

    With gradients enabled the primal has its graph, as without forward mode, and the tangent has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            found = rule(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        if func in ATTENTIVE:  # Of torch's kernels for attention only the plain products have a forward derivative.
            with sdpa_kernel(SDPBackend.MATH):
                return ungraphed(func(*args, **kwargs))
        found = func(*args, **kwargs)
        return ungraphed(found) if torch.is_grad_enabled() else found


def ungraphed(found: Any) -> Any:
    """Outputs whose tangents, if any, have no graph."""
    if isinstance(found, (tuple, list)) and any(isinstance(each, Tensor) for each in found) and not hasattr(found, "_fields"):
        return type(found)(ungraphed(each) for each in found)
    if not isinstance(found, Tensor) or not found.requires_grad:
        return found
    primal, tangent = forward_ad.unpack_dual(found)
    if tangent is None or not tangent.requires_grad:
        return found
    return forward_ad.make_dual(primal, tangent.detach())


def parts(x: Any) -> tuple[Any, Tensor | None]:
    """A value and its tangent, None where it has none."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    return (x, None) if tangent is None else (primal, tangent)


def varies(*values: Any) -> bool:
    """Whether one of them has a tangent."""
    return any(parts(value)[1] is not None for value in values)


def layer(func: Rule, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """What is linear in its input but for a bias: linear layers and convolutions."""
    x, dx = parts(input)
    if dx is None or varies(weight, bias):
        return NotImplemented
    y = func(x, weight, bias, *args, **kwargs)
    with torch.no_grad():
        dy = func(dx, weight, None, *args, **kwargs)
    return forward_ad.make_dual(y, dy)


def product(func: Rule, a: Any, b: Any, **kwargs: Any) -> Any:
    """Products, of matrices or number by number, of which one factor may have no tangent."""
    (a, da), (b, db) = parts(a), parts(b)
    if kwargs or (da is None and db is None) or any(isinstance(each, Tensor) and each.is_complex() for each in (a, b)):
        return NotImplemented
    y = func(a, b)
    with torch.no_grad():
        terms = [func(*pair) for pair in ((da, b), (a, db)) if pair[0] is not None and pair[1] is not None]
        dy = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
    return forward_ad.make_dual(y, dy)


def quotient(func: Rule, a: Any, b: Any, **kwargs: Any) -> Any:
    """Division by what has no tangent: most often the number 1, by which diffusers' blocks scale what they return."""
    a, da = parts(a)
    if kwargs or da is None or varies(b):
        return NotImplemented
    y = func(a, b)
    with torch.no_grad():
        dy = func(da, b)
    return forward_ad.make_dual(y, dy)


def pointwise(backward: Callable[..., Tensor]) -> Rule:
    """A function of each number, by torch's `backward` of it (tangent, input, its other arguments)."""

    def rule(func: Rule, input: Any, inplace: bool = False, **kwargs: Any) -> Any:
        x, dx = parts(input)
        if dx is None or inplace:
            return NotImplemented
        y = func(x, **kwargs)
        # Above autograd torch takes silu's backward apart, so as to differentiate it once more.
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            dy = backward(dx.to(y.dtype), x.to(y.dtype), **kwargs)
        return forward_ad.make_dual(y, dy)

    return rule


def group_norm(func: Rule, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    x, dx = parts(input)
    if dx is None or varies(weight, bias):
        return NotImplemented
    count, channels = x.shape[:2]
    sizes = (count, channels, x.numel() // (count * channels), num_groups)
    if whole := keeps_precision(x):
        y, mean, rstd = torch.native_group_norm(x.contiguous(), weight, bias, *sizes, eps)
    else:
        y = func(x, num_groups, weight, bias, eps)
    with torch.no_grad():
        x, dx = computed_in(x, y), computed_in(dx, y)
        if not whole:
            _, mean, rstd = torch.native_group_norm(x, None, None, *sizes, eps)
        dy = aten.native_group_norm_backward(dx, x, mean, rstd, None, *sizes, [True, False, False])[0]
        if weight is not None:
            dy.mul_(weight.view(-1, *[1] * (x.ndim - 2)))
    return forward_ad.make_dual(y, dy.to(y.dtype))


def layer_norm(
    func: Rule, input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    x, dx = parts(input)
    if dx is None or varies(weight, bias):
        return NotImplemented
    shape = list(normalized_shape)
    if whole := keeps_precision(x):
        y, mean, rstd = torch.native_layer_norm(x.contiguous(), shape, weight, bias, eps)
    else:
        y = func(x, shape, weight, bias, eps)
    with torch.no_grad():
        x, dx = computed_in(x, y), computed_in(dx, y)
        if not whole:
            _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
        dy = aten.native_layer_norm_backward(dx, x, shape, mean, rstd, None, None, [True, False, False])[0]
        if weight is not None:
            dy.mul_(weight)
    return forward_ad.make_dual(y, dy.to(y.dtype))


def keeps_precision(x: Tensor) -> bool:
    """Whether a norm of `x` is computed in its own precision, so that the statistics of its kernel are those to use."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


def computed_in(x: Tensor, y: Tensor) -> Tensor:
    """`x` in the precision in which a norm whose output is `y` is computed, without gaps in memory."""
    return x.to(torch.float64 if y.dtype == torch.float64 else torch.float32).contiguous()


def scaled_dot_product_attention(
    func: Rule,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    (q, dq), (k, dk), (v, dv) = parts(query), parts(key), parts(value)
    if (dq is None and dk is None and dv is None) or varies(attn_mask) or dropout_p or q.ndim != 4:
        return NotImplemented
    options = {"mask": attn_mask, "causal": is_causal, "scale": scale, "shared_heads": enable_gqa}
    graph = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
    with torch.no_grad():
        y, dy = attention((q, dq), (k, dk), (v, dv), **options)  # type: ignore[arg-type]
    if graph:
        y = func(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return forward_ad.make_dual(y, dy.to(y.dtype))


RULES: dict[Any, Rule] = {
    F.linear: layer,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), layer),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), product),
    **dict.fromkeys((torch.mul, Tensor.mul), product),
    **dict.fromkeys((torch.div, Tensor.div), quotient),
    F.silu: pointwise(aten.silu_backward),
    F.gelu: pointwise(aten.gelu_backward),
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}
ATTENTIVE = frozenset({F.scaled_dot_product_attention, F.multi_head_attention_forward})
