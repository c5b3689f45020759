"""A pipeline without diffusers, networks small enough to train in a test, and a training loop of a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.analytic import MASK, Mixture
from fastgen.denoiser import Condition, Denoiser, EndInput, Predicts
from fastgen.method import Batch, Method, Player
from fastgen.process import EDM, VP, Flow, Kind, Process, Trig
from fastgen.samplers import Sampler

TABLE = VP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
PROCESSES: dict[str, Process] = {"vp": TABLE, "flow": Flow(), "trig": Trig(), "edm": EDM()}
KINDS: tuple[Kind, ...] = ("x0", "eps", "v", "flow")


class Small(nn.Module):
    """A network of two layers on vectors or maps that knows the time, the label and, if it is asked to, the guidance scale."""

    def __init__(self, shape: Sequence[int], labels: int = 2, width: int = 16, tells_guidance: bool = False):
        super().__init__()
        self.tells_guidance = tells_guidance
        flat = len(shape) == 1
        self.known = nn.Linear(4 + labels, width)
        self.told = nn.Linear(1, width, bias=False) if tells_guidance else None
        self.enter = nn.Linear(shape[0], width) if flat else nn.Conv2d(shape[0], width, 3, padding=1)
        self.middle = nn.Linear(width, width) if flat else nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Linear(width, shape[0]) if flat else nn.Conv2d(width, shape[0], 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        waves = torch.stack([t, (3 * t).sin(), (6 * t).cos(), (12 * t).sin()], 1)
        known = self.known(torch.cat([waves, mask], 1).to(self.known.weight))
        if self.told is not None and guidance is not None:
            known = known + self.told(guidance[:, None].to(known) / 10)
        h = nn.functional.silu(self.enter(x) + known.view(*known.shape, *[1] * (x.ndim - 2)))
        return self.leave(nn.functional.silu(self.middle(h)) + h)


class Affine(nn.Module):
    """output = a[t] x + b[t], with a pair of numbers for each of `count` times: it can represent every map of a Gaussian."""

    def __init__(self, count: int = 64):
        super().__init__()
        self.count = count
        self.a, self.b = nn.Parameter(torch.zeros(count + 1)), nn.Parameter(torch.zeros(count + 1))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        place = (t * self.count).round().long()
        return self.a[place].view(-1, 1) * x + self.b[place].view(-1, 1)


class GaussianScore(nn.Module):
    """The denoiser, in x0, of a Gaussian with a learnt mean and standard deviation: a fake score that can be exact."""

    def __init__(self, process: Process, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.process = process
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, guidance: Tensor | None) -> Tensor:
        alpha, sigma = self.process.coefficients(t, x)
        variance = (2 * self.log_std).exp()
        return self.mean + alpha * variance * (x - alpha * self.mean) / (alpha**2 * variance + sigma**2)


def call(network: nn.Module, xt: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    return network(xt, t, condition.inputs[MASK], guidance)


class FakePipeline:
    """What methods use of a `Pipeline`. Prompts are the numbers of mixture components, "0" or "0 2"; "" is all of them."""

    feature_layers: tuple[str, ...] = ("middle",)
    device = torch.device("cpu")

    def __init__(
        self,
        process: Process,
        shape: Sequence[int] = (2,),
        kind: Kind = "v",
        *,
        teacher: Mixture | None = None,
        networks: dict[str, Callable[[], nn.Module]] | None = None,
        labels: int = 2,
        default_guidance: float = 1.0,
        embeds_guidance: bool = False,
        width: int = 16,
    ):
        self.process, self.latent_shape, self.kind, self.labels, self.width = process, tuple(shape), kind, labels, width
        self.teacher, self.networks = teacher, networks or {}
        self.default_guidance, self.embeds_guidance = default_guidance, embeds_guidance
        self.base = Small(shape, labels, width, embeds_guidance).requires_grad_(False)
        self.made: dict[str, Denoiser] = {}

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        mask = torch.zeros(len(prompts), self.labels, dtype=torch.bool)
        for row, prompt in zip(mask, prompts, strict=True):
            row[[int(word) for word in prompt.split()] if prompt else slice(None)] = True
        return Condition({MASK: mask}, null=Condition({MASK: torch.ones_like(mask)}))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, 8 H, 8 W] of latents [B, C, H, W], by a fixed linear map."""
        mixed = torch.stack([latents.mean(1), latents[:, 0], latents[:, -1]], 1)
        return nn.functional.interpolate(mixed.float(), scale_factor=8).clamp(-1, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images [B, 3, 8 H, 8 W]: the mean of every 8 x 8 pixels, the channels over and over."""
        small = nn.functional.avg_pool2d(images.float(), 8)
        return torch.stack([small[:, i % 3] for i in range(self.latent_shape[0])], 1)

    def frozen(self) -> Predicts:
        if self.teacher is not None:
            return self.teacher
        return Denoiser(self.base, call, self.process, self.kind, embeds_guidance=self.embeds_guidance)

    def trainable(self, role: str, *, guidance_embedding: bool = False, end_time: bool = False) -> Denoiser:
        embeds = guidance_embedding or self.embeds_guidance
        end = EndInput("known", self.width) if end_time else None
        network = self.networks[role]() if role in self.networks else self._copy(embeds)
        kind: Kind = "x0" if isinstance(network, GaussianScore) else self.kind
        network.requires_grad_(True)
        denoiser = Denoiser(network, call, self.process, kind, embeds_guidance=embeds, end_input=end)
        self.made[role] = denoiser
        return denoiser

    def _copy(self, embeds: bool) -> nn.Module:
        network = Small(self.latent_shape, self.labels, self.width, embeds)
        network.load_state_dict(self.base.state_dict(), strict=False)
        if network.told is not None and not self.embeds_guidance:
            nn.init.zeros_(network.told.weight)
        return network


def learn_teacher(pipeline: FakePipeline, updates: int, size: int = 128, lr: float = 3e-3) -> None:
    """Train the base network towards the closed-form teacher, so that students start as good denoisers, as they do in life.

    It sees prompts of one component each; what several together mean it makes out of those.
    """
    teacher, base = pipeline.teacher, copy.deepcopy(pipeline.base).requires_grad_(True)
    assert teacher is not None
    optimizer = torch.optim.Adam(base.parameters(), lr)
    denoiser = Denoiser(base, call, pipeline.process, pipeline.kind)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / updates)
        condition = pipeline.encode_prompts([str(int(torch.randint(pipeline.labels, ()))) for _ in range(size)])
        x0, t = teacher.sample(condition).float(), torch.rand(size) * 0.998 + 0.002
        xt = pipeline.process.add_noise(x0, torch.randn_like(x0), t)
        (denoiser(xt, t, condition).output - teacher(xt, t, condition).output).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pipeline.base.load_state_dict(base.state_dict())


LABELS = ("0 1", "2")
"""The prompts of `two_labels`."""


def two_labels(updates: int = 1000) -> FakePipeline:
    """Three modes of a flow in two dimensions under two labels; the network has learnt the closed-form teacher."""
    means = torch.tensor([[-1.0, 0.8], [-1.0, -0.8], [1.0, 0.0]])
    teacher = Mixture([0.3, 0.3, 0.4], means, [0.3, 0.3, 0.3], PROCESSES["flow"])
    pipeline = FakePipeline(PROCESSES["flow"], (2,), "flow", teacher=teacher, labels=3, width=64)
    learn_teacher(pipeline, updates)
    return pipeline


def furthest_marginal(pipeline: FakePipeline, denoiser: Predicts, sampler: Sampler) -> float:
    """How far a coordinate of one label's samples is, at most, from that of the data (W1), with `two_labels`."""
    assert pipeline.teacher is not None
    condition = pipeline.encode_prompts(LABELS * 2000)
    data = pipeline.teacher.sample(condition)
    with torch.no_grad():
        x = sampler.sample(denoiser, torch.randn(len(condition), 2), condition)
    return max(wasserstein(x[i::2, d], data[i::2, d]) for i in range(2) for d in range(2))


def student_gradient(method: Any, batch: Batch) -> Tensor:
    """All of the gradient that the student's loss gives the student, as one vector."""
    total = torch.stack(list(method.student_loss(batch).values())).sum()
    assert total.isfinite()
    grads = torch.autograd.grad(total, list(method.trained.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def batches(pipeline: Any, size: int, prompts: Sequence[str] = ("0", "1"), *, pairs: bool = False) -> Iterator[Batch]:
    """Endless batches; latents are the closed-form teacher's data where there is one, else noise.

    With `pairs` they carry noise and target too: where the teacher's ODE leads from that noise, or else noise.
    """
    while True:
        texts = tuple(prompts[i % len(prompts)] for i in range(size))
        condition = pipeline.encode_prompts(texts)
        shape = (size, *pipeline.latent_shape)
        batch = Batch(condition, shape, torch.randn(shape), prompts=texts)
        if pairs:
            batch.noise, batch.target = torch.randn(shape), torch.randn(shape)
        if pipeline.teacher is not None:
            batch.latents = pipeline.teacher.sample(condition).float()
        if pipeline.teacher is not None and batch.noise is not None:
            one = torch.ones(size)
            start = batch.noise * pipeline.process.initial_scale(one).view(-1, *[1] * (len(shape) - 1))
            batch.target = pipeline.teacher.flow_map(start, one, torch.zeros(size), condition).float()
        yield batch


def train(
    method: Method,
    source: Iterator[Batch],
    updates: int,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    anneal: bool = True,
    after_turn: Callable[[Player, dict[str, Tensor]], None] = lambda player, terms: None,
) -> None:
    """Players in turn, gradients reaching the mover alone; `after_turn` sees them. Rates fall to 0 in a stage."""
    players: list[Player] = []
    weights: dict[str, list[nn.Parameter]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    start, length = 0, updates
    for step in range(updates):
        if method.advance(step, updates) or not optimizers:
            for weight in (weight for some in weights.values() for weight in some):
                weight.requires_grad_(True)
            players = list(method.players())
            weights = {player.name: [w for w in player.weights.parameters() if w.requires_grad] for player in players}
            optimizers = {p.name: torch.optim.Adam(weights[p.name], lr * p.lr_scale, betas) for p in players}
            start, length = step, method.stage_end(step, updates) - step
        for player in players:
            if (step + 1) % player.every:
                continue
            for name, some in weights.items():
                for weight in some:
                    weight.requires_grad_(name == player.name)
            terms = player.loss(next(source))
            torch.stack(list(terms.values())).sum().backward()
            after_turn(player, terms)
            optimizer = optimizers[player.name]
            rate = max(1 - (step - start) / length, 0.01) if anneal else 1.0
            optimizer.param_groups[0]["lr"] = lr * player.lr_scale * rate
            optimizer.step()
            optimizer.zero_grad()
    for some in weights.values():
        for weight in some:
            weight.requires_grad_(True)


def wasserstein(a: Tensor, b: Tensor) -> float:
    """W1 between two samples of one size of numbers: the mean distance of their order statistics."""
    return float((a.flatten().double().sort().values - b.flatten().double().sort().values).abs().mean())
