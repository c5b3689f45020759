"""SiD on a small Stable Diffusion: three networks in one graph, roles full and LoRA, gradient checkpointing on and off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.adapters import LoraOptions
from fastgen.denoiser import Denoiser
from fastgen.method import Batch
from fastgen.methods.sid_few_step import SiDFewStep
from fastgen.pipelines import Pipeline
from fastgen.pipelines.tiny.unets import sd15

OPTIONS: dict[str, Any] = {"steps": 2, "guidance": 3.0, "gan_weight": 0.01}


def ready(mode: str, checkpointing: bool = False) -> tuple[SiDFewStep, Batch, Pipeline]:
    roles = {"student": mode, "fake_score": mode}
    pipeline = Pipeline.wrap(sd15(), roles=roles, lora=LoraOptions(rank=4), gradient_checkpointing=checkpointing)
    method = SiDFewStep(**OPTIONS)
    method.setup(pipeline)
    torch.manual_seed(5)
    for module in (method.student, method.critic.fake):
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    shape = (2, *pipeline.latent_shape)
    return method, Batch(pipeline.encode_prompts(["a red circle", "a blue square"]), shape, torch.randn(shape)), pipeline


def gradients(method: SiDFewStep, batch: Batch, player: int) -> dict[str, Tensor]:
    """What a player's turn gives its weights; the other's are held, as the trainer holds them."""
    for i, each in enumerate(method.players()):
        each.weights.requires_grad_(i == player)
    mover = method.players()[player]
    torch.manual_seed(9)
    sum(mover.loss(batch).values()).backward()
    found = {name: weight.grad.clone() for name, weight in mover.weights.named_parameters() if weight.grad is not None}
    other = method.players()[1 - player].weights
    assert all(weight.grad is None for weight in other.parameters()), "held weights got a gradient"
    mover.weights.zero_grad()
    return found


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_checkpointing_changes_no_gradient(mode: str) -> None:
    """Blocks are computed again in the backward pass, in LoRA with the adapter of their own forward pass."""
    plain, batch, pipeline = ready(mode)
    saved, same, again = ready(mode, checkpointing=True)
    assert torch.equal(batch.latents, same.latents)  # type: ignore[arg-type]
    for player in (0, 1):
        one, two = gradients(plain, batch, player), gradients(saved, same, player)
        assert one.keys() == two.keys() and len(one) > 10
        largest = max(float(each.abs().max()) for each in one.values())
        assert largest > 0
        for name, each in one.items():
            torch.testing.assert_close(two[name], each, rtol=1e-4, atol=1e-5 * largest, msg=name)
    for each in (pipeline, again):
        base = [w for name, w in each.network.named_parameters() if "lora_" not in name]
        assert base and all(weight.grad is None and not weight.requires_grad for weight in base)


def test_roles_on_one_base_are_three_networks() -> None:
    """Adapters merged into copies of their own, the loss of the samples and its gradient through both scores are the same."""
    method, batch, pipeline = ready("lora")
    method.players()[0].weights.requires_grad_(False)
    x = torch.randn(batch.shape, requires_grad=True)
    torch.manual_seed(3)
    loss = method.identity(x, batch.condition)[0]
    (gradient,) = torch.autograd.grad(loss, x)

    merged = copy.deepcopy(pipeline.network)
    key = method.critic.fake.own.key
    for module in merged.modules():
        if hasattr(module, "lora_A") and key in module.lora_A:
            module._disable_adapters, module._active_adapter = False, [key]
            module.merge(adapter_names=[key])
    alone = Denoiser(merged.requires_grad_(False), pipeline.call, pipeline.process, pipeline.kind)
    object.__setattr__(method.critic, "_modules", {**method.critic._modules, "fake": alone})
    torch.manual_seed(3)
    other = method.identity(x, batch.condition)[0]
    (expected,) = torch.autograd.grad(other, x)
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert gradient.abs().max() > 0
