"""Denoisers: networks in a role, mapping (x_t, t, condition) to a `Prediction`, and what wraps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.process import Kind, Prediction, Process

Nest = Any
"""Tensors in dictionaries, lists and tuples; other leaves are left alone."""


def map_tensors(function: Callable[..., Any], nest: Nest, *others: Nest) -> Nest:
    """Apply `function` to each tensor of `nest` (and its twins in `others`), keeping the structure."""
    if isinstance(nest, Tensor):
        return function(nest, *others)
    if isinstance(nest, Mapping):
        return {key: map_tensors(function, value, *(other[key] for other in others)) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_tensors(function, *values) for values in zip(nest, *others, strict=True))
    return nest


def pad_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, zeros at the end of every dimension but the first until all have one size."""
    sizes = {x.shape[1:] for x in tensors}
    if len(sizes) == 1:
        return list(tensors)
    if len({x.ndim for x in tensors}) > 1:
        raise ValueError(f"conditions of different structure cannot be joined: shapes {[tuple(x.shape) for x in tensors]}")
    longest = [max(size) for size in zip(*sizes, strict=True)]
    padding = [[n for size, to in zip(x.shape[:0:-1], longest[::-1], strict=True) for n in (0, to - size)] for x in tensors]
    return [nn.functional.pad(x, wanted) if any(wanted) else x for x, wanted in zip(tensors, padding, strict=True)]


