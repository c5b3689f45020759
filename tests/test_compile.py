"""`speed.compile` and `speed.channels_last`: the same updates, weights under the same names, and clear refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgen import config
from fastgen.adapters import LoraOptions
from fastgen.config import SpeedConfig
from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.method import Batch
from fastgen.methods.dmd2 import DMD2
from fastgen.pipelines import Pipeline
from fastgen.process import Flow
from fastgen.training.speed import Compilations, compile_blocks, refuse, repeated_blocks, set_up, switch
from tests import tiny_models as tiny
from tests.tiny_models import PROMPTS

CLOSE = 1e-5
"""How far apart gradients may be, relative to their norm."""
ROOT = Path(__file__).parents[1]
MODELS = {"toy": tiny.toy, "sd3": tiny.sd3}


def ready(name: str, mode: Any, **options: Any) -> tuple[Pipeline, DMD2, Batch]:
    torch.manual_seed(1)
    pipeline = Pipeline.wrap(MODELS[name](), roles={"student": mode}, lora=LoraOptions(rank=3), **options)
    method = DMD2(steps=2, guidance=3.0)
    method.setup(pipeline)
    with torch.no_grad():
        for player in method.players():
            for weight in player.weights.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    shape = (2, *pipeline.latent_shape)
    return pipeline, method, Batch(pipeline.encode_prompts(PROMPTS[:2]), shape, torch.randn(shape))


def gradients(method: DMD2, batch: Batch) -> list[Tensor]:
    """Of both players' losses, each with the same draws."""
    found, players = [], method.players()
    for player in players:
        for other in players:
            other.weights.requires_grad_(other is player)
        torch.manual_seed(3)
        sum(player.loss(batch).values()).backward()  # type: ignore[union-attr]
        found.append(torch.cat([weight.grad.flatten() for weight in player.weights.parameters() if weight.grad is not None]))
        player.weights.zero_grad()
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Nothing that is compiled, and no listener, outlives a test."""
    from torch._dynamo.callback import callback_handler

    yield
    torch._dynamo.reset()
    callback_handler.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("toy", "full"), ("sd3", "lora")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_update(name: str, mode: str, checkpointing: bool) -> None:
    """Graphs are captured and differentiated ahead, as for a GPU; the kernels are torch's own."""
    _, method, batch = ready(name, mode, gradient_checkpointing=checkpointing)
    expected, names = gradients(method, batch), list(method.trained.state_dict())
    heard: list[str] = []
    switch(method, SpeedConfig(compile=True), heard.append, backend="aot_eager")
    assert len(heard) == 1 and "blocks, each when it is first called" in heard[0]
    for one, other in zip(gradients(method, batch), expected, strict=True):
        assert relative(one, other) < CLOSE
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert list(method.trained.state_dict()) == names


class Stack(nn.Module):
    """Residual blocks, computed again in the backward pass if asked to."""

    def __init__(self, again: bool):
        super().__init__()
        self.again = again
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.SiLU()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.again else block(x))
        return x


