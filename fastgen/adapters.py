"""Several LoRA roles on one resident base network (Hu et al. 2022, with peft's layers).

Which adapter is active is a plain attribute of peft's layers. It is set around every call, and `requires_grad` is never
touched: peft's own `set_adapter` toggles it, which loses gradients when two roles are called within one graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgen.errors import UserError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Init = Literal["default", "gaussian"]
"""How the first factor starts: uniformly as a linear layer's weights do, or normally. The second is zero at first."""


@dataclass(frozen=True)
class LoraOptions:
    """How roles are adapted. `alpha` None is the rank; `targets` None are the pipeline's default layers (suffixes of names).

    `dora` learns the magnitude of every adapted weight's columns beside (Liu et al. 2024, equation 5). `ranks` are those of
    single roles; such a role has the scale alpha / rank of the others.
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    init: Init = "default"
    dora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora rank must be at least 1, not {self.rank}")
        for role, rank in self.ranks.items():
            if rank < 1:
                raise UserError(f"lora rank of role {role!r} must be at least 1, not {rank}")
        if self.init not in get_args(Init):
            raise UserError(f"lora init must be one of {', '.join(get_args(Init))}, not {self.init!r}")

    def for_role(self, role: str) -> LoraOptions:
        """The options of one role; one without a rank of its own has the student's, whose weights it may have to take."""
        rank = self.ranks.get(role, self.ranks.get("student", self.rank))
        alpha = None if self.alpha is None else self.alpha * rank / self.rank
        return replace(self, rank=rank, alpha=alpha, ranks={})


class Adapter(nn.Module):
    """One role's LoRA weights, named after the layers they adapt ("...to_q.lora_A.weight"), and nothing of the base."""

    def __init__(self, host: AdapterHost, key: str, options: LoraOptions, layers: dict[str, LoraLayer]):
        super().__init__()
        self.host, self.key, self.options = host, key, options
        for name, layer in layers.items():
            place: nn.Module = self
            for part in name.split("."):
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module("lora_A", layer.lora_A[key])
            place.add_module("lora_B", layer.lora_B[key])
            if options.dora:
                place.add_module("lora_magnitude_vector", layer.lora_magnitude_vector[key])

    def activate(self) -> AbstractContextManager[None]:
        """Within, the base answers with this adapter on it."""
        return self.host.selected(self.key)


class AdapterHost:
    """The resident base. Between calls no adapter is active, so the base by itself is the teacher."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.active: str | None = None
        self._adapters = 0
        self._layers: list[LoraLayer] = []

    def add(self, role: str, options: LoraOptions, targets: Sequence[str]) -> Adapter:
        """A new adapter that changes nothing yet. Raises UserError when no layer's name ends in one of `targets`."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        key = f"{role}_{self._adapters}".replace(".", "_")
        self._adapters += 1
        options = options.for_role(role)
        alpha = options.rank if options.alpha is None else options.alpha
        init = True if options.init == "default" else options.init
        shape: dict[str, Any] = {"r": options.rank, "lora_alpha": alpha, "use_dora": options.dora, "init_lora_weights": init}
        config = LoraConfig(target_modules=list(targets), **shape)
        trained = {p for p in self.network.parameters() if p.requires_grad}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                inject_adapter_in_model(config, self.network, adapter_name=key)
        except ValueError as problem:
            name = type(self.network).__name__
            raise UserError(f"lora targets {', '.join(targets)} do not fit {name}: {problem}") from problem
        self._layers = [m for m in self.network.modules() if isinstance(m, LoraLayer)]
        layers = {name: m for name, m in self.network.named_modules() if isinstance(m, LoraLayer) and key in m.lora_A}
        adapter = Adapter(self, key, options, layers).float()
        # Injection turns gradients on and off all over the network.
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter in trained)
        adapter.requires_grad_(True)
        self._select(self.active)
        return adapter

    @contextmanager
    def selected(self, key: str | None) -> Iterator[None]:
        """Within, the adapter `key` is active (None: the bare base); afterwards, whatever was before."""
        before = self.active
        self._select(key)
        try:
            yield
        finally:
            self._select(before)

    def _select(self, key: str | None) -> None:
        self.active = key
        for layer in self._layers:
            layer._disable_adapters = key is None
            layer._active_adapter = [] if key is None else [key]

    def checkpoint(self, module: Callable[..., Any], *args: Any) -> Any:
        """Gradient checkpointing whose recomputation runs with the adapter of the forward pass, whichever is active by then."""
        key = self.active

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.selected(key)

        return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


def without_adapters(network: nn.Module) -> nn.Module:
    """`network` with every LoRA layer replaced, in place, by the layer it adapts.

    Raises UserError for a network that is quantised, whose own weights are not there to be trained or written.
    """
    if quantized := network.__dict__.get("quantized"):
        raise UserError(
            f"the base network is quantised to {quantized[0]}, and its weights can be neither trained nor written; "
            'load it with quantize = "none"'
        )
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            network.set_submodule(name, module.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        network.__dict__.pop(attribute, None)
    return network
