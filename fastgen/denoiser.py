"""Denoisers: networks in a role, mapping (x_t, t, condition) to a `Prediction`, and what wraps them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgen.condition import Condition, EndInput, Nest, map_tensors, pad_alike
from fastgen.errors import UserError
from fastgen.process import Kind, Prediction, Process
from fastgen.taps import Taps

__all__ = [
    "Call",
    "Condition",
    "Denoiser",
    "EndInput",
    "Groups",
    "Guide",
    "Guided",
    "Nest",
    "Predicts",
    "Retimed",
    "features_of",
    "guide",
    "map_tensors",
    "pad_alike",
    "sharded",
]


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


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has cut a module's weights over the processes."""
    package = sys.modules.get("torch.distributed.fsdp")  # slow to import, and imported where anything is cut
    return package is not None and isinstance(module, package.FSDPModule)


def features_of(
    denoiser: Predicts, xt: Tensor, t: Tensor, condition: Condition, layers: Sequence[str], **more: Any
) -> dict[str, Tensor]:
    """What `layers` give, as a call of `denoiser` with `features=layers` returns it, where its prediction is not asked for.

    A network then stops after the last of them: what follows is neither computed nor kept for the backward pass, and of a
    guided one the unconditional half is left out. `more` is `guidance` and `end`, as in the call.
    """
    ask = getattr(denoiser, "only_features", None)
    if ask is None:
        return denoiser(xt, t, condition, features=layers, **more).features or {}
    found: dict[str, Tensor] = ask(xt, t, condition, features=layers, **more)
    return found


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
        partial: bool = True,
        batched_guidance: bool = True,
    ):
        """`guide` is how `Guided` combines two of its outputs; `groups` splits a batch that the network cannot take at once."""
        super().__init__()
        self.own = network if own is None else own
        object.__setattr__(self, "network", network)  # Not registered: a shared base belongs to nobody.
        self.call, self.process, self.kind, self.activate = call, process, kind, activate
        self.embeds_guidance, self.guide, self.groups = embeds_guidance, guide, groups
        self.end_input = end_input
        self.partial, self.batched_guidance = partial, batched_guidance
        self.layer_calls: dict[tuple[str, ...], int] = {}

    network: nn.Module
    partial: bool
    """Whether passes that are asked for features alone end behind the last of them."""
    batched_guidance: bool
    """Whether `Guided` calls it once, with a batch of twice the size, or twice."""

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
        groups = self.groups(condition) if self.groups else []
        if len(groups) < 2:
            output, seen = self._run(xt, t, condition, guidance, features, end)
            assert output is not None
            return Prediction(output, self.kind, xt, t, self.process, seen or None)
        parts: list[Prediction] = self._in_groups(self, groups, xt, t, condition, guidance, features, end)
        back, t = torch.cat(groups).argsort(), t.expand(len(xt)) if t.ndim <= 1 else t
        seen = _joined(features, [part.features or {} for part in parts], back)
        return Prediction(torch.cat([part.output for part in parts])[back], self.kind, xt, t, self.process, seen or None)

    def only_features(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The features of a call, without the rest of the pass (see `features_of`).

        How often their layers are called in a pass, so which call is the last, is seen in the first whole one. A sharded
        network makes whole passes: one that is left does not come to the end, where it gives back the weights it gathered.
        """
        groups = self.groups(condition) if self.groups else []
        if len(groups) > 1:
            parts = self._in_groups(self.only_features, groups, xt, t, condition, guidance, features, end)
            return _joined(features, parts, torch.cat(groups).argsort())
        stop = self.layer_calls.get(tuple(features), 0)
        if self.partial and stop and not sharded(self.network):
            return self._run(xt, t, condition, guidance, features, end, stop)[1]
        whole: Prediction = self(xt, t, condition, guidance=guidance, features=features, end=end)
        return whole.features or {}

    def _run(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None,
        features: Sequence[str],
        end: Tensor | None,
        stop: int = 0,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The network's output and the features; no output where it is left at the call `stop`, from 1, of their layers."""
        if end is not None and self.end_input is None:
            raise ValueError("this denoiser has no input for the time at which a step ends")
        place = added = output = None
        if self.end_input is not None:
            place = self.end_input.place
            added = self.end_input((torch.zeros_like(t) if end is None else t - end).expand(len(xt)))
        with Taps(self.network, features, stop, place=place, added=added) as taps:
            with self.activate():
                output = self.call(self.network, xt, t, condition, guidance)
            if features:
                self.layer_calls[tuple(features)] = taps.calls
        return output, taps.seen

    def _in_groups(
        self,
        ask: Callable[..., Any],
        groups: list[Tensor],
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None,
        features: Sequence[str],
        end: Tensor | None,
    ) -> list[Any]:
        t = t.expand(len(xt)) if t.ndim <= 1 else t

        def part(i: Tensor) -> Any:
            told, stop = (None if value is None else value[i] for value in (guidance, end))
            return ask(xt[i], t[i], condition[i], guidance=told, features=features, end=stop)

        return [part(i) for i in groups]


def _joined(layers: Sequence[str], parts: Sequence[dict[str, Tensor]], back: Tensor) -> dict[str, Tensor]:
    """The features of a whole batch from those of its groups; `back` [B] is where each sample is in these."""
    return {name: torch.cat(pad_alike([part[name] for part in parts]))[back] for name in layers}


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
            return self.denoiser(xt, t, condition, guidance=self._told(scale, xt), features=features, end=end)
        if not isinstance(scale, Tensor) and scale == 1:
            return self.denoiser(xt, t, condition, features=features, end=end)
        if condition.null is None:
            raise UserError(f"guidance {scale} needs an unconditional twin, which this condition lacks; use a scale of 1")
        if isinstance(scale, Tensor):
            scale = scale.view(-1, *[1] * (xt.ndim - 1)).to(xt)
        combine: Guide = getattr(self.denoiser, "guide", guide)
        if not getattr(self.denoiser, "batched_guidance", True):
            one = self.denoiser(xt, t, condition, features=features, end=end)
            other = self.denoiser(xt, t, condition.null, end=end)
            output = combine(one.output, other.output, scale)
            return Prediction(output, one.kind, xt, t, one.process, one.features)
        t = t.expand(len(xt)) if t.ndim <= 1 else t
        both = Condition.cat([condition, condition.null])
        ends = None if end is None else torch.cat([end, end])
        double = self.denoiser(torch.cat([xt, xt]), torch.cat([t, t]), both, features=features, end=ends)
        yes, no = double.output.chunk(2)
        seen = {name: x.chunk(2)[0] for name, x in double.features.items()} if double.features else None
        return Prediction(combine(yes, no, scale), double.kind, xt, t, double.process, seen)

    def only_features(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See `features_of`: those of the conditional half."""
        scale = self.scale if guidance is None else guidance
        told = self._told(scale, xt) if self.denoiser.embeds_guidance else None
        return features_of(self.denoiser, xt, t, condition, features, guidance=told, end=end)

    def _told(self, scale: float | Tensor, xt: Tensor) -> Tensor:
        return torch.as_tensor(scale, device=xt.device, dtype=torch.float32).expand(len(xt))


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
        shown, t_inner, end_inner = self._inner(xt, t, end)
        prediction = self.denoiser(shown, t_inner, condition, guidance=guidance, features=features, end=end_inner)
        # As v, which determines x0 and eps well at both ends of the process.
        v = self.process.target("v", *prediction.solve(), t)
        return Prediction(v, "v", xt, t, self.process, prediction.features)

    def only_features(
        self,
        xt: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        guidance: Tensor | None = None,
        features: Sequence[str] = (),
        end: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See `features_of`."""
        shown, t_inner, end_inner = self._inner(xt, t, end)
        return features_of(self.denoiser, shown, t_inner, condition, features, guidance=guidance, end=end_inner)

    def _inner(self, xt: Tensor, t: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the denoiser is shown of `xt` at `t`, at which of its own times, and where its step ends."""
        inner = self.denoiser.process

        def matched(time: Tensor) -> Tensor:
            return inner.time_at(self.process.ratio(time.double())).to(t.dtype)

        t_inner = matched(t)
        alpha, sigma = self.process.coefficients(t, xt)
        alpha_inner, sigma_inner = inner.coefficients(t_inner, xt)
        # Either ratio would do; each is safe where the other divides by zero.
        scale = torch.where(alpha > sigma, alpha_inner / alpha.clamp_min(1e-6), sigma_inner / sigma.clamp_min(1e-6))
        return xt * scale, t_inner, None if end is None else matched(end)