@pytest.mark.parametrize("again", [False, True])
def test_blocks_are_compiled_but_those_that_are_looked_into(again: bool) -> None:
    denoiser = Denoiser(Stack(again), lambda network, x, t, condition, guidance: network(x), Flow(), "flow")
    xt, t, layers = torch.randn(4, 6), torch.linspace(0.2, 0.8, 4), ("blocks.1.0",)

    def answers() -> list[Tensor]:
        """Gradients of the output, of features on the way, and of features alone."""
        found = []
        for _ in range(2):  # The second time everything is compiled.
            whole = denoiser(xt, t, Condition({}), features=layers)
            for part in (whole.output, whole.features, denoiser.only_features(xt, t, Condition({}), features=layers)):
                part = part if isinstance(part, Tensor) else part[layers[0]]  # type: ignore[index]
                some = torch.autograd.grad(
                    part.square().sum(), list(denoiser.parameters()), allow_unused=True, retain_graph=True
                )
                found.append(torch.cat([x.flatten() for x in some if x is not None]))
        return found

    expected, names = answers(), list(denoiser.state_dict())
    compiled = compile_blocks(denoiser.network, layers, backend="aot_eager")
    assert compiled == [denoiser.network.blocks[0], denoiser.network.blocks[2]]
    assert all(relative(one, other) < CLOSE for one, other in zip(answers(), expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and list(denoiser.state_dict()) == names
    compile_blocks(denoiser.network, backend="aot_eager")
    if not again:  # Even a compiled block, whose hooks are not looked for, is seen into.
        assert all(relative(one, other) < CLOSE for one, other in zip(answers(), expected, strict=True))
        assert denoiser.network.blocks[1]._compiled_call_impl is not None, "afterwards it is compiled again"
    same = copy.deepcopy(denoiser)
    assert torch.equal(same(xt, t, Condition({})).output, denoiser(xt, t, Condition({})).output)


def test_what_is_compiled() -> None:
    kinds = {type(block).__name__ for block in repeated_blocks(Pipeline.wrap(tiny.toy()).network)}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    listed = nn.Sequential()
    listed.add_module("blocks", nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    assert repeated_blocks(listed) == list(listed.blocks)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no repeated blocks to compile"):
        compile_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_compiling_without_end_is_told() -> None:
    heard: list[str] = []
    counted = Compilations(heard.append, first=3)
    counted.listen()
    for count in range(1, 5):
        torch.compile(torch.sin, backend="eager", dynamic=False)(torch.ones(count, 2))
        torch._dynamo.reset_code_caches()
    counted.count = 3
    counted.heard()
    assert heard and all("versions of blocks were compiled" in line for line in heard)


@pytest.mark.parametrize(
    ("method", "own", "match"),
    [
        ("scm", ['method.tangent="exact"'], 'method.tangent = "exact"'),
        ("dmd2", ['train.sharding="fsdp"'], 'train.sharding = "fsdp"'),
    ],
)
def test_what_does_not_go_together_is_refused(method: str, own: list[str], match: str) -> None:
    path = ROOT / "configs" / "toy" / f"{method}.toml"
    refuse(config.load(path, own))
    with pytest.raises(UserError, match=match):
        refuse(config.load(path, [*own, "speed.compile=true"]))
    if method == "scm":
        refuse(config.load(path, ['method.tangent="central"', "speed.compile=true"]))


def test_channels_last_is_not_for_weights_that_are_cut() -> None:
    with pytest.raises(UserError, match=r'speed\.channels_last = true does not go with train.sharding = "fsdp"'):
        refuse(config.load(ROOT / "configs" / "toy" / "lcm.toml", ["speed.channels_last=true", 'train.sharding="fsdp"']))


def test_denoisers_that_are_made_later_are_switched_too() -> None:
    """Such as the teacher of sample grids: what fits in training fits in sampling."""
    run = config.load(ROOT / "configs" / "toy" / "lcm.toml", ["speed.batched_guidance=false", "speed.partial_passes=false"])
    pipeline = Pipeline.wrap(tiny.sd15())
    set_up(run, pipeline, print)
    for denoiser in (pipeline.frozen(), pipeline.trainable("another")):
        assert not denoiser.batched_guidance and not denoiser.partial


def test_channels_last_gives_the_same_update() -> None:
    _, method, batch = ready("toy", "full")
    expected, before = gradients(method, batch), dict(method.student.named_parameters())
    switch(method, SpeedConfig(channels_last=True), print)
    after = dict(method.student.named_parameters())
    assert all(after[name] is weight for name, weight in before.items()), "optimisers and averages hold these"
    assert not after["network.conv_in.weight" if "network.conv_in.weight" in after else "own.conv_in.weight"].is_contiguous()
    for one, other in zip(gradients(method, batch), expected, strict=True):
        assert relative(one, other) < CLOSE
    seen: list[bool] = []
    hook = lambda module, args, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))  # noqa: E731
    method.student.network.conv_in.register_forward_hook(hook)
    method.student(torch.randn(batch.shape), torch.full((2,), 0.5), batch.condition)
    assert seen == [True]
    with pytest.raises(UserError, match="networks of convolutions"):
        switch(ready("sd3", "full")[1], SpeedConfig(channels_last=True), print)
