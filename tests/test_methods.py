"""What holds for every method: who gets gradients, what stays frozen, how the student is sampled, how a run resumes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import methods
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.method import Batch, Method, Player
from fastgen.pipelines import LoraOptions, Pipeline
from fastgen.pipelines.base import Mode
from fastgen.process import Kind, Process
from tests import tiny_models
from tests.method_fakes import PROCESSES, FakePipeline, batches, train

SMALL: dict[str, dict[str, Any]] = {  # options with which a few updates reach everything that a method has
    "add": {"backbone": "toy"},
    "consistency": {"ema_decay": 0.5},
    "dmd2": {"student_every": 2, "guidance": 2.0},
    "f_distill": {"student_every": 2},
    "guidance_distillation": {"steps": 8},
    "lcm": {"ema_decay": 0.5, "solver_steps": 2},
    "lightning": {"start_steps": 8, "student_steps": (4, 2, 1), "objectives": ("mse", "conditional", "unconditional")},
    "phased_dmd": {"student_every": 2},
    "progressive": {"start_steps": 8, "stop_steps": 2, "guidance": 2.0},
    "rcm": {"student_every": 2},
    "sid_few_step": {"gan_weight": 0.01},
    "snapfusion": {"start_steps": 8, "stop_steps": 4},
}
GUIDED = {"guidance_distillation", "snapfusion"}
"""Students that are guided in sampling: they are told the scale, or are distilled with guidance and keep it."""

TOLD_ENDS = {"mean_flow", "shortcut"}
"""Students that are told where their step ends, which no stock scheduler does."""

WORLDS: list[tuple[str, Kind]] = [("vp", "eps"), ("vp", "v"), ("flow", "flow")]
EVERY = pytest.mark.parametrize("name", methods.names())
WORLD = pytest.mark.parametrize(("process", "kind"), WORLDS, ids=["-".join(world) for world in WORLDS])


def ready(name: str, process: Process, kind: Kind = "v", base: dict[str, Tensor] | None = None) -> Method:
    """A method that has been set up, and as `method.pipeline` the pipeline, of these `base` weights, it was set up with."""
    method = methods.find(name)(**SMALL.get(name, {}))
    method.pipeline = FakePipeline(process, (3, 4, 4), kind, default_guidance=3.0)
    if base is not None:
        method.pipeline.base.load_state_dict(base)
    method.setup(method.pipeline)
    return method


def copies(denoiser: Denoiser) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in denoiser.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@EVERY
@WORLD
def test_only_the_mover_learns(name: str, process: str, kind: Kind) -> None:
    method = ready(name, PROCESSES[process], kind)
    players = {player.name: player for player in method.players()}
    before = {key: [w.detach().clone() for w in player.weights.parameters()] for key, player in players.items()}
    frozen = method.pipeline.frozen().state_dict()
    base = {key: value.clone() for key, value in frozen.items()}
    turns: dict[str, Player] = {}

    def check(player: Player, terms: dict[str, Tensor]) -> None:
        turns[player.name] = player
        assert all(term.ndim == 0 and term.isfinite() for term in terms.values()), terms
        own = {id(weight) for weight in player.weights.parameters()}
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in player.weights.parameters())
        others = [weight for made in method.pipeline.made.values() for weight in made.parameters() if id(weight) not in own]
        others += [
            weight for other in (players | turns).values() for weight in other.weights.parameters() if id(weight) not in own
        ]
        others += list(method.pipeline.base.parameters())
        assert all(weight.grad is None for weight in others)

    train(method, batches(method.pipeline, 6, pairs=True), 6, 1e-3, after_turn=check)
    assert set(players) <= set(turns)
    for key, player in players.items():
        # The last bias of a head has no gradient while a hinge counts every sample, real and fake, alike.
        moved = [not torch.equal(a, w) for a, w in zip(before[key], player.weights.parameters(), strict=True) if w.numel() > 1]
        assert all(moved), key
    assert same(base, frozen)


@EVERY
@WORLD
def test_the_student_is_sampled_and_exported(name: str, process: str, kind: Kind) -> None:
    method = ready(name, PROCESSES[process], kind)
    sampler = method.sampler()
    condition = method.pipeline.encode_prompts(["0", "1"])
    with torch.no_grad():
        x = sampler.sample(method.trained, torch.randn(2, 3, 4, 4), condition)
    assert x.shape == (2, 3, 4, 4) and x.isfinite().all()
    if name == "mean_flow":
        assert method.sampler(99).steps == 99
    else:
        with pytest.raises(UserError, match=r"steps.*not (for )?99"):
            method.sampler(99)
    assert method.sampler(sampler.steps).steps == sampler.steps
    if name in TOLD_ENDS:
        return
    spec = sampler.scheduler(PROCESSES[process], kind)
    assert spec.class_name.endswith("Scheduler") and spec.call["guidance_scale"] == sampler.guidance
    assert (sampler.guidance == 1) == (name not in GUIDED)


@EVERY
def test_a_resumed_run_goes_on_alike(name: str) -> None:
    def run(updates: range, method: Method) -> None:
        source = batches(method.pipeline, 4, pairs=True)
        for step in updates:
            method.advance(step, 6)
            for player in method.players():
                loss = torch.stack(list(player.loss(next(source)).values())).sum()
                weights = list(player.weights.parameters())
                grads = torch.autograd.grad(loss, weights)
                with torch.no_grad():
                    for weight, grad in zip(weights, grads, strict=True):
                        weight.sub_(1e-2 * grad)

    torch.manual_seed(1)
    straight = ready(name, PROCESSES["flow"], "flow")
    run(range(4), straight)
    state = straight.state()
    saved = {player.name: {k: v.clone() for k, v in player.weights.state_dict().items()} for player in straight.players()}
    kept = {k: {n: w.clone() for n, w in v.items()} if isinstance(v, dict) else v for k, v in state.items()}
    random = torch.get_rng_state()
    run(range(4, 6), straight)
    torch.manual_seed(2)
    resumed = ready(name, PROCESSES["flow"], "flow", straight.pipeline.base.state_dict())
    resumed.load_state(kept)
    for player in resumed.players():
        player.weights.load_state_dict(saved[player.name])
    torch.set_rng_state(random)
    run(range(4, 6), resumed)
    for a, b in zip(straight.players(), resumed.players(), strict=True):
        assert same(a.weights.state_dict(), b.weights.state_dict())


@EVERY
def test_a_network_that_embeds_guidance_is_told_it(name: str) -> None:
    pipeline = FakePipeline(PROCESSES["flow"], (3, 4, 4), "flow", default_guidance=3.5, embeds_guidance=True)
    options = {key: value for key, value in SMALL.get(name, {}).items() if key != "guidance"}
    method = methods.find(name)(**options)
    if name == "guidance_distillation":  # such a network is what it makes
        with pytest.raises(UserError, match=r"as an input already.* guidance_low = 3 .*begin with progressive"):
            method.setup(pipeline)
        return
    method.setup(pipeline)
    told = method.sampler().guidance
    low, high = (getattr(method, f"guidance_{end}", None) for end in ("low", "high"))
    scales = getattr(method, "guidance_scales", None) or (getattr(method, "guidance", None) or 3.5,)
    assert told in scales or (low is not None and low <= told <= high)
    train(method, batches(pipeline, 4, pairs=True), 6, 1e-3)
    assert method.trained.network.told.weight.ne(pipeline.base.told.weight).any()


BUILDS = [tiny_models.toy, tiny_models.sd3, pytest.param(tiny_models.flux, marks=pytest.mark.slow)]


@EVERY
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_diffusers_pipelines(name: str, build: Callable[[], Any], mode: Mode) -> None:
    """All players of every method move on stock networks, and with LoRA the base that they share gets no gradient."""
    torch.manual_seed(0)
    roles: dict[str, Mode] = {"student": mode}  # the others go as the student does
    pipeline = Pipeline.wrap(build(), roles=roles, lora=LoraOptions(rank=2))
    method = methods.find(name)(**(SMALL.get(name, {}) | ({"guidance": None} if build is tiny_models.flux else {})))
    if name == "guidance_distillation" and (mode == "lora" or build is not tiny_models.toy):
        with pytest.raises(UserError, match="guidance scale"):  # LoRA and SD3 have no place for it, FLUX has it
            method.setup(pipeline)
        return
    method.setup(pipeline)
    condition, shape = pipeline.encode_prompts(["a red cube", "a blue ball"]), (2, *pipeline.latent_shape)
    batch = Batch(condition, shape, *torch.randn(3, *shape), prompts=("a red cube", "a blue ball"))
    for stage in (0, 4):
        method.advance(stage, 6)
        for player in method.players():
            own = [weight for weight in player.weights.parameters() if weight.requires_grad]
            with torch.no_grad():  # a fake score that is the teacher still moves no student
                for weight in own:
                    weight += 0.02 * torch.randn_like(weight)
            loss = torch.stack(list(player.loss(batch).values())).sum()
            grads = torch.autograd.grad(loss, own, allow_unused=True)
            assert loss.isfinite() and sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0
    assert not any(weight.requires_grad for weight in pipeline.frozen().parameters())
    with torch.no_grad():
        x = method.sampler().sample(method.trained, torch.randn(shape), condition)
    assert x.isfinite().all()
    if name not in TOLD_ENDS:
        assert method.sampler().scheduler(pipeline.process, pipeline.kind).class_name


@EVERY
def test_every_option_has_a_line_of_help(name: str) -> None:
    cls = methods.find(name)
    for each in dataclasses.fields(cls):
        assert 10 < len(each.metadata["help"]) < 100, each.name
    first_line = (cls.__doc__ or "").split("\n")[0]
    assert re.search(r"\(.* 20\d\d.*\)", first_line), "the first line names the paper"


def test_names_and_nearest() -> None:
    assert {"progressive", "lcm", "dmd2"} <= set(methods.names())
    assert methods.names() == sorted(methods.names())
    with pytest.raises(UserError, match="no method 'dmd3'; did you mean 'dmd"):
        methods.find("dmd3")
    with pytest.raises(UserError, match=r"there are .*lcm"):
        methods.find("qqqqqqqq")
    with pytest.raises(UserError, match=r"no method 'os\.path'"):
        methods.find("os.path")


def test_installed_packages_add_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("other", "fastgen.methods.lcm:LCM", methods.GROUP),
        EntryPoint("broken", "no_such_package:Method", methods.GROUP),
        EntryPoint("wrong", "fastgen.errors:UserError", methods.GROUP),
    ]
    monkeypatch.setattr(methods, "entry_points", lambda group: points if group == "fastgen.methods" else [])
    assert {"other", "lcm"} <= set(methods.names())
    assert methods.find("other") is methods.find("lcm")
    with pytest.raises(UserError, match="'broken' from no_such_package:Method cannot be imported"):
        methods.find("broken")
    with pytest.raises(UserError, match=r"'wrong' .* is not a subclass"):
        methods.find("wrong")
