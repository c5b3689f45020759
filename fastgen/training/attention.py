"""The attention kernel of a run: chosen before its roles are made, whose networks are copies, and the same in every resume.

What was chosen stands in the run's environment.json. A resumed run takes it from there, whatever this machine would measure
now, so that it goes on with the rounding it began with.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fastgen.attention.calls import Call, watch
from fastgen.attention.choose import Choice, choose, facts, needs_watching
from fastgen.attention.kernels import FALLBACK, KERNELS, missing, unfit
from fastgen.attention.processors import other_default, set_kernel, switchable
from fastgen.config import RunConfig
from fastgen.data.encoding import encode_prompts
from fastgen.data.prompts import read_prompts
from fastgen.denoiser import Guided
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.pipelines import Pipeline
from fastgen.training.launch import processes, rank

ENVIRONMENT = "environment.json"
FORWARD_MODE = ("exact", "plain", "semi")
"""Ways of taking a derivative (`fastgen.tangents.Way`) that go through the network in forward mode."""
PROMPT = "a small red circle"
TIME, GUIDANCE = 0.5, 3.0


class Says(Protocol):
    def __call__(self, text: str, /) -> object: ...


def takes_derivatives(method: Method) -> bool:
    """Whether a method differentiates its network along trajectories, in any way, which its field `tangent` says."""
    return getattr(method, "tangent", None) is not None


def takes_forward_mode(method: Method) -> bool:
    """Whether a method takes derivatives in forward mode, which its field `tangent` says."""
    return getattr(method, "tangent", None) in FORWARD_MODE


def settle_attention(
    config: RunConfig,
    pipeline: Pipeline,
    start: Path | None,
    output: Path,
    device: torch.device,
    *,
    autocast: Any,
    say: Says,
) -> dict[str, Any]:
    """Give the pipeline's network the kernel that the run is to have, tell it in a line, and return it for environment.json.

    An earlier part of the run has left its own beside the checkpoint `start`, or in `output`. `autocast` makes a context of
    the run's precision. Raises UserError where the kernel that is asked for, or was begun with, cannot be had.
    """
    asked = config.speed.attention
    folders = [output] if start is None else [start.parent.parent, output]

    def decide() -> Choice:
        before = next((kernel for each in folders if (kernel := recorded(each / ENVIRONMENT, asked))), None)
        if before is None:
            return _choose(config, pipeline, device, autocast)
        needs = {"training": True, "forward_mode": takes_forward_mode(config.method), **facts((), device)}
        if reason := unfit(KERNELS[before], **needs) or missing(KERNELS[before], named=True):
            raise UserError(f'this run began with the attention kernel "{before}", but {reason}; set speed.attention anew')
        return Choice(before, asked, line=f"attention: {before}, as this run began")

    choice = alike(decide, device)
    if choice.kernel != FALLBACK or other_default():
        set_kernel(pipeline.network, choice.kernel)
    say(choice.line)
    return {"attention": choice.record()}


def recorded(path: Path, asked: str) -> str | None:
    """The kernel that an environment.json tells of a run that asked for the same; None where it tells none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["attention"]
        kernel = found["kernel"] if found["asked"] == asked else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kernel if kernel in KERNELS else None


def alike(make: Any, device: torch.device) -> Choice:
    """What `make` chooses in the first process, in all of them. Raises what it raises there."""
    if processes() == 1:
        made: Choice = make()
        return made
    names, problem, choice = list(KERNELS), None, Choice(FALLBACK, "auto")
    if rank() == 0:
        try:
            choice = make()
        except UserError as error:
            problem = error
    number = torch.tensor(-1 if problem else names.index(choice.kernel), device=device)
    dist.broadcast(number, 0)
    if problem is not None:
        raise problem
    if int(number) < 0:
        raise UserError("the first process cannot have the attention kernel that is asked for; it tells why")
    return choice if rank() == 0 else Choice(names[int(number)], choice.asked)


def _choose(config: RunConfig, pipeline: Pipeline, device: torch.device, autocast: Any) -> Choice:
    asked, cache = config.speed.attention, config.data.cache
    calls: list[Call] = []
    options: dict[str, Any] = {
        "training": True,
        "forward_mode": takes_forward_mode(config.method),
        "device": device,
        "cache": None if cache is None else Path(cache),
    }
    if asked != "auto":
        choose(asked, calls, **options)  # What is refused whatever the network calls is refused before it is called.
    if needs_watching(asked, device):
        calls = one_pass(config, pipeline, autocast)
        if not calls and asked == "auto":
            return Choice(FALLBACK, asked, line="attention: native; this network's is written into its layers")
    chosen = choose(asked, calls, **options)
    if calls and device.type == "cuda":  # The run's memory is what its updates need, not what kernels were tried with.
        calls.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return chosen


def one_pass(config: RunConfig, pipeline: Pipeline, autocast: Any) -> list[Call]:
    """The calls of attention in a pass of the network on the run's latents and prompts, and in a guided one.

    There the empty prompt is beside them, which is shorter: for two lengths a network may have a mask.
    """
    train = config.train
    size = train.batch // train.micro_batches if train.micro_batches else 1
    if not switchable(pipeline.network):
        return []
    condition = encode_prompts(pipeline, (some_prompts(config) * size)[:size]).to(pipeline.device)
    noise = torch.randn(size, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0)).to(pipeline.device)
    times = pipeline.process.snap(torch.full((size,), TIME, device=pipeline.device))
    teacher = pipeline.frozen()
    guided = config.speed.batched_guidance and condition.null is not None and not teacher.embeds_guidance

    def call() -> None:
        context: AbstractContextManager[Any] = autocast()
        with context:
            teacher(noise, times, condition)
            if guided:
                Guided(teacher, GUIDANCE)(noise, times, condition)

    return watch(pipeline.network, call)


def some_prompts(config: RunConfig) -> list[str]:
    """Prompts of the run that can be had without reading its data, else one."""
    if config.train.sample_prompts:
        return config.train.sample_prompts
    path = Path(config.data.prompts)
    return read_prompts(path) if path.suffix == ".txt" and path.is_file() else [PROMPT]
