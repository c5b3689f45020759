"""What discrete consistency methods share: a student whose jumps from two points of one trajectory land at one point.

From diffused data x_t the teacher takes a guided solver step down a grid to x_r. The student's jump from x_t to a time s <= r
is pulled towards the jump from x_r to the same s by a target network, the student itself or its average (Song et al. 2023; Luo
et al. 2023a; Kim et al. 2024). Methods differ by how s is drawn: clean data, a phase's edge, any time, times of a schedule.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.critics import FeatureCritic
from fastgen.denoiser import Condition, Denoiser, Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.adversarial import feature_critic, layers_for
from fastgen.losses import drawn_scales, hinge_critic, noised, pseudo_huber, wide
from fastgen.method import Batch, Loss, Method, Need, Player
from fastgen.pipelines.base import Pipeline
from fastgen.process import VP, shift_time, unshift_time
from fastgen.rollouts import time_grid, walk
from fastgen.samplers import FewStep, even_times


@dataclass
class Chain:
    """Two points of one trajectory, `xt` at `t` and `xr` at `r` < `t`, and the time `s` <= `r` where the jumps from them meet.

    Times and the guidance `scale` are [B]; `condition` is what the student is given.
    """

    xt: Tensor
    t: Tensor
    xr: Tensor
    r: Tensor
    s: Tensor
    condition: Condition
    scale: Tensor


@dataclass
class Consistency(Method):
    """What discrete consistency methods share (Song et al. 2023; Luo et al. 2023a); a method says where its jumps `end`."""

    guidance_low: float = field(default=3.0, metadata={"help": "least guidance scale of the teacher, 1 = off"})
    guidance_high: float = field(default=15.0, metadata={"help": "greatest guidance scale of the teacher"})
    embed_guidance: bool = field(default=False, metadata={"help": "make the guidance scale an input of the student"})
    guidance: float | None = field(
        default=None,
        metadata={"help": "the student's scale in sampling, where it takes one; none: the pipeline's own", "at_least": 1},
    )
    prompt_dropout: float = field(
        default=0.0,
        metadata={"help": "share of prompts replaced by the empty one, unguided", "at_least": 0, "at_most": 1},
    )
    steps: int = field(default=4, metadata={"help": "network calls a sample, 1 to 8"})
    grid: int = field(default=50, metadata={"help": "points of the solver grid"})
    solver_steps: int = field(default=1, metadata={"help": "steps that the teacher takes from one point to the next"})
    huber_c: float = field(default=1e-3, metadata={"help": "where the pseudo-Huber loss turns from square to absolute"})
    ema_decay: float = field(default=0.0, metadata={"help": "decay of the target network; 0: the student itself, as LCM-LoRA"})
    shift: float = field(default=1.0, metadata={"help": "moves grid and steps towards noise, for flow models", "above": 0})

    family: ClassVar[str] = "consistency"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompts", "images"})
    most_steps: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_low <= self.guidance_high:
            low, high = f"guidance_low = {self.guidance_low:g}", f"guidance_high = {self.guidance_high:g}"
            raise UserError(f"{low} must be at least 1 and at most {high}")
        if self.embed_guidance or not self.prompt_dropout:
            self.refuse_untrained()
        if not 1 <= self.steps <= self.most_steps:
            raise UserError(f"steps must be 1 to {self.most_steps}, not {self.steps}")
        if self.grid < self.most_steps:
            raise UserError(f"grid must have at least {self.most_steps} points, not {self.grid}")
        if self.solver_steps < 1:
            raise UserError(f"solver_steps must be at least 1, not {self.solver_steps}")
        if self.huber_c <= 0:
            raise UserError(f"huber_c must be above 0, not {self.huber_c:g}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay:g}")

    def refuse_untrained(self) -> None:
        """Raise UserError for a guidance that a student is never told in training."""
        if self.guidance is not None and not self.guidance_low <= self.guidance <= self.guidance_high:
            trained = f"guidance_low = {self.guidance_low:g} to guidance_high = {self.guidance_high:g}"
            raise UserError(f"guidance = {self.guidance:g} is outside what the student is trained for, {trained}")

    def setup(self, pipeline: Pipeline) -> None:
        points = f"grid = {self.grid} times solver_steps = {self.solver_steps}"
        self.times = time_grid(points, self.grid * self.solver_steps, pipeline.process, self.shift, pipeline.device)
        self.frozen = pipeline.frozen()
        self.student = pipeline.trainable("student", guidance_embedding=self.embed_guidance)
        self.told = self._told(pipeline)
        self.target: Denoiser | None = None
        if self.ema_decay:
            self.target = pipeline.trainable("target", guidance_embedding=self.embed_guidance).requires_grad_(False)
            if self.target.state_dict().keys() != self.student.state_dict().keys():
                raise UserError('the roles "student" and "target" must both be "full" or both be "lora"')
            self.target.load_state_dict(self.student.state_dict())

    def _told(self, pipeline: Pipeline) -> float:
        """The guidance scale of the student in sampling."""
        if self.student.embeds_guidance:
            self.refuse_untrained()
            scale = pipeline.default_guidance if self.guidance is None else self.guidance
            return min(max(scale, self.guidance_low), self.guidance_high)
        if self.guidance is not None and not self.prompt_dropout:
            raise UserError(
                f"guidance = {self.guidance:g} needs embed_guidance = true, which gives the student that input, or a "
                "prompt_dropout above 0, which teaches it what to guide away from"
            )
        return 1.0 if self.guidance is None else self.guidance

    @property
    def teacher_guidance(self) -> float | None:
        if self.student.embeds_guidance:
            return self.told
        # `guidance` is the student's; what it has taken in besides is the teacher's, if that is one number.
        return max(self.told, self.guidance_low) if self.guidance_low == self.guidance_high else self.guidance

    def players(self) -> Sequence[Player]:
        return [Player("student", self.student, self.loss)]

    @property
    def renewal(self) -> float:
        """Share of the noise that is renewed between calls in sampling: 0 follows the trajectory, 1 re-noises the estimate."""
        return 0.0

    def renewal_on_tables(self, share: float | None, usual: float) -> float:
        """`share`, or where that is None `usual` on a table and 0 elsewhere: only there has diffusers a scheduler for it."""
        if share is not None:
            return share
        return usual if isinstance(self.student.process, VP) else 0.0

    def sampler(self, steps: int | None = None) -> FewStep:
        """The calls fall on the solver grid, on the points that diffusers' LCMScheduler chooses."""
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.most_steps:
            raise UserError(f"a consistency model is sampled in 1 to {self.most_steps} steps, not {steps}")
        return FewStep(self.calls(steps), gamma=self.renewal, guidance=self.told)

    def calls(self, steps: int) -> tuple[float, ...]:
        """The times of `steps` calls."""
        grid = even_times(self.grid, self.student.process, self.shift)
        return tuple(grid[i * self.grid // steps] for i in range(steps))

    def advance(self, step: int, total: int) -> bool:
        if self.target is not None and step > 0:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - self.ema_decay)
        return False

    def state(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()} if self.target else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.target is not None:
            self.target.load_state_dict(state["target"])

    def loss(self, batch: Batch) -> Loss:
        estimate, target = self.meet(self.chain(batch))
        return {"consistency": pseudo_huber(estimate, target, self.huber_c)}

    def chain(self, batch: Batch) -> Chain:
        """Diffuse the batch's data to random points of the grid, and let the teacher take its step from there."""
        assert batch.latents is not None
        x0 = batch.latents
        start = self.solver_steps * torch.randint(self.grid, (len(x0),), device=x0.device)
        t, r = self.times[start], self.times[start + self.solver_steps]
        scale = drawn_scales(self.guidance_low, self.guidance_high, len(x0), x0.device)
        xt = noised(self.student.process, x0, torch.randn_like(x0), t)
        condition = batch.condition
        if self.prompt_dropout:
            # Guided away from itself, the empty prompt is unguided.
            condition = condition.dropout(torch.rand(len(x0), device=x0.device) < self.prompt_dropout)
        with torch.no_grad():
            xr = self.solve(xt, start, condition, scale)
        return Chain(xt, t, xr, r, self.end(start), condition, scale)

    @abstractmethod
    def end(self, start: Tensor) -> Tensor:
        """The times [B] where the jumps end, none after the teacher's step from position `start` [B] to the next point."""

    def edge_below(self, start: Tensor, parts: int) -> Tensor:
        """The times [B] of the next edge after position `start` [B] on the grid, which is cut into `parts` equal parts."""
        edges = self.solver_steps * torch.tensor([i * self.grid // parts for i in range(parts + 1)], device=start.device)
        return self.times[edges[torch.searchsorted(edges, start, right=True)]]

    def solve(self, x: Tensor, start: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """The guided teacher's DDIM steps from position `start` [B] on the grid to the next point."""
        return walk(self.guided(scale), x, self.times, start, self.solver_steps, condition)

    def guided(self, scale: Tensor) -> Predicts:
        """The teacher, guided as it is distilled."""
        return Guided(self.frozen, 1.0 if self.guidance_low == self.guidance_high == 1 else scale)

    def meet(self, chain: Chain) -> tuple[Tensor, Tensor]:
        """Where the student's jump from x_t lands, and where the target network's from x_r does (without gradient).

        Both see the same dropout mask, if their network has one.
        """
        told = (chain.s, chain.condition, chain.scale)
        device = chain.xt.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            target = self.jump(self.target or self.student, chain.xr, chain.r, *told)
        return self.jump(self.student, chain.xt, chain.t, *told), target

    def jump(self, network: Predicts, x: Tensor, t: Tensor, s: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """Where `network` jumps from `x` at `t` to time `s` <= `t`; `x` itself where the two are one.

        `scale` [B] is told to a network that embeds it.
        """
        landed = network(x, t, condition, guidance=scale if network.embeds_guidance else None).at(s)
        return torch.where((s < t).view(-1, *[1] * (x.ndim - 1)), landed, x.to(landed.dtype))


@dataclass
class AdversarialConsistency(Consistency):
    """Consistency with an adversary that tells where the two jumps land apart (PCM; Wang et al. 2024).

    The critic is heads on the frozen teacher's features. Real is where the target network lands, fake where the student does;
    both are diffused on with the exact kernel from s to a random time within `reach` above it. The losses are hinges.
    """

    adversary: float = field(
        default=0.0, metadata={"help": "weight of the adversarial loss, 0.1 in the papers; 0: none", "at_least": 0}
    )
    critic_lr_scale: float = field(
        default=2.0, metadata={"help": "learning rate of the adversary over the student's", "above": 0}
    )

    @property
    @abstractmethod
    def reach(self) -> float:
        """How far above s the adversary looks, as a share of all (unshifted) times."""

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.critic: FeatureCritic | None = None
        if self.adversary:
            layers = layers_for(f"adversary = {self.adversary:g}", pipeline)
            self.critic = feature_critic(pipeline, self.frozen, layers)

    def players(self) -> Sequence[Player]:
        if self.critic is None or not self.is_adversarial:
            return super().players()
        return [Player("critic", self.critic, self.critic_loss, lr_scale=self.critic_lr_scale), *super().players()]

    def loss(self, batch: Batch) -> Loss:
        chain = self.chain(batch)
        estimate, target = self.meet(chain)
        terms = {"consistency": pseudo_huber(estimate, target, self.huber_c)}
        if self.critic is not None and self.is_adversarial:
            logits = self.critic(*self.seen(estimate, chain, self.seen_at(chain.s)))
            terms["gan"] = self.adversary * torch.relu(1 - wide(logits)).mean()
        return terms

    def critic_loss(self, batch: Batch) -> Loss:
        assert self.critic is not None
        with torch.no_grad():
            chain = self.chain(batch)
            estimate, target = self.meet(chain)
            t = self.seen_at(chain.s)
        fake, real = (self.critic(*self.seen(x, chain, t)) for x in (estimate, target))
        return {"hinge": hinge_critic(real, fake, t)}

    @property
    def is_adversarial(self) -> bool:
        """Whether the adversary plays now."""
        return self.critic is not None

    def seen_at(self, s: Tensor) -> Tensor:
        """Random times [B] from `s` to `reach` above it."""
        low = unshift_time(s, self.shift)
        t = shift_time((low + self.reach * torch.rand_like(s)).clamp(max=1), self.shift)
        return torch.maximum(self.student.process.snap(t), s)

    def seen(self, x: Tensor, chain: Chain, t: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """What the critic is called with: `x`, which is at chain.s, diffused on to `t`."""
        moved = self.student.process.diffuse(x, torch.randn_like(x), chain.s, t)
        return moved.to(chain.xt.dtype), t, chain.condition
