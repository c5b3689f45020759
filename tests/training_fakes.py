"""A pipeline of a linear network on a flow process, and a method of two players, small enough to train in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.data.source import Source, encode_prompts
from fastgen.denoiser import Condition, Denoiser
from fastgen.method import Batch, Loss, Method, Player
from fastgen.process import Flow
from fastgen.samplers import FewStep, Sampler, even_times

WIDTH, SHAPE = 5, (4, 2, 2)
PROMPTS = [f"a scene with {i} things" for i in range(11)]


class Linear(nn.Module):
    """Flow velocity from a latent, a time and a condition; with `rank`, an adapter of its own on a shared base."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16 + 1 + WIDTH, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Adapted(nn.Module):
    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapter = base, nn.Sequential(nn.Linear(16 + 1 + WIDTH, 2, bias=False), nn.Linear(2, 16, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    return network(torch.cat([xt.flatten(1), t.view(-1, 1).to(xt), condition.inputs["text"].to(xt)], 1)).view_as(xt)


class FakePipeline:
    """What the trainer, the data and the grids ask of a pipeline."""

    process, kind, latent_shape, default_guidance, device = Flow(), "flow", SHAPE, 1.0, torch.device("cpu")

    def __init__(self, adapters: bool = False):
        self.adapters = adapters
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.network = Linear().requires_grad_(False)

    def frozen(self) -> Denoiser:
        return Denoiser(self.network, call, self.process, "flow").eval()

    def trainable(self, role: str) -> Denoiser:
        if self.adapters:
            network = Adapted(self.network)
            return Denoiser(network, call, self.process, "flow", own=network.adapter)
        return Denoiser(copy.deepcopy(self.network).requires_grad_(True), call, self.process, "flow")

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        text = torch.tensor([[sum(prompt.encode()) * (i + 1) % 13 / 13 for i in range(WIDTH)] for prompt in prompts])
        return Condition({"text": text}, {}, Condition({"text": torch.zeros_like(text)}))

    def encode(self, images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8)


@dataclass
class Duel(Method):
    """A student that follows the teacher, and a critic that follows the student.

    With `drawn`, noise and times come from torch's generator as in a real method; else losses depend on the batch alone.
    """

    drawn: bool = True
    critic_every: int = 1
    critic_lr_scale: float = 1.0
    restart_at: int = -1
    guidance: float = 1.0
    poison: tuple[int, ...] = ()   # calls of the student's loss, from 0, that give no number
    moves: list[str] = field(default_factory=list, init=False)
    needs = frozenset({"images"})

    def setup(self, pipeline: Any) -> None:
        self.teacher = pipeline.frozen()
        self.student, self.critic = pipeline.trainable("student"), pipeline.trainable("fake_score")
        self.seen, self.trail = 0, torch.zeros(3)

    def players(self) -> Sequence[Player]:
        return [
            Player("student", self.student, self.student_loss),
            Player("critic", self.critic, self.critic_loss, every=self.critic_every, lr_scale=self.critic_lr_scale),
        ]

    @property
    def trained(self) -> Denoiser:
        return self.student

    def sampler(self, steps: int | None = None) -> Sampler:
        return FewStep(even_times(steps or 2), gamma=1.0)

    def advance(self, step: int, total: int) -> bool:
        return step == self.restart_at

    def stage_end(self, step: int, total: int) -> int:
        return self.restart_at if step < self.restart_at else total

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "nested": {"trail": self.trail, "list": [1, 2.5, None]}}

    def load_state(self, state: dict[str, Any]) -> None:
        assert state["nested"]["list"] == [1, 2.5, None]
        self.seen, self.trail = state["seen"], state["nested"]["trail"]

    def point(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x0 = batch.latents if batch.latents is not None else torch.zeros(batch.shape)
        t = torch.full((len(x0),), 0.5)
        if not self.drawn:
            return x0, t
        t = torch.rand(len(x0))
        return self.student.process.add_noise(x0, torch.randn_like(x0), t), t

    def student_loss(self, batch: Batch) -> Loss:
        self.moves.append("student")
        self.seen += 1
        self.trail = self.trail.roll(1) + 1 / self.seen
        xt, t = self.point(batch)
        x0 = self.student(xt, t, batch.condition).x0
        wanted = self.teacher(xt, t, batch.condition.dropout(torch.ones(len(xt), dtype=torch.bool))).x0 + 1
        # Through the critic into the student, as adversaries and scores do; the critic must not learn from it.
        doubt = self.critic(x0, t, batch.condition).x0.square().mean()
        follow = F.mse_loss(x0, wanted)
        if self.seen - 1 in self.poison:
            follow = follow * torch.nan
        return {"follow": follow, "doubt": 0.1 * doubt}

    def critic_loss(self, batch: Batch) -> Loss:
        self.moves.append("critic")
        xt, t = self.point(batch)
        return {"fit": F.mse_loss(self.critic(xt, t, batch.condition).x0, self.student(xt, t, batch.condition).x0.detach() - 1)}


def fake_source(pipeline: FakePipeline, *, seed: int = 0, **options: Any) -> Source:
    """Eleven prompts with latents that depend on their place."""
    latents = torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(3))
    return Source(encode_prompts(pipeline, PROMPTS), SHAPE, latents, prompts=PROMPTS, seed=seed, **options)  # type: ignore[arg-type]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights."""
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
