"""Several LoRA roles on one base: they answer, and get gradients, as separate networks would."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.adapters import LoraOptions
from fastgen.denoiser import Condition, Denoiser
from fastgen.errors import UserError
from fastgen.pipelines import Pipeline, load_pipeline
from tests import tiny_models as tiny
from tests.tiny_models import PROMPTS

ROLES: dict[str, Any] = {"student": "lora", "fake": "lora"}
MODELS = {"toy": (tiny.toy, {}), "sd3": (tiny.sd3, {}), "flux": (tiny.flux, {"height": 64, "width": 64})}


def wrap(name: str = "toy", **options: Any) -> Pipeline:
    make, size = MODELS[name]
    return Pipeline.wrap(make(), **{"roles": ROLES, "lora": LoraOptions(rank=3, alpha=6.0)} | size | options)


def stir(denoiser: Denoiser, seed: int) -> Denoiser:
    """Move an adapter off its start, where its second factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return denoiser


def question(pipeline: Pipeline) -> tuple[Tensor, Tensor, Condition]:
    xt = torch.randn(2, *pipeline.latent_shape, generator=torch.Generator().manual_seed(5))
    return xt, torch.tensor([0.4, 0.9]), pipeline.encode_prompts(PROMPTS)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def gradients(denoiser: Denoiser) -> Tensor:
    missing = [name for name, p in denoiser.named_parameters() if p.grad is None]
    assert not missing
    return torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_roles_start_as_the_teacher_and_go_their_own_ways(name: str) -> None:
    pipeline = wrap(name)
    teacher, student, fake = pipeline.frozen(), pipeline.trainable("student"), pipeline.trainable("fake")
    xt, t, condition = question(pipeline)
    first = teacher(xt, t, condition).output
    assert torch.equal(student(xt, t, condition).output, first) and torch.equal(fake(xt, t, condition).output, first)
    stir(student, 1)
    moved = student(xt, t, condition).output
    assert relative(moved, first) > 1e-3
    assert torch.equal(fake(xt, t, condition).output, first)
    assert torch.equal(teacher(xt, t, condition).output, first)
    fake.load_state_dict(student.state_dict())
    assert torch.equal(fake(xt, t, condition).output, moved)


def test_a_role_owns_its_adapter_and_nothing_else() -> None:
    pipeline = wrap()
    student, fake = pipeline.trainable("student"), pipeline.trainable("fake")
    assert list(student.state_dict()) == list(fake.state_dict())
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in student.own.state_dict())
    mine, theirs = set(student.parameters()), set(fake.parameters())
    base = set(pipeline.network.parameters()) - mine - theirs
    assert not mine & theirs and mine and all(p.requires_grad for p in mine)
    assert not any(p.requires_grad for p in base) and not list(pipeline.frozen().parameters())
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in student.own.state_dict()


@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in MODELS), ("toy", True), ("sd3", True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_through_two_roles_has_the_gradients_of_separate_networks(name: str, dora: bool, checkpointing: bool) -> None:
    lora = LoraOptions(rank=3, alpha=6.0, dora=dora)

    def run(student: Denoiser, fake: Denoiser, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
        xt, t, condition = question(pipeline)
        x0 = student(xt, t, condition).x0
        again = student(x0 * 0.9, t * 0.5, condition).x0
        prediction = fake(again, t * 0.7, condition, features=pipeline.feature_layers)
        with torch.no_grad():
            target = pipeline.frozen()(xt, t, condition).x0
        terms = [(x * x).mean() for x in (prediction.features or {}).values()]
        (sum(terms) + (prediction.x0 - target).square().mean()).backward()
        return gradients(student), gradients(fake)

    pipeline = wrap(name, lora=lora, gradient_checkpointing=checkpointing)
    student, fake = stir(pipeline.trainable("student"), 1), stir(pipeline.trainable("fake"), 2)
    plain = wrap(name, lora=lora)
    alone = [copy.deepcopy(plain.trainable(role)) for role in ROLES]
    assert alone[0].network is not alone[1].network and alone[0].network is not plain.network
    for copied, original in zip(alone, (student, fake), strict=True):
        copied.load_state_dict(original.state_dict())
    together, apart = run(student, fake, pipeline), run(alone[0], alone[1], plain)
    assert relative(together[0], apart[0]) < 1e-6 and relative(together[1], apart[1]) < 1e-6
    base = set(pipeline.network.parameters()) - set(student.parameters()) - set(fake.parameters())
    assert all(p.grad is None for p in base)


def test_checkpointing_really_recomputes() -> None:
    pipeline = wrap(gradient_checkpointing=True)
    student, fake = pipeline.trainable("student"), stir(pipeline.trainable("fake"), 2)
    calls: list[str | None] = []
    host = student.own.host
    pipeline.network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(host.active))
    xt, t, condition = question(pipeline)
    loss = fake(student(xt, t, condition).x0, t, condition).x0.square().mean()
    assert calls == [student.own.key, fake.own.key]
    loss.backward()
    assert calls[2:] == [fake.own.key, student.own.key] and host.active is None


def test_calls_leave_the_turn_takers_flags_alone() -> None:
    pipeline = wrap()
    student, fake = stir(pipeline.trainable("student"), 1), stir(pipeline.trainable("fake"), 2)
    fake.requires_grad_(False)
    xt, t, condition = question(pipeline)
    fake(student(xt, t, condition).x0, t, condition).x0.square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in fake.parameters())
    assert all(p.grad is not None and p.requires_grad for p in student.parameters())


