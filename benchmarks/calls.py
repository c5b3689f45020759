"""What an update asks of its networks, seen call by call, and what each such call costs by itself: the floor of an update.

Every call of a network (and of a discriminator's heads) within `Watch.watching` is noted with all that its cost depends on: the
shapes it is called with, whether it makes a graph, which weights are trained, which inputs need a gradient, whether a
derivative comes with the answer, in which precision, whether it ends at the layers that a discriminator looks at; and, when
the backward pass has been there, at which of its outputs. `Watch.alone` then makes each kind of call once more, outside
the update, without anything around it, and times it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.critics.heads import Heads
from fastgen.denoiser import Denoiser, map_tensors
from fastgen.tangents.forward import Duals
from fastgen.training import optimizers
from fastgen.training.loop import Trainer, Turn
from fastgen.training.sharding import reached

OUTPUT = "output"


@dataclass(frozen=True)
class Kind:
    """All that a call's cost depends on. `asked`: the features asked for; `reached`: the outputs that gradients came to."""

    network: int
    role: int
    mover: str
    shapes: tuple[Any, ...]
    graph: bool
    trained: bool
    into: bool
    derivative: bool
    inference: bool
    precision: str
    asked: tuple[str, ...]
    ended: bool
    reached: frozenset[str] = frozenset()

    @property
    def backward(self) -> str:
        """Where the backward pass goes, "" where there is none."""
        if not self.reached:
            return ""
        return " and ".join(["weights"] * self.trained + ["input"] * self.into)

    @property
    def partial(self) -> bool:
        """Whether the network is needed as far as the features only."""
        return self.ended or (bool(self.reached) and OUTPUT not in self.reached)

    def names(self) -> tuple[str, str]:
        """What its forward and its backward pass are called in records; the latter "" where there is none."""
        forward = "forward" + (" with derivative" if self.derivative else "") + (" with graph" if self.graph else "")
        end = ", to the features only" if self.partial else ""
        return forward + end, f"backward to {self.backward}{end}" if self.backward else ""


@dataclass
class Seen:
    """One call: its kind as far as it is known, and with what it was made."""

    kind: Kind
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    needed: set[int]
    tangents: dict[int, Tensor]
    denoiser: Denoiser | None
    reached: set[str] = field(default_factory=set)
    ended: bool = True

    @property
    def whole(self) -> Kind:
        return Kind(**{**vars(self.kind), "reached": frozenset(self.reached), "ended": self.ended})


