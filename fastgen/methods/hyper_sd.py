"""Hyper-SD: segmented consistency, then score distillation of the single step and feedback, in one student for all steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.denoiser import Condition, Denoiser, Guided, Predicts
from fastgen.errors import UserError
from fastgen.families.adversarial import decoded
from fastgen.losses import denoising, distribution_matching, shared_choice, squared, uniform_times
from fastgen.method import Batch, Loss, Player
from fastgen.methods.tscd import TSCD
from fastgen.pipelines.base import Pipeline
from fastgen.rewards import Reward, load_reward
from fastgen.samplers import FewStep


@dataclass
class HyperSD(TSCD):
    """Hyper-SD (Ren et al. 2024): TSCD, differentiable rewards, and score distillation of one step.

    After the stages of TSCD a last one goes on with its loss for one segment and adds, for samples of a single step, the
    gradient of distribution matching (DMD, Yin et al. 2024a) and the squared distance to what the student of TSCD made of the
    same noise; and for the clean estimate at a random call of the student's own sampler, decoded, max(0, `reward_margin` -
    reward). So one student, one LoRA, serves all numbers of steps. Without `segments` all updates are the last stage's.

    Differences from the paper, whose code is not public: feedback is learnt in the last stage and not by a LoRA of its own that
    is merged; of its rewards CLIP's and the aesthetic one are there, instance segmentation is not; the single step is told the
    time t = 1, as the authors' one LoRA for all steps is, not 800; the weights are ours.
    """

    score_weight: float = field(default=1.0, metadata={"help": "weight of distribution matching for one step", "at_least": 0})
    score_guidance: float | None = field(
        default=None, metadata={"help": "guidance of the real score, 1 = off; none: the pipeline's own", "at_least": 1}
    )
    anchor_weight: float = field(
        default=1.0, metadata={"help": "weight of the squared distance to the student of TSCD; 0: none", "at_least": 0}
    )
    fake_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rate of the fake score over the student's", "above": 0}
    )
    rewards: tuple[str, ...] = field(
        default=(), metadata={"help": 'rewards of decoded images, "toy-clip", "clip:..." or "aesthetic:..."'}
    )
    reward_weight: float = field(default=0.1, metadata={"help": "weight of the rewards' losses", "at_least": 0})
    reward_margin: float = field(default=1.0, metadata={"help": "reward from which on more is not asked for"})

    least_stages: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments and self.segments[-1] != 1:
            raise UserError(f"segments = {list(self.segments)} must end with 1: the single step crosses the whole trajectory")
        if not self.score_weight and not (self.rewards and self.reward_weight):
            rewards = f"rewards = {list(self.rewards)} with reward_weight = {self.reward_weight:g}"
            raise UserError(f"score_weight = 0 and {rewards} leave nothing to the last stage; that is the method tscd")
        if not self.score_weight:
            self.refuse_idle("with score_weight = 0", "anchor_weight")

    @property
    def stages(self) -> tuple[int, ...]:
        return (*self.segments, 1)

    @property
    def is_last(self) -> bool:
        """Whether the stages of TSCD are over."""
        return self.stage == len(self.stages) - 1

    def setup(self, pipeline: Pipeline) -> None:
        super().setup(pipeline)
        self.decode, self.process = pipeline.decode, pipeline.process
        if self.rewards:
            decoded(f"rewards = {list(self.rewards)}", pipeline)
        self.judges: list[Reward] = [load_reward(name, pipeline.device) for name in self.rewards]
        self.fake: Predicts | None = None
        self.anchor: Denoiser | None = None
        if self.score_weight:
            scale = pipeline.default_guidance if self.score_guidance is None else self.score_guidance
            self.real = Guided(self.frozen, scale)
            self.fake_score = pipeline.trainable("fake_score")
            self.fake = Guided(self.fake_score, scale if self.fake_score.embeds_guidance else 1.0)
        if self.score_weight and self.anchor_weight:
            self.anchor = pipeline.trainable("anchor", guidance_embedding=self.embed_guidance).requires_grad_(False)
            if self.anchor.state_dict().keys() != self.student.state_dict().keys():
                raise UserError('the roles "student" and "anchor" must both be "full" or both be "lora"')

    def players(self) -> Sequence[Player]:
        players = super().players()
        if self.fake is None or not self.is_last:
            return players
        return [Player("fake_score", self.fake_score, self.fake_loss, lr_scale=self.fake_lr_scale), *players]

    def advance(self, step: int, total: int) -> bool:
        moved = super().advance(step, total)
        if moved and self.is_last and self.anchor is not None:
            self.anchor.load_state_dict(self.student.state_dict())
        return moved

    def state(self) -> dict[str, Any]:
        return super().state() | ({"anchor": self.anchor.state_dict()} if self.anchor is not None else {})

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.anchor is not None:
            self.anchor.load_state_dict(state["anchor"])

    def loss(self, batch: Batch) -> Loss:
        terms = super().loss(batch)
        if not self.is_last:
            return terms
        assert batch.latents is not None
        noise = torch.randn_like(batch.latents)
        if self.fake is not None:
            x = self.single(self.student, noise, batch.condition)
            terms["dmd"] = self.score_weight * self.matching(x, batch.condition)
            if self.anchor is not None:
                with torch.no_grad():
                    before = self.single(self.anchor, noise, batch.condition)
                terms["anchor"] = self.anchor_weight * squared(x, before)
        if self.judges:
            terms["reward"] = self.reward_weight * self.feedback(noise, batch)
        return terms

    def single(self, network: Denoiser, noise: Tensor, condition: Condition) -> Tensor:
        """Samples of one step."""
        return FewStep((1.0,), guidance=self.told).sample(network, noise, condition)

    def matching(self, x: Tensor, condition: Condition) -> Tensor:
        """The distribution matching loss of the samples `x`."""
        assert self.fake is not None
        t = uniform_times(self.process, len(x), low=0.02, high=0.98, shift=self.shift, device=x.device)
        return distribution_matching(x, t, condition, self.fake, self.real)

    def fake_loss(self, batch: Batch) -> Loss:
        assert self.fake is not None and batch.latents is not None
        with torch.no_grad():
            x = self.single(self.student, torch.randn_like(batch.latents), batch.condition)
        t = uniform_times(self.process, len(x), shift=self.shift, device=x.device)
        return {"score": denoising(self.fake, x, torch.randn_like(x), t, batch.condition)}

    def feedback(self, noise: Tensor, batch: Batch) -> Tensor:
        """How far the rewards of the clean estimates at a random call stay below the margin, their sum, mean over the batch."""
        if len(batch.prompts) != len(noise):
            raise UserError(f"rewards = {list(self.rewards)} read prompts, of which the data has {len(batch.prompts)} a batch")
        sampler = self.sampler()
        x0 = sampler.sample(self.student, noise, batch.condition, exit_at=shared_choice(sampler.steps, noise.device))
        images = self.decode(x0)
        found = torch.stack([judge(images, batch.prompts) for judge in self.judges])
        return torch.relu(self.reward_margin - found).mean(1).sum()