@dataclass
class Condition:
    """What samples are conditioned on; only the pipeline that made it knows the keys.

    `inputs` is a nest of tensors with the batch first; `shared` holds what does not depend on the sample (position ids, flags).
    `null` is the unconditional twin, of the same structure, or None where the pipeline has none.

    Samples and twins may differ in length: where they are joined, the shorter are padded with zeros at the end. The pipeline
    keeps each sample's length among the inputs and takes the padding off again before its network is called.
    """

    inputs: dict[str, Nest]
    shared: dict[str, Nest] = field(default_factory=dict)
    null: Condition | None = None

    def __len__(self) -> int:
        sizes: list[int] = []
        map_tensors(lambda x: sizes.append(len(x)), self.inputs)
        return sizes[0] if sizes else 0

    def _map(self, function: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor] | None = None) -> Condition:
        null = self.null._map(function, shared) if self.null else None
        return Condition(map_tensors(function, self.inputs), map_tensors(shared or (lambda x: x), self.shared), null)

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Condition:
        """The samples at `index` (a slice, a list of positions, or an integer or boolean tensor)."""
        return self._map(lambda x: x[index])

    def repeat(self, times: int) -> Condition:
        """Each sample `times` times, in place (a, a, b, b)."""
        return self._map(lambda x: x.repeat_interleave(times, 0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move, and cast what is floating point."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        return self._map(move, move)

    def dropout(self, drop: Tensor) -> Condition:
        """The null condition where `drop` ([B], boolean) is true.

        Raises ValueError where there is no null condition.
        """
        if self.null is None:
            raise ValueError("this pipeline has no unconditional twin, so its conditions cannot be dropped")

        def choose(yes: Tensor, no: Tensor) -> Tensor:
            yes, no = pad_alike([yes, no])
            return torch.where(drop.view(-1, *[1] * (yes.ndim - 1)), no, yes)

        return Condition(map_tensors(choose, self.inputs, self.null.inputs), self.shared, self.null)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch from several of equal structure; `shared` is taken from the first."""
        first = conditions[0]
        inputs = map_tensors(lambda *parts: torch.cat(pad_alike(parts)), first.inputs, *(c.inputs for c in conditions[1:]))
        nulls = [c.null for c in conditions if c.null is not None]
        null = Condition.cat(nulls) if len(nulls) == len(conditions) else None
        return Condition(inputs, first.shared, null)

    def save(self, path: Path) -> None:
        """Write as safetensors; `load` reads it back."""
        flat: dict[str, Tensor] = {}
        _flatten({"inputs": self.inputs, "shared": self.shared}, "yes", flat)
        if self.null:
            _flatten({"inputs": self.null.inputs, "shared": self.null.shared}, "null", flat)
        save_file({key: value.contiguous().clone() for key, value in flat.items()}, path)

    def load(self, path: Path) -> Condition:
        """A condition of this one's structure with the tensors of `path`."""
        flat = load_file(path)

        def fill(condition: Condition, name: str) -> Condition:
            nest = _unflatten({"inputs": condition.inputs, "shared": condition.shared}, name, flat)
            return Condition(nest["inputs"], nest["shared"], fill(condition.null, "null") if condition.null else None)

        return fill(self, "yes")


def _flatten(nest: Nest, name: str, flat: dict[str, Tensor]) -> None:
    if isinstance(nest, Tensor):
        flat[name] = nest
    elif isinstance(nest, (Mapping, list, tuple)):
        items = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
        for key, value in items:
            _flatten(value, f"{name}/{key}", flat)


def _unflatten(nest: Nest, name: str, flat: Mapping[str, Tensor]) -> Nest:
    if isinstance(nest, Tensor):
        return flat[name]
    if isinstance(nest, Mapping):
        return {key: _unflatten(value, f"{name}/{key}", flat) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(_unflatten(value, f"{name}/{i}", flat) for i, value in enumerate(nest))
    return nest


class EndInput(nn.Module):
    """A second time as an input, for a network that has none: how far a call is to go, added to its embedding of the time.

    Waves of t - s through two layers, of which the second is zero at first, so that the network goes on as it did.
    """

    def __init__(self, place: str, width: int, waves: int = 16, fastest: float = 16.0):
        """`place` names the submodule that embeds the time, into `width` numbers; `fastest` is the quickest wave's rate.

        A quick wave has a steep derivative, which is noise in what a mean velocity learns from.
        """
        super().__init__()
        self.place = place
        rates = torch.exp(torch.linspace(0.0, math.log(fastest), waves))
        self.register_buffer("rates", rates, persistent=False)
        self.enter, self.leave = nn.Linear(2 * waves, width), nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    rates: Tensor

    def forward(self, span: Tensor) -> Tensor:
        """[B, width] of t - s [B], in the time from 0 to 1 of the network's own process."""
        phase = span.to(self.rates.dtype)[:, None] * self.rates
        hidden = self.enter(torch.cat([phase.sin(), phase.cos()], 1).to(self.enter.weight.dtype))
        embedding: Tensor = self.leave(nn.functional.silu(hidden))
        return embedding


class Predicts(Protocol):
    """Anything that can be asked for a prediction: a denoiser, a guided one, a re-timed one."""

    @property
    def process(self) -> Process: ...

    @property
    def embeds_guidance(self) -> bool: ...

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction: ...


Call = Callable[[nn.Module, Tensor, Tensor, Condition, Tensor | None], Tensor]
"""How a pipeline invokes its network: (network, x_t, t, condition, embedded guidance or None) -> output."""

Guide = Callable[[Tensor, Tensor, "float | Tensor"], Tensor]
"""How a pipeline guides: (conditional output, unconditional output, scale) -> output."""

Groups = Callable[[Condition], list[Tensor]]
"""Which samples of a batch may share a call of the network: their indices, group by group."""


def guide(yes: Tensor, no: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance in the diffusers convention, 1 = off."""
    return no + scale * (yes - no)


class Denoiser(nn.Module):
    """One network playing one role.

    With full weights the network is a submodule. With an adapter on a shared base, `own` holds just this role's adapter
    weights: the base stays out of `parameters()` and `state_dict()`, and `activate` selects the adapter around every call.
    Nobody who uses a denoiser needs to know which of the two it is.

    With an `end_input` the network is told, beside the time t, the time s at which its step ends; its weights are the role's.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        process: Process,
        kind: Kind,
        *,
        own: nn.Module | None = None,
        activate: Callable[[], AbstractContextManager[Any]] = nullcontext,
        embeds_guidance: bool = False,
        guide: Guide = guide,
        groups: Groups | None = None,
        end_input: EndInput | None = None,
    ):
        """`guide` is how `Guided` combines two of its outputs; `groups` splits a batch that the network cannot take at once."""
        super().__init__()
        self.own = network if own is None else own
        object.__setattr__(self, "network", network)  # Not registered: a shared base belongs to nobody.
        self.call, self.process, self.kind, self.activate = call, process, kind, activate
        self.embeds_guidance, self.guide, self.groups = embeds_guidance, guide, groups
        self.end_input = end_input

    network: nn.Module

    @property
    def takes_end(self) -> bool:
        """Whether it can be told where its step ends."""
        return self.end_input is not None

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """Predict at `xt` [B, C, ...] and times `t` [B].

        `guidance` [B] is the scale fed to a network that embeds it (diffusers convention, 1 = off). `features` names submodules
        of the network whose outputs are returned with the prediction. `end` [B], at most t, is where the step ends, for a
        network that is told; None is t itself, no step. Raises ValueError where the network has no such input.
        """
        if end is not None and self.end_input is None:
            raise ValueError("this denoiser has no input for the time at which a step ends")
        groups = self.groups(condition) if self.groups else []
        if len(groups) > 1:
            return self._in_groups(groups, xt, t, condition, guidance, features, end)
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.network.get_submodule(name).register_forward_hook(keep(name)) for name in features]
        if self.end_input is not None:
            added = self.end_input((torch.zeros_like(t) if end is None else t - end).expand(len(xt)))
            place = self.network.get_submodule(self.end_input.place)
            hooks.append(place.register_forward_hook(lambda module, args, output: output + added.to(output.dtype)))
        try:
            with self.activate():
                output = self.call(self.network, xt, t, condition, guidance)
        finally:
            for handle in hooks:
                handle.remove()
        return Prediction(output, self.kind, xt, t, self.process, seen or None)

    def _in_groups(
        self,
        groups: list[Tensor],
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None,
        features: Sequence[str],
        end: Tensor | None,
    ) -> Prediction:
        t = t.expand(len(xt)) if t.ndim <= 1 else t

        def part(i: Tensor) -> Prediction:
            told, stop = (None if value is None else value[i] for value in (guidance, end))
            prediction: Prediction = self(xt[i], t[i], condition[i], guidance=told, features=features, end=stop)
            return prediction

        parts = [part(i) for i in groups]
        back = torch.cat(groups).argsort()
        seen = {name: torch.cat(pad_alike([(part.features or {})[name] for part in parts]))[back] for name in features}
        return Prediction(torch.cat([part.output for part in parts])[back], self.kind, xt, t, self.process, seen or None)


class Guided:
    """Classifier-free guidance (Ho and Salimans 2022), usable wherever the bare denoiser is.

    `scale` is in the diffusers convention, u + scale (c - u), 1 = off; a number or one per sample [B]. A network that embeds
    its guidance is told the scale instead, in a single call. A denoiser whose pipeline does more, such as keeping the norm of
    the conditional output, says so in its `guide`.
    """

    def __init__(self, denoiser: Predicts, scale: float | Tensor):
        self.denoiser, self.scale = denoiser, scale

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def embeds_guidance(self) -> bool:
        return False

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        """As `Denoiser.forward`; `guidance` [B], where given, takes the place of `scale`."""
        scale = self.scale if guidance is None else guidance
        if self.denoiser.embeds_guidance:
            told = torch.as_tensor(scale, device=xt.device, dtype=torch.float32).expand(len(xt))
            return self.denoiser(xt, t, condition, guidance=told, features=features, end=end)
        if not isinstance(scale, Tensor) and scale == 1:
            return self.denoiser(xt, t, condition, features=features, end=end)
        if condition.null is None:
            raise UserError(f"guidance {scale} needs an unconditional twin, which this condition lacks; use a scale of 1")
        if isinstance(scale, Tensor):
            scale = scale.view(-1, *[1] * (xt.ndim - 1)).to(xt)
        t = t.expand(len(xt)) if t.ndim <= 1 else t
        both = Condition.cat([condition, condition.null])
        ends = None if end is None else torch.cat([end, end])
        double = self.denoiser(torch.cat([xt, xt]), torch.cat([t, t]), both, features=features, end=ends)
        yes, no = double.output.chunk(2)
        seen = {name: x.chunk(2)[0] for name, x in double.features.items()} if double.features else None
        combine: Guide = getattr(self.denoiser, "guide", guide)
        return Prediction(combine(yes, no, scale), double.kind, xt, t, double.process, seen)


class Retimed:
    """A denoiser seen through another noise process, matched by noise-to-signal ratio.

    Exact for the posterior mean: x_t / alpha(t) has the same distribution under both processes at equal ratio. With `Trig`
    over a flow network this is the training-free conversion of SANA-Sprint (Chen et al. 2025, 3.1), at unit data scale.
    """

    def __init__(self, denoiser: Predicts, process: Process):
        self.denoiser, self.process = denoiser, process

    @property
    def embeds_guidance(self) -> bool:
        return self.denoiser.embeds_guidance

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> Prediction:
        inner = self.denoiser.process

        def matched(time: Tensor) -> Tensor:
            return inner.time_at(self.process.ratio(time.double())).to(t.dtype)

        t_inner, end_inner = matched(t), None if end is None else matched(end)
        alpha, sigma = self.process.coefficients(t, xt)
        alpha_inner, sigma_inner = inner.coefficients(t_inner, xt)
        # Either ratio would do; each is safe where the other divides by zero.
        scale = torch.where(alpha > sigma, alpha_inner / alpha.clamp_min(1e-6), sigma_inner / sigma.clamp_min(1e-6))
        prediction = self.denoiser(xt * scale, t_inner, condition, guidance=guidance, features=features, end=end_inner)
        # As v, which determines x0 and eps well at both ends of the process.
        v = self.process.target("v", *prediction.solve(), t)
        return Prediction(v, "v", xt, t, self.process, prediction.features)
