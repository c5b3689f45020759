"""Weights cut over the processes: torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277) for every role's network.

Methods and pipelines know nothing of it. Each network that a method's denoisers call is sharded once, its repeated blocks
first: teacher, student and fake score alike, and the one base of all adapters. Adapters, heads of discriminators and other
small parts stay whole in every process; their gradients are averaged as they are without sharding.

The optimiser moves this process's part of a weight, a plain tensor that shares the sharded weight's memory. That is exact for
an optimiser that treats every number for itself (AdamW), and no other is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastgen.config import TrainConfig
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.process import Prediction
from fastgen.training.attention import takes_derivatives
from fastgen.training.launch import processes

__all__ = ["Sharding", "cut", "gradient_norm", "hand_over", "joined", "local_part", "own_parts", "part_like", "whole"]

ELEMENTWISE = ("adamw",)
OTHERS = frozenset({"builtins", "diffusers", "numpy", "peft", "tokenizers", "torch", "transformers"})


class Sharding:
    """The sharded networks of a method; none where one process has all, or `train.sharding` is "none"."""

    def __init__(self, method: Method, options: TrainConfig, device: torch.device):
        """Shards the networks of a method that has been set up, in place, with the weights that each process has of them.

        Raises UserError for an optimiser or a network that cannot be cut.
        """
        self.networks: list[FSDPModule] = []
        if options.sharding == "none" or processes() == 1:
            return
        for name in {options.optimizer, *(options.of(player).optimizer for player in options.players)}:
            if name not in ELEMENTWISE:
                raise UserError(
                    f'train.sharding = "fsdp" needs an optimiser that treats every number for itself, "adamw", not "{name}"'
                )
        if options.precision not in ("fp32", "bf16"):
            raise UserError(f'train.sharding = "fsdp" goes with train.precision "fp32" or "bf16", not "{options.precision}"')
        denoisers, holders = reached(method)
        if any(denoiser.groups for denoiser in denoisers):
            raise UserError(
                'train.sharding = "fsdp" needs the same calls in all processes, and this network is called once for each '
                'length of prompt in a batch; set train.sharding = "none"'
            )
        policy = MixedPrecisionPolicy()
        if options.precision == "bf16" and not takes_derivatives(method):  # Those are taken of single precision.
            # Inputs stay as they are: times up to 1000 are no numbers of bf16, and autocast casts what it must.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (processes(),))
        for network in {id(each.network): each.network for each in denoisers}.values():
            inside = {id(module) for module in network.modules()}
            if any(holders[id(weight)] - inside for weight in network.parameters()):
                continue  # A module outside holds some of its weights, and would be left with what they were.
            adapters = [each.own for each in denoisers if each.network is network and each.own is not network]
            small = {weight for adapter in adapters for weight in adapter.parameters()}
            small |= {weight for weight in network.parameters() if weight.ndim == 0}
            if not any(weight.is_floating_point() for weight in set(network.parameters()) - small):
                continue
            try:
                for module in (*blocks(network), network):
                    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=small)
            except (AssertionError, RuntimeError, ValueError, NotImplementedError) as problem:
                kind = type(network).__name__
                raise UserError(f'{kind} cannot be cut over processes ({problem}); set train.sharding = "none"') from problem
            for module in network.modules():
                module.register_load_state_dict_pre_hook(cut_what_is_loaded)
            self.networks.append(network)  # type: ignore[arg-type]  # fully_shard has made it one
        for denoiser in denoisers:
            denoiser.register_forward_hook(open_for_features)

    def __bool__(self) -> bool:
        return bool(self.networks)

    def reshard(self) -> None:
        """Leave every process with its own parts alone. Due before weights are read, thawed or frozen.

        A network stays whole after a call without gradient, and then does not see what is set on its sharded weights: a player
        whose turn it is would learn nothing.
        """
        for network in self.networks:
            for module in network.modules():  # type: ignore[attr-defined]
                if isinstance(module, FSDPModule):
                    module.reshard()


def reached(method: Method) -> tuple[list[Denoiser], dict[int, set[int]]]:
    """The denoisers that a method can call, and for every weight (by id) the modules (by id) that hold it."""
    denoisers: list[Denoiser] = []
    holders: dict[int, set[int]] = {}
    seen: set[int] = set()
    waiting: list[Any] = [method]
    while waiting:
        this = waiting.pop()
        if id(this) in seen or isinstance(this, (str, Tensor, type, ModuleType)):
            continue
        seen.add(id(this))
        if isinstance(this, Mapping):
            waiting += this.values()
        elif isinstance(this, (list, tuple, set, frozenset)):
            waiting += this
        elif isinstance(this, nn.Module) or (type(this).__module__.split(".")[0] not in OTHERS and hasattr(this, "__dict__")):
            waiting += vars(this).values()
        if isinstance(this, nn.Module):
            for weight in this._parameters.values():
                if weight is not None:
                    holders.setdefault(id(weight), set()).add(id(this))
        if isinstance(this, Denoiser):
            denoisers.append(this)
    return denoisers, holders


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: the members of its outermost lists of modules that have weights."""
    found: list[nn.Module] = []

    def look(module: nn.Module, listed: bool) -> None:
        if isinstance(module, nn.ModuleList):
            for child in module:
                look(child, True)
        elif not listed:
            for child in module.children():
                look(child, False)
        elif any(True for _ in module.parameters()):
            found.append(module)

    look(network, False)
    return found


