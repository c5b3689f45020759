"""A frozen network whose linear layers keep their weights in 8 or 4 bits, for adapters to be trained on (Dettmers et al. 2023).

"int8" has 256 evenly spaced levels in every block of 128 weights, "nf4" the 16 quantiles of a normal distribution in every
block of 64 (section 3), both times the block's largest magnitude, in float32: 8.25 and 4.5 bits a weight. Activations are not
quantised. The kernels are bitsandbytes'. Its layers are not used: its 8-bit one rounds activations to float16 and then to 8
bits, and its 4-bit one, in evaluation on a CPU with AVX512-BF16, repacks its weight in the first call without gradients, after
which calls with gradients fail - the teacher's call, then the student's. peft takes what is here for any linear layer.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastgen.errors import UserError

__all__ = ["Format", "QuantizedLinear", "check_formats", "quantization_of", "quantize_network", "weights_sha256"]

Format = Literal["int8", "nf4"]
BLOCK: dict[str, int] = {"int8": 128, "nf4": 64}
PER_BYTE: dict[str, int] = {"int8": 1, "nf4": 2}


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is `packed` and unpacked for every product; it has no weight that could be trained.

    `weight` [out, in] is unpacked when it is asked for.
    """

    packed: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, layer: nn.Linear, format: Format, device: torch.device | str):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = layer.in_features, layer.out_features, format
        self.dtype = layer.weight.dtype
        packed, scales, levels = pack(layer.weight.detach().to(device), format)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("levels", levels)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        size = self.in_features * self.out_features
        flat = unpack(self.packed, self.scales.float(), self.levels, self.format, dtype)
        return flat.reshape(-1)[:size].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        product: Tensor = Product.apply(input, self, False)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"


class Product(torch.autograd.Function):
    """x W^T, or x W where `transposed`, with the weight W of a layer that is unpacked for the product alone.

    For a plain product autograd would keep the unpacked weight until the backward pass; here it is unpacked again.
    """

    @staticmethod
    def forward(x: Tensor, layer: QuantizedLinear, transposed: bool) -> Tensor:
        weight = layer.unpacked(x.dtype)
        return x @ (weight if transposed else weight.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layer, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return Product.apply(gradients[0], ctx.layer, not ctx.transposed), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = Product.apply(tangents[0], ctx.layer, ctx.transposed)  # type: ignore[no-untyped-call]
        return tangent


def pack(weight: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as bytes, with the scale of every block and the values that a byte's parts stand for (times the scale)."""
    block = BLOCK[format]
    blocks = -(-weight.numel() // block)
    if isinstance(weight, FakeTensor):  # The sizes are all there is to it.
        bytes_ = weight.new_empty((blocks * block // PER_BYTE[format],), dtype=torch.uint8)
        return bytes_, weight.new_empty((blocks,), dtype=torch.float32), weight.new_empty((256,), dtype=torch.float32)
    functional = kernels(format)
    # A row a block: the CPU's kernel for 4 bits misreads rows that are no multiple of the block.
    rows = nn.functional.pad(weight.reshape(-1), (0, blocks * block - weight.numel())).view(blocks, block)
    if format == "nf4":
        packed, state = functional.quantize_4bit(rows, blocksize=block, quant_type="nf4")
    else:
        levels = functional.create_linear_map(True, 8).to(weight.device)
        packed, state = functional.quantize_blockwise(rows, code=levels, blocksize=block)
    return packed.reshape(-1), state.absmax.reshape(-1), state.code


def unpack(packed: Tensor, scales: Tensor, levels: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """The weight's blocks [blocks, block], of which `pack` made bytes, in `dtype`."""
    shape = (len(scales), BLOCK[format])
    if isinstance(packed, FakeTensor):
        return packed.new_empty(shape, dtype=dtype)
    functional = kernels(format)
    state = functional.QuantState(scales, torch.Size(shape), levels, shape[1], "nf4" if format == "nf4" else None, dtype)
    if format == "nf4":
        whole: Tensor = functional.dequantize_4bit(packed.view(-1, 1), state)
    else:
        whole = functional.dequantize_blockwise(packed.view(shape), state)
    return whole


def kernels(format: str) -> Any:
    """bitsandbytes' functions. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as problem:
        raise UserError(
            f"quantize = \"{format}\" needs bitsandbytes, which is not installed; pip install 'fastgen-diffusion[quantized]'"
        ) from problem


def check_formats(format: str) -> None:
    """Raise UserError for a format that is not known or whose kernels are not installed."""
    if format not in get_args(Format):
        raise UserError(f'quantize must be "none", "int8" or "nf4", not {format!r}')
    kernels(format)


def quantize_network(network: nn.Module, format: Format, device: torch.device | str) -> None:
    """Give the linear layers in a network's lists of blocks weights in `format`, on `device`, one by one and in place.

    What lies outside of them (embeddings of times and texts, first and last projections) stays as it is, convolutions too. The
    network keeps the digest of the weights that it had, which `weights_sha256` goes on answering with.
    """
    network.__dict__["quantized"] = (format, None if is_hollow(network) else weights_sha256(network))
    for name, layer in list(linear_layers(network)):
        network.set_submodule(name, QuantizedLinear(layer, format, device))


def linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside a network's lists of blocks."""
    lists = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in network.named_modules():
        if type(module) is nn.Linear and name.startswith(lists):
            yield name, module


def quantization_of(network: nn.Module) -> str | None:
    """The format in which a network's linear layers are; None for one that is as it was loaded."""
    found: tuple[str, str | None] | None = network.__dict__.get("quantized")
    return found and found[0]


def is_hollow(network: nn.Module) -> bool:
    return any(isinstance(weight, FakeTensor) or weight.is_meta for weight in network.parameters())


def weights_sha256(network: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a network's weights without its adapters, as they were before they were quantised.

    Over its state dictionary in the order of the names, each weight as a line "name dtype shape" in UTF-8 ("conv_in.weight
    torch.float32 4,3,3,3" and a line feed), then its bytes, little endian, row by row. So it stands for the weights in the
    precision in which they were loaded, LoRAs merged into them included.
    """
    known: tuple[str, str | None] | None = network.__dict__.get("quantized")
    if known and known[1]:
        return known[1]
    digest = hashlib.sha256()
    weights = {name.replace(".base_layer", ""): weight for name, weight in network.state_dict().items() if ".lora_" not in name}
    for name, weight in sorted(weights.items()):
        shape = ",".join(map(str, weight.shape))
        digest.update(f"{name} {weight.dtype} {shape}\n".encode())
        digest.update(memoryview(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
