"""Runs of several processes on one machine, and draws that make them equal to one process on the same joint batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen.adapters import AdapterHost, LoraOptions
from fastgen.analytic import MASK
from fastgen.config import TrainConfig
from fastgen.data.source import Source
from fastgen.denoiser import Condition, Denoiser
from fastgen.method import Method
from fastgen.methods import find
from fastgen.training import checkpoint
from fastgen.training.loop import Trainer
from fastgen.training.random_state import set_random_state
from tests.method_fakes import TABLE, call

SHAPE, WIDTH, LABELS, SAMPLES = (4,), 8, 2, 20


class JointDraws(TorchFunctionMode):
    """Every process draws for the joint batch and takes its own part, so that a sample gets what it would get in one process.

    That needs one state of torch's generator in all of them. Draws of another length than a process's batch are left alone:
    they are the same everywhere. So are those from a generator of their own.
    """

    def __init__(self, rank: int, processes: int, batch: int):
        super().__init__()
        assert batch > 1, "a batch of one cannot be told from a draw that is shared"
        self.rank, self.processes, self.batch, self.seen = rank, processes, batch, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is None:
            if func in (torch.randn_like, torch.rand_like) and args[0].ndim and len(args[0]) == self.batch:
                like = args[0].new_empty(self.joint(args[0].shape))
                return self.part(func(like, *args[1:], **kwargs))
            if func in (torch.rand, torch.randn, torch.randint):
                sizes = [value for value in args if not isinstance(value, (int, float))] or [args]
                size = kwargs.pop("size", sizes[-1])
                if len(size) and size[0] == self.batch:
                    limits = [value for value in args if isinstance(value, int)] if func is torch.randint else []
                    return self.part(func(*limits, self.joint(size), **kwargs))
                if size is not sizes[-1]:
                    kwargs["size"] = size
            if func is torch.multinomial:
                return self.choices(*args, **kwargs)
        return func(*args, **kwargs)

    def joint(self, size: Sequence[int]) -> tuple[int, ...]:
        return (size[0] * self.processes, *size[1:])

    def part(self, drawn: Tensor) -> Tensor:
        self.seen += 1
        return drawn[self.rank * self.batch : (self.rank + 1) * self.batch].contiguous()

    def choices(self, weights: Tensor, count: int, replacement: bool = False) -> Tensor:
        if weights.ndim == 1 and count == self.batch:
            return self.part(torch.multinomial(weights, count * self.processes, replacement))
        if weights.ndim == 2 and len(weights) == self.batch:
            everyone = [torch.empty_like(weights) for _ in range(self.processes)]
            dist.all_gather(everyone, weights.contiguous())
            return self.part(torch.multinomial(torch.cat(everyone), count, replacement))
        return torch.multinomial(weights, count, replacement)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.inner(self.norm(x)))


class Deep(nn.Module):
    """Repeated blocks between two layers; a sample is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.enter = nn.Linear(3 + LABELS, WIDTH), nn.Linear(SHAPE[0], WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.leave = nn.Linear(WIDTH, SHAPE[0])

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        known = torch.stack([t, (3 * t).sin(), (6 * t).cos()], 1)
        h = self.enter(x) + self.known(torch.cat([known, mask], 1).to(x))
        for block in self.blocks:
            h = block(h)
        return self.leave(h)


class DeepPipeline:
    """What methods ask of a pipeline, with networks in blocks; `lora`: every role is an adapter on one base.

    The feature that discriminators look at lies within a block, as it does in transformers.
    """

    feature_layers: tuple[str, ...] = ("blocks.1.norm",)
    device, process, kind, latent_shape = torch.device("cpu"), TABLE, "v", SHAPE
    default_guidance, embeds_guidance = 2.0, False

    def __init__(self, lora: bool = False):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.network = Deep().requires_grad_(False)
        self.host = AdapterHost(self.network) if lora else None

    def frozen(self) -> Denoiser:
        if self.host is None:
            return Denoiser(self.network, call, TABLE, "v")
        return Denoiser(self.network, call, TABLE, "v", own=nn.Module(), activate=lambda: self.host.selected(None))

    def trainable(self, role: str, *, guidance_embedding: bool = False, end_time: bool = False) -> Denoiser:
        if self.host is not None:
            adapter = self.host.add(role, LoraOptions(rank=2, init="gaussian"), ("inner", "enter", "leave"))
            return Denoiser(self.network, call, TABLE, "v", own=adapter, activate=adapter.activate)
        network = Deep()
        network.load_state_dict(self.network.state_dict())
        return Denoiser(network, call, TABLE, "v")

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        mask = torch.zeros(len(prompts), LABELS)
        for row, prompt in zip(mask, prompts, strict=True):
            row[[int(word) for word in prompt.split()] if prompt else slice(None)] = 1
        return Condition({MASK: mask}, null=Condition({MASK: torch.ones_like(mask)}))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.view(-1, 1, 2, 2).expand(-1, 3, 2, 2)


def source(pipeline: Any, **options: Any) -> Source:
    """Prompts, latents and pairs, as many as an epoch and a half of a short run."""
    generator = torch.Generator().manual_seed(3)
    latents, noise, target = (torch.randn(SAMPLES, *SHAPE, generator=generator) for _ in range(3))
    condition = pipeline.encode_prompts([str(i % LABELS) for i in range(SAMPLES)])
    return Source(condition, SHAPE, latents, pairs=Condition({"noise": noise, "target": target}), **options)


def build(name: str, method_options: Mapping[str, Any], lora: bool) -> tuple[Method, DeepPipeline]:
    """A method of the registry that has been set up; the same weights in every process."""
    torch.manual_seed(0)
    method, pipeline = find(name)(**method_options), DeepPipeline(lora)
    method.setup(pipeline)  # type: ignore[arg-type]
    return method, pipeline


def whole(weight: Tensor) -> Tensor:
    """A weight, or all of a sharded one: every process has to ask."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach().clone()


def train(
    name: str,
    method_options: Mapping[str, Any],
    lora: bool,
    options: TrainConfig,
    folder: Path,
    resume: Path | None = None,
) -> Trainer:
    """A run in this process, alone or one of several, on its part of the joint batch; returns the trainer.

    It goes on from the checkpoint `resume`, with the draws of the run that was left.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    method, pipeline = build(name, method_options, lora)
    data = source(pipeline, rank=rank, processes=processes)
    loop = Trainer(method, data, options, run_directory=folder, device="cpu")
    torch.manual_seed(5)
    if resume is not None:
        loop.load(resume)
        set_random_state(checkpoint.read(resume, "random-00000"), torch.device("cpu"))
    if processes == 1:
        loop.fit()
    else:
        with JointDraws(rank, processes, options.batch // options.micro_batches) as draws:
            loop.fit()
        assert draws.seen, "nothing was drawn jointly"
    return loop


def learnt(loop: Trainer) -> dict[str, Tensor]:
    """All weights of all players after a run, by the player's name; every process has to ask."""
    return {f"{turn.player.name}.{i}": whole(weight) for turn in loop.turns for i, weight in enumerate(turn.weights)}


# -- processes --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def enter(rank: int, processes: int, port: int, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        task(*arguments)
    finally:
        dist.destroy_process_group()


def together(processes: int, task: Callable[..., None], *arguments: Any) -> None:
    """Run `task` in so many processes over gloo; a failure in one is raised here."""
    mp.start_processes(enter, (processes, free_port(), task, arguments), nprocs=processes, start_method="fork")