def test_an_error_in_a_call_leaves_the_base_bare() -> None:
    pipeline = wrap()
    teacher, student = pipeline.frozen(), stir(pipeline.trainable("student"), 1)
    xt, t, condition = question(pipeline)
    before = teacher(xt, t, condition).output
    with pytest.raises(RuntimeError):
        student(xt[:, :3], t, condition)
    assert student.own.host.active is None
    assert torch.equal(teacher(xt, t, condition).output, before)
    xt = torch.randn(2, *pipeline.latent_shape)
    with torch.no_grad():
        expected = pipeline.diffusers.unet(xt, 499, condition.inputs["encoder_hidden_states"]).sample
        assert torch.equal(teacher(xt, torch.full((2,), 0.5), condition).output, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_role_in_full_beside_an_adapter(checkpointing: bool) -> None:
    pipeline = wrap(roles={"student": "lora", "fake": "full"}, gradient_checkpointing=checkpointing)
    student, fake = stir(pipeline.trainable("student"), 1), pipeline.trainable("fake")
    assert not any("lora" in name or "base_layer" in name for name, _ in fake.named_parameters())
    xt, t, condition = question(pipeline)
    assert torch.equal(fake(xt, t, condition).output, pipeline.frozen()(xt, t, condition).output)
    fake(student(xt, t, condition).x0, t, condition).x0.square().mean().backward()
    assert len(gradients(fake)) == sum(p.numel() for p in pipeline.diffusers.unet.parameters()) - sum(
        p.numel() for p in student.parameters()
    )
    assert gradients(student).norm() > 0 and all(p.grad is None for p in pipeline.network.parameters() if not p.requires_grad)


def test_adapters_stay_in_single_precision_on_a_half_precision_base() -> None:
    pipeline = Pipeline.wrap(tiny.sd3().to(dtype=torch.bfloat16), roles=ROLES, lora=LoraOptions(rank=2))
    student = pipeline.trainable("student")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    prediction = student(*question(pipeline))
    assert prediction.output.dtype == torch.bfloat16
    prediction.x0.square().mean().backward()
    assert gradients(student).norm() > 0


def test_options() -> None:
    with pytest.raises(UserError, match="lora rank must be at least 1, not 0"):
        LoraOptions(rank=0)
    with pytest.raises(UserError, match="lora targets to_nowhere do not fit UNet2DConditionModel"):
        wrap(lora=LoraOptions(targets=("to_nowhere",))).trainable("student")
    with pytest.raises(UserError, match="lora init must be one of default, gaussian, not 'pissa'"):
        LoraOptions(init="pissa")  # type: ignore[arg-type]
    few = wrap(lora=LoraOptions(rank=2, targets=("to_q",))).trainable("student")
    assert all("to_q" in key for key in few.state_dict())


def test_ranks_of_single_roles_keep_the_scale() -> None:
    options = LoraOptions(rank=8, alpha=4.0, ranks={"fake": 2})
    pipeline = wrap(lora=options)
    student, fake = pipeline.trainable("student"), pipeline.trainable("fake")
    assert {p.shape[0] for name, p in student.named_parameters() if "lora_A" in name} == {8}
    assert {p.shape[0] for name, p in fake.named_parameters() if "lora_A" in name} == {2}
    assert [role.own.options.alpha / role.own.options.rank for role in (student, fake)] == [0.5, 0.5]
    assert LoraOptions(rank=8, ranks={"student": 4}).for_role("previous").rank == 4
    with pytest.raises(UserError, match="lora rank of role 'fake' must be at least 1, not 0"):
        LoraOptions(ranks={"fake": 0})


def test_gaussian_first_factors_leave_the_base_as_it_is() -> None:
    pipeline = wrap(lora=LoraOptions(rank=16, init="gaussian"))
    student = pipeline.trainable("student")
    first = torch.cat([p.flatten() for name, p in student.named_parameters() if "lora_A" in name])
    assert float(first.std()) == pytest.approx(1 / 16, rel=0.05)
    assert all(not p.any() for name, p in student.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("name", ["toy", "sd3"])
def test_magnitudes_are_an_adapters_own(name: str) -> None:
    pipeline = wrap(name, lora=LoraOptions(rank=3, dora=True))
    teacher, student = pipeline.frozen(), pipeline.trainable("student")
    xt, t, condition = question(pipeline)
    assert relative(student(xt, t, condition).output, teacher(xt, t, condition).output) < 1e-5
    keys = student.own.state_dict().keys()
    layers = {key.rpartition(".lora_A")[0] for key in keys if ".lora_A." in key}
    assert {key.rpartition(".lora_magnitude_vector")[0] for key in keys if ".lora_magnitude_vector." in key} == layers
    before = {key: p.detach().clone() for key, p in student.named_parameters()}
    with torch.no_grad():
        for key, p in student.named_parameters():
            if "magnitude" in key:
                p.mul_(1.5)
    assert relative(student(xt, t, condition).output, teacher(xt, t, condition).output) > 1e-2
    student.load_state_dict(before)
    student(xt, t, condition).x0.square().mean().backward()
    assert all(p.grad is not None for key, p in student.named_parameters() if "lora_A" not in key)
    own = set(student.parameters())
    assert all(p.grad is None for p in pipeline.network.parameters() if p not in own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "toy"
    tiny.toy().save_pretrained(path)
    return path


def saved_lora(pipeline: Pipeline, student: Denoiser, to: Path) -> Path:
    """The adapter as diffusers itself writes it, with its scale in the weights."""
    scale = 6.0 / 3
    weights = {k: v * scale if "lora_B" in k else v.clone() for k, v in student.own.state_dict().items()}
    pipeline.diffusers.save_lora_weights(to, unet_lora_layers=weights, weight_name="style.safetensors")
    return to / "style.safetensors"


def test_a_teachers_lora_becomes_part_of_it(folder: Path, tmp_path: Path) -> None:
    pipeline = wrap()
    student = stir(pipeline.trainable("student"), 1)
    file = saved_lora(pipeline, student, tmp_path)
    styled = load_pipeline(str(folder), teacher_loras=[str(file)], roles=ROLES, lora=LoraOptions(rank=3))
    xt, t, condition = question(pipeline)
    expected = student(xt, t, condition).output
    assert relative(styled.frozen()(xt, t, condition).output, expected) < 1e-4
    assert relative(styled.trainable("student")(xt, t, condition).output, expected) < 1e-4
    assert not any("lora" in name for name, _ in load_pipeline(str(folder), teacher_loras=[str(file)]).network.named_modules())


def test_loras_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    pipeline = wrap()
    file = saved_lora(pipeline, pipeline.trainable("student"), tmp_path)
    weights = load_file(file)
    key = next(key for key in weights if "to_q.lora_A" in key)

    def spoilt(name: str, changed: dict[str, Tensor]) -> str:
        save_file(changed, tmp_path / name)
        return str(tmp_path / name)

    other_shape = {k: (v[:, :-1] if k == key else v).contiguous() for k, v in weights.items()}
    other_rank = {k: (torch.cat([v, v]) if k == key else v).contiguous() for k, v in weights.items()}
    other_network = {k.replace("unet.", "transformer."): v for k, v in weights.items()}
    one_unknown = {k.replace("to_q", "to_z") if k == key else k: v for k, v in weights.items()}
    nonsense = {"a": torch.zeros(2)}
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (
        spoilt("shape.safetensors", other_shape),
        spoilt("rank.safetensors", other_rank),
        spoilt("network.safetensors", other_network),
        spoilt("unknown.safetensors", one_unknown),
        spoilt("nonsense.safetensors", nonsense),
        str(tmp_path / "text.safetensors"),
        str(tmp_path / "nowhere.safetensors"),
        str(tmp_path / "style.bin"),
    ):
        with pytest.raises(UserError, match="teacher LoRA") as caught:
            load_pipeline(str(folder), teacher_loras=[path])
        assert Path(path).name in str(caught.value) and "\n" not in str(caught.value)


def test_a_role_that_is_not_named_goes_as_the_student() -> None:
    pipeline = wrap("toy", roles={"student": "lora", "fake_score": "full"})
    assert [pipeline.mode(role) for role in ("student", "previous", "fake_score")] == ["lora", "lora", "full"]
    assert pipeline.trainable("previous").state_dict().keys() == pipeline.trainable("student").state_dict().keys()
    assert Pipeline.wrap(tiny.toy()).mode("previous") == "full"
