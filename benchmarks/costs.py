"""What an update of each method costs in network calls, counted on the toy teacher: fastgen/methods/costs.json.

    python -m benchmarks.costs

The options are those of configs/toy/NAME.toml. Counted are samples that go through any copy of the network, for one sample of
the student's batch and one update of the student, all other players' turns until then included, as a mean over updates from
the beginning of a run to its end: how many there are is drawn by chance in some methods, and changes with the stage in others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen import config, methods
from fastgen.errors import UserError
from fastgen.method import Batch, Method
from fastgen.pipelines import Pipeline
from fastgen.training.run import open_pipeline

ROOT = Path(__file__).parents[1]
COSTS = ROOT / "fastgen" / "methods" / "costs.json"
ROUNDS, SIZE, PROMPTS = 12, 2, ("a small red circle", "a large blue ring")


class Counter:
    """Samples that went through networks of one class, with and without a graph."""

    def __init__(self) -> None:
        self.trained = self.forward = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counter:
        """Copies of a network go on being counted here."""
        return self

    def watch(self, network: nn.Module) -> None:
        network.register_forward_hook(self.see, with_kwargs=True, always_call=True)

    def see(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        sample = next(each for each in (*arguments, *named.values()) if isinstance(each, Tensor) and each.ndim == 4)
        seen = len(sample)
        if output is None:  # It was left behind the last feature that was asked for, and counts as whole.
            learns = sample.requires_grad or any(weight.requires_grad for weight in module.parameters())
            self.trained += seen * (torch.is_grad_enabled() and learns)
            self.forward += seen * (not (torch.is_grad_enabled() and learns))
            return
        first = output[0] if isinstance(output, tuple) else output
        if torch.is_grad_enabled() and isinstance(first, Tensor) and first.requires_grad:
            self.trained += seen
            if forward_ad.unpack_dual(first).tangent is not None:
                self.forward += seen  # A derivative that comes with the answer costs what a call does.
        else:
            self.forward += seen


def watched(run: config.RunConfig) -> tuple[Pipeline, Counter, list[str]]:
    """The run's pipeline; what goes through its networks is counted, and the roles that are made of it are noted."""
    pipeline, counter, roles = open_pipeline(run, offline=True), Counter(), []
    frozen, trainable = pipeline.frozen, pipeline.trainable
    counter.watch(pipeline.network)

    def note_teacher() -> Any:
        roles.append("teacher")
        return frozen()

    def note_role(role: str, **options: Any) -> Any:
        denoiser = trainable(role, **options)
        roles.append(role)
        if denoiser.network is not pipeline.network and not any(each is counter for each in hooks(denoiser.network)):
            counter.watch(denoiser.network)
        return denoiser

    pipeline.frozen, pipeline.trainable = note_teacher, note_role  # type: ignore[method-assign]
    return pipeline, counter, roles


def hooks(network: nn.Module) -> list[Any]:
    """Whose hooks a network carries: a copy carries those of its original."""
    return [getattr(hook, "__self__", None) for hook in network._forward_hooks.values()]


def batch(pipeline: Pipeline) -> Batch:
    shape = (SIZE, *pipeline.latent_shape)
    latents, noise, target = torch.randn(3, *shape)
    return Batch(pipeline.encode_prompts(PROMPTS), shape, latents, noise, target, PROMPTS)


def student_every(method: Method) -> int:
    """In which updates the student of a method that has been set up moves: every so many."""
    own = {id(weight) for weight in method.trained.parameters()}
    return next(player.every for player in method.players() if own & {id(weight) for weight in player.weights.parameters()})


def cost(name: str) -> dict[str, Any]:
    """Calls of an update, roles, and the numbers of steps the student can be sampled in."""
    torch.manual_seed(0)
    run = config.load(ROOT / "configs" / "toy" / f"{name}.toml")
    pipeline, counter, roles = watched(run)
    method = run.method
    method.setup(pipeline)
    data = batch(pipeline)
    counter.trained = counter.forward = 0.0
    total = run.train.steps
    for place in range(ROUNDS):  # through all stages of those that have some
        method.advance(step := place * total // ROUNDS, total)
        for update in range(student_every(method)):
            if update:
                method.advance(step + update, total)
            for player in method.players():
                if (update + 1) % player.every == 0:
                    player.loss(data)
    method.advance(total - 1, total)
    return {
        "forward": round(counter.forward / ROUNDS / SIZE, 1),
        "trained": round(counter.trained / ROUNDS / SIZE, 1),
        "roles": list(dict.fromkeys(roles)),
        "steps": sampled(method),
    }


def sampled(method: Method) -> list[int]:
    """The numbers of steps, up to 8, that the method's sampler takes."""
    found = []
    for steps in range(1, 9):
        try:
            method.sampler(steps)
        except UserError:
            continue
        found.append(steps)
    return found


def main() -> None:
    costs = {name: cost(name) for name in methods.names() if (ROOT / "configs" / "toy" / f"{name}.toml").is_file()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in costs.items())
    COSTS.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    for name, value in costs.items():
        calls = f"{value['trained']:>5} with gradient, {value['forward']:>5} without"
        print(f"{name:<32} {calls}; {', '.join(value['roles'])}; {value['steps']}")


if __name__ == "__main__":
    main()
