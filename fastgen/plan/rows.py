"""The rows of a plan: what each role, and each component of the pipeline, keeps in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.pipelines.base import Pipeline
from fastgen.pipelines.quantization import QuantizedLinear, linear_layers
from fastgen.plan.record import Row
from fastgen.training.loop import Trainer

__all__ = ["Table", "adapter_sizes", "is_adapter", "largest_block", "reducible", "size_of"]

MOMENTS = 2


class Table:
    """The rows of a plan, made before the text encoders are freed; what roles keep changes with a method's stages."""

    def __init__(self, trainer: Trainer, roles: Sequence[tuple[str, Denoiser]], pipeline: Pipeline, offload: str):
        """`roles` are the denoisers that the method has asked for, by name."""
        self.trainer, self.roles = trainer, roles
        learnt = [role for _, role in roles] + [turn.player.weights for turn in trainer.turns]
        self.told = {id(weight) for module in learnt for weight in module.parameters()}
        self.frozen = tuple(self.components(pipeline, offload))

    def now(self) -> tuple[Row, ...]:
        """A row a role, one for what players learn beside (heads of discriminators), one for each frozen component."""
        self.told = set()
        return (*self.learnt(), *self.frozen)

    def learnt(self) -> Iterator[Row]:
        for name, role in self.roles:
            yield self.row(name, role)
        for turn in self.trainer.turns:
            rest = self.row(f"{turn.player.name}: heads", turn.player.weights)
            if rest.parameters:
                yield rest

    def components(self, pipeline: Pipeline, offload: str) -> Iterator[Row]:
        for name, component in pipeline.diffusers.components.items():
            if isinstance(component, nn.Module):
                if component is pipeline.network:
                    yield self.row(f"teacher ({name})", component)
                elif offload != "none":
                    yield replace(self.row(f"{name}, in the CPU's memory", component), weights=0)
                else:
                    yield self.row(f"{name}, freed before training" if name.startswith("text_encoder") else name, component)

    def row(self, name: str, module: nn.Module) -> Row:
        """What `module` holds that no row has told of yet."""
        moving = {id(weight) for turn in self.trainer.turns for weight in turn.weights}
        averaged = {id(weight) for weight in self.trainer.ema.weights.values()} if self.trainer.ema is not None else set()
        weights = list({id(w): w for w in module.parameters() if id(w) not in self.told}.values())
        self.told.update(map(id, weights))
        moved = [weight for weight in weights if id(weight) in moving]
        reduced = [each for each in module.modules() if isinstance(each, QuantizedLinear)]
        return Row(
            name,
            parameters=sum(w.numel() for w in weights) + sum(each.in_features * each.out_features for each in reduced),
            trainable=sum(weight.numel() for weight in moved),
            weights=size_of(weights) + sum(size_of(each.buffers()) for each in reduced),
            gradients=size_of(moved),
            optimizer=MOMENTS * size_of(moved),
            ema=sum(w.numel() * max(4, w.element_size()) for w in weights if id(w) in averaged),
        )


def adapter_sizes(pipeline: Pipeline) -> Iterable[int]:
    """The number of weights of an adapter of rank 1, layer by layer."""
    targets = pipeline.lora.targets or pipeline.lora_targets
    for name, layer in pipeline.network.named_modules():
        if ".lora_" in name or not name.removesuffix(".base_layer").endswith(tuple(f".{target}" for target in targets)):
            continue
        if isinstance(layer, nn.Linear):
            yield layer.in_features + layer.out_features
        elif isinstance(layer, nn.Conv2d):
            yield layer.weight[0].numel() + layer.out_channels


def reducible(network: nn.Module) -> Iterable[nn.Linear]:
    """The layers that `quantize` reduces, or has reduced."""
    done = [layer for layer in network.modules() if isinstance(layer, QuantizedLinear)]
    return done or [layer for name, layer in linear_layers(network) if ".lora_" not in name]


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_adapter(role: Denoiser) -> bool:
    return role.own is not role.network


def largest_block(module: nn.Module) -> int:
    """Bytes of the largest member of a network's lists of blocks; of all of it where there are none."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max((size_of(block.parameters()) for part in lists for block in part), default=size_of(module.parameters()))