class Ended(Exception):
    """Raised where a call that needs features only has them."""


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU time, or on a GPU of time once it has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Watch:
    """Watches the networks of a trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.device = trainer, trainer.device
        denoisers, _ = reached(trainer.method)
        heads = [part for turn in trainer.turns for part in turn.player.weights.modules() if isinstance(part, Heads)]
        modules: list[nn.Module] = [denoiser.network for denoiser in denoisers] + list(heads)
        self.networks = {id(module): module for module in modules}
        self.places = {identity: place for place, identity in enumerate(self.networks)}
        self.roles = {id(denoiser): place for place, denoiser in enumerate(denoisers)}
        self.seen: list[Seen] = []
        self.steps: Counter[str] = Counter()
        self.stack: list[tuple[Denoiser, tuple[str, ...], list[Seen]]] = []
        self.turn: Turn | None = None
        self.on = False
        self.known: dict[Kind, Seen] = {}
        self.hooks: list[Any] = []
        for module in self.networks.values():
            self.hooks.append(module.register_forward_pre_hook(self.begin, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self.end))

    def close(self) -> None:
        """Leave the networks alone."""
        for hook in self.hooks:
            hook.remove()

    # -- within an update -------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, calls are noted. What was noted before is forgotten."""
        self.seen, self.steps, self.on = [], Counter(), True
        run, thaw, step = Denoiser._run, Trainer.thaw, optimizers.step

        def called(
            denoiser: Denoiser, xt: Any, t: Any, condition: Any, guidance: Any, features: Sequence[str], *more: Any
        ) -> tuple[Any, dict[str, Tensor]]:
            calls: list[Seen] = []
            self.stack.append((denoiser, tuple(features), calls))
            try:
                output, found = run(denoiser, xt, t, condition, guidance, features, *more)
            finally:
                self.stack.pop()
            for name, feature in found.items():
                for call in calls:
                    note(feature, call.reached, name)
            return output, found

        def thawed(trainer: Trainer, mover: Turn | None) -> None:
            self.turn = mover
            thaw(trainer, mover)

        def stepped(*arguments: Any, **named: Any) -> Any:
            if self.turn is not None:
                self.steps[self.turn.player.name] += 1
            return step(*arguments, **named)

        with ExitStack() as stack:
            for place, name, other in ((Denoiser, "_run", called), (Trainer, "thaw", thawed), (optimizers, "step", stepped)):
                stack.enter_context(patch.object(place, name, other))
            try:
                yield
            finally:
                self.on = False

    def begin(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a call of a network."""
        if not self.on:
            return
        place = len(self.stack) - 1
        denoiser, asked = (self.stack[place][0], self.stack[place][1]) if self.stack else (None, ())
        if isinstance(module, Heads):
            denoiser, asked = None, ()
        tensors: list[Tensor] = []
        map_tensors(tensors.append, [list(arguments), named])
        tangents, needed = {}, set()
        for i, x in enumerate(tensors):
            tangent = forward_ad.unpack_dual(x).tangent if x.is_floating_point() and forward_ad._current_level >= 0 else None
            if tangent is not None:
                tangents[i] = tangent.detach()
            if x.requires_grad:
                needed.add(i)
        graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        trained = graph and any(weight.requires_grad for weight in module.parameters())
        mixed = torch.is_autocast_enabled(self.device.type)
        kind = Kind(
            network=self.places[id(module)],
            role=-1 if denoiser is None else self.roles[id(denoiser)],
            mover=self.turn.player.name if self.turn else "",
            shapes=tuple((tuple(x.shape), str(x.dtype)) for x in tensors),
            graph=graph and (trained or bool(needed)),
            trained=trained,
            into=graph and bool(needed),
            derivative=bool(tangents),
            inference=torch.is_inference_mode_enabled(),
            precision=str(torch.get_autocast_dtype(self.device.type)) if mixed else "",
            asked=asked,
            ended=False,
        )
        plain = [map_tensors(primal, nest) for nest in (list(arguments), named)]
        call = Seen(kind, tuple(plain[0]), plain[1], needed, tangents, denoiser)
        self.seen.append(call)
        if denoiser is not None:
            self.stack[place][2].append(call)

    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """After a call of a network; not reached by one that ends early."""
        if self.on:
            call = next(each for each in reversed(self.seen) if each.kind.network == self.places[id(module)] and each.ended)
            call.ended = False
            note(answer_of(output), call.reached, OUTPUT)

    def counts(self) -> Counter[Kind]:
        """How many calls of each kind there were; one of each is kept for `alone`."""
        found: Counter[Kind] = Counter()
        for call in self.seen:
            kind = call.whole
            found[kind] += 1
            self.known[kind] = call
        self.seen = []
        return found

    # -- alone ------------------------------------------------------------------------------------

    def alone(self, kind: Kind) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass of such a call, made by itself."""
        call, trainer = self.known[kind], self.trainer
        module = list(self.networks.values())[kind.network]
        trainer.thaw(next((turn for turn in trainer.turns if turn.player.name == kind.mover), None))
        active = call.denoiser.activate() if call.denoiser is not None else nullcontext()
        with active, ExitStack() as stack:
            features: dict[str, Tensor] = {}
            for name in kind.asked if kind.partial or kind.reached - {OUTPUT} else ():
                hook = keeps(features, name, len(kind.asked) if kind.partial else 0)
                stack.enter_context(removed(module.get_submodule(name).register_forward_hook(hook)))
            with modes(kind, self.device):
                arguments, named = again(call)
                start = clock(self.device)
                try:
                    output = answer_of(module(*arguments, **named))
                except Ended:
                    output = None
                middle = clock(self.device)
                if kind.derivative:
                    output = forward_ad.unpack_dual(output).primal
            ends = [features[name] if name != OUTPUT else output for name in kind.reached]
            slopes = [torch.randn_like(each) for each in ends]  # type: ignore[arg-type]
            begin = clock(self.device)
            if ends:
                torch.autograd.backward(ends, slopes)  # type: ignore[arg-type]
            finish = clock(self.device)
        trainer.thaw(None)
        return middle - start, finish - begin if ends else 0.0

    def step_alone(self, player: str) -> float:
        """Seconds of a player's optimiser by itself: torch's clipping, a step that changes nothing, gradients freed."""
        turn = next(turn for turn in self.trainer.turns if turn.player.name == player)
        optimizer = turn.optimizer
        for weight in turn.parts:
            if weight in optimizer.state:
                weight.grad = 1e-6 * torch.randn_like(weight)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                delattr(optimizer, name)
        start = clock(self.device)
        if turn.options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(turn.parts, turn.options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        spent = clock(self.device) - start
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return spent


def note(value: Any, into: set[str], name: str) -> None:
    """Add `name` to a set when a gradient comes to `value`."""
    if isinstance(value, Tensor) and value.requires_grad:
        value.register_hook(lambda gradient: into.add(name))  # type: ignore[no-untyped-call]


def answer_of(output: Any) -> Any:
    """The tensor that a network answers with."""
    return output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)


def primal(x: Tensor) -> Tensor:
    """A tensor without graph and without tangent."""
    return (forward_ad.unpack_dual(x).primal if forward_ad._current_level >= 0 and x.is_floating_point() else x).detach()


def again(call: Seen) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Fresh arguments of a call: leaves where gradients are needed, with tangents where it was made with some."""
    places = iter(range(10**6))

    def fresh(x: Tensor) -> Tensor:
        place, copy = next(places), x.clone()
        if place in call.needed:
            copy.requires_grad_()
        return forward_ad.make_dual(copy, call.tangents[place].clone()) if place in call.tangents else copy

    arguments, named = map_tensors(fresh, [list(call.arguments), call.named])
    return tuple(arguments), named


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def keeps(into: dict[str, Tensor], name: str, enough: int) -> Callable[..., None]:
    """A hook that keeps a layer's output, and ends the call once so many are kept; 0: it never does."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        into[name] = output[0] if isinstance(output, tuple) else output
        if len(into) == enough:
            raise Ended

    return hook


@contextmanager
def modes(kind: Kind, device: torch.device) -> Iterator[None]:
    """As a call of this kind is made: with a graph or without, in its precision, with derivatives."""
    graph: AbstractContextManager[Any] = torch.inference_mode() if kind.inference else torch.set_grad_enabled(kind.graph)
    precision = getattr(torch, kind.precision.removeprefix("torch."), None) if kind.precision else None
    mixed = torch.autocast(device.type, dtype=precision, enabled=precision is not None, cache_enabled=False)
    with graph, mixed:
        if kind.derivative:
            with forward_ad.dual_level(), Duals():
                yield
        else:
            yield