def open_for_features(denoiser: nn.Module, args: Any, prediction: Prediction) -> None:
    """Make a gradient that comes in through a feature open what the feature lies in, as one through the output does.

    FSDP gathers a block's weights for the backward pass when the gradient of the block's output arrives. That of a feature
    inside it may be the only one.
    """
    for name, feature in (prediction.features or {}).items():
        if feature.requires_grad:
            parts = name.split(".")
            for place in (".".join(parts[:i]) for i in range(len(parts) + 1)):
                module = denoiser.network.get_submodule(place)  # type: ignore[operator, union-attr]
                if isinstance(module, FSDPModule):
                    feature.register_hook(module._get_fsdp_state()._pre_backward)


def cut_what_is_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a sharded module load whole tensors: each process takes its part."""
    for name, weight in module._parameters.items():
        value = state.get(prefix + name)
        if isinstance(weight, DTensor) and value is not None and not isinstance(value, DTensor):
            state[prefix + name] = part_like(weight, value)


# -- weights and their parts ------------------------------------------------------------------------


def part_like(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, whole in every process, as `weight` is: cut over the processes, or as it is."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def whole(weight: Tensor) -> Tensor:
    """All of a tensor, detached. Of a sharded one every process has to ask at once."""
    return cast(DTensor, weight.detach()).full_tensor() if isinstance(weight, DTensor) else weight.detach()


def local_part(weight: Tensor) -> Tensor:
    """What this process has of a tensor, detached, in the same memory."""
    return cast(DTensor, weight.detach()).to_local() if isinstance(weight, DTensor) else weight.detach()


def own_parts(weights: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """What the optimiser moves: weights that are whole, and this process's parts of the sharded ones, in the same memory."""
    return [nn.Parameter(local_part(weight)) if isinstance(weight, DTensor) else weight for weight in weights]


def hand_over(weights: Sequence[nn.Parameter], parts: Sequence[nn.Parameter]) -> None:
    """Give the gradients of sharded weights, which FSDP has averaged, to the parts that the optimiser moves."""
    for weight, part in zip(weights, parts, strict=True):
        if weight is not part:
            part.grad = None if weight.grad is None else local_part(weight.grad)
            weight.grad = None


def joined(weights: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimiser's tensors, as `checkpoint.pack_optimizer` names them, those of parts as parts of a whole."""
    result = dict(tensors)
    for name, weight, tensor in of_weights(weights, tensors):
        if tensor.shape == local_part(weight).shape:
            shape, stride = weight.shape, weight.stride()
            where = weight.device_mesh, weight.placements
            result[name] = DTensor.from_local(tensor, *where, run_check=False, shape=shape, stride=stride)
    return result


def cut(weights: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `joined`, from what a checkpoint holds."""
    result = dict(tensors)
    for name, weight, tensor in of_weights(weights, tensors):
        if tensor.shape == weight.shape:
            result[name] = local_part(part_like(weight, tensor))
    return result


def of_weights(weights: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, DTensor, Tensor]]:
    """The tensors of an optimiser that belong to sharded weights: name, weight, tensor."""
    for name, tensor in tensors.items():
        weight = weights[int(name.split("/")[2])]
        if isinstance(weight, DTensor):
            yield name, weight, tensor


def gradient_norm(weights: Sequence[nn.Parameter], parts: Sequence[nn.Parameter]) -> Tensor:
    """The norm of a player's whole gradient, the same in every process, from its parts."""
    pairs = list(zip(weights, parts, strict=True))
    norm = torch.nn.utils.get_total_norm([part.grad for weight, part in pairs if weight is part and part.grad is not None])
    cut = [part.grad for weight, part in pairs if weight is not part and part.grad is not None]
    if not any(weight is not part for weight, part in pairs):
        return norm
    squares = torch.nn.utils.get_total_norm(cut).square().to(parts[0].device)
    dist.all_reduce(squares)
    return (squares + norm.to(squares) ** 2).sqrt()
