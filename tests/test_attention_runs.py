"""Updates, derivatives and runs under the kernels of this machine: the same numbers, and a run keeps what it began with."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention as benchmark
from fastgen.attention import inference
from fastgen.attention.choose import Choice
from fastgen.attention.kernels import KERNELS
from fastgen.attention.processors import kernel_of, kernel_set, set_kernel
from fastgen.cli.kernels import add_attention, set_attention
from fastgen.cli.options import add_common
from fastgen.config import DataConfig, RunConfig, SpeedConfig, TrainConfig
from fastgen.errors import UserError
from fastgen.method import Batch, Method
from fastgen.methods.lcm import LCM
from fastgen.methods.scm import SCM
from fastgen.pipelines import Pipeline
from fastgen.pipelines.tiny.transformers import qwen_image
from fastgen.tangents import derivative
from fastgen.training import attention as training_attention
from fastgen.training.attention import one_pass, recorded, settle_attention, takes_forward_mode
from tests import tiny_models as tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    return {"sd15": Pipeline.wrap(tiny.sd15())}


# -- updates and derivatives --------------------------------------------------------------------------


def update(pipeline: Pipeline, method: Method, kernel: str) -> torch.Tensor:
    """The gradient of a method's update of a student of the pipeline, all weights in one."""
    with kernel_set(pipeline.network, kernel):
        torch.manual_seed(0)
        method.setup(pipeline)
        condition = pipeline.encode_prompts(["a red cube", "a blue ball"])
        shape = (2, *pipeline.latent_shape)
        player = method.players()[0]
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(1)
        sum(player.loss(Batch(condition, shape, latents=latents)).values(), torch.zeros(())).backward()
    grads = [weight.grad.flatten() for weight in player.weights.parameters() if weight.grad is not None]
    return torch.cat(grads)


@pytest.mark.parametrize("kernel", ["native_math", "native_flash"])
def test_an_update_is_the_same_with_every_kernel_of_this_machine(pipelines: dict[str, Pipeline], kernel: str) -> None:
    """To 1e-3 of the gradient: roundings of 1e-7 an operation, which a random network of a few layers makes larger."""
    before = update(pipelines["sd15"], LCM(), "native")
    found = update(pipelines["sd15"], LCM(), kernel)
    assert before.norm() > 0
    assert (found - before).norm() < 1e-3 * before.norm()


def test_a_derivative_is_the_same_whatever_kernel_was_set(pipelines: dict[str, Pipeline]) -> None:
    """Our rules take the kernel's place while the derivative is taken, and leave it as it was."""
    pipeline = pipelines["sd15"]
    denoiser, condition = pipeline.frozen(), pipeline.encode_prompts(["a red cube"])
    x, t = torch.randn(1, *pipeline.latent_shape), torch.full((1,), 0.5)

    def speed() -> torch.Tensor:
        return derivative(lambda x, t: denoiser(x, t, condition).output, denoiser, x, t, torch.ones_like(x))

    before = speed()
    for kernel in ("native_math", "native_flash"):
        with kernel_set(pipeline.network, kernel):
            torch.testing.assert_close(speed(), before)
            assert kernel_of(pipeline.network) == kernel


def test_which_methods_take_derivatives_in_forward_mode() -> None:
    assert takes_forward_mode(SCM()) and takes_forward_mode(SCM(tangent="semi"))
    assert not takes_forward_mode(SCM(tangent="central")) and not takes_forward_mode(LCM())


# -- runs -------------------------------------------------------------------------------------------


def settled(
    pipeline: Pipeline, asked: str, folder: Path, *, method: Method | None = None, start: Path | None = None, **train: Any
) -> tuple[dict[str, Any], list[str]]:
    """What `settle_attention` returns for a run in `folder`, and says."""
    said: list[str] = []
    options = TrainConfig(**{"batch": 4, "micro_batches": 2, **train})
    speed = SpeedConfig(attention=asked)  # type: ignore[arg-type]
    run = RunConfig("lcm", method or LCM(), data=DataConfig(cache=str(folder / "cache")), train=options, speed=speed)
    return settle_attention(run, pipeline, start, folder, CPU, autocast=nullcontext, say=said.append), said


@pytest.fixture
def pipeline(pipelines: dict[str, Pipeline]) -> Iterator[Pipeline]:
    yield pipelines["sd15"]
    set_kernel(pipelines["sd15"].network, "native")


def test_on_a_cpu_a_run_starts_as_ever_and_says_so(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_attention, "watch", None)  # would be called
    told, said = settled(pipeline, "auto", tmp_path)
    assert told == {"attention": {"kernel": "native", "asked": "auto"}}
    assert said == ["attention: native, torch's own choice, the only one to have on a cpu"]
    assert not (tmp_path / "cache").exists()


def test_a_run_on_a_gpu_measures_its_own_calls(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def choose(asked: str, calls: list[Any], **options: Any) -> Choice:
        seen.update(options, calls=calls)
        return Choice("native_flash", asked, {"native": 2.0, "native_flash": 1.0}, line="a line")

    monkeypatch.setattr(training_attention, "needs_watching", lambda asked, device: True)
    monkeypatch.setattr(training_attention, "choose", choose)
    before = torch.get_rng_state()
    told, said = settled(pipeline, "auto", tmp_path, method=SCM())
    assert torch.equal(torch.get_rng_state(), before), "no random number of the run's is drawn"
    assert seen["training"] and seen["forward_mode"] and seen["cache"] == tmp_path / "cache"
    assert {len(each.query) for each in seen["calls"]} == {2, 4}, "a micro-batch, and a guided one"
    assert kernel_of(pipeline.network) == kernel_of(pipeline.trainable("student").network) == "native_flash"
    assert said == ["a line"] and told["attention"]["seconds"] == {"native": 2.0, "native_flash": 1.0}


def test_a_resumed_run_keeps_its_kernel_whatever_is_measured_now(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"attention": {"kernel": "native_math", "asked": "auto"}}))
    monkeypatch.setattr(training_attention, "choose", None)  # would be called
    told, said = settled(pipeline, "auto", tmp_path)
    assert kernel_of(pipeline.network) == told["attention"]["kernel"] == "native_math"
    assert said == ["attention: native_math, as this run began"]
    elsewhere = tmp_path / "new"
    assert settled(pipeline, "auto", elsewhere, start=tmp_path / "checkpoints" / "step-00000002")[0] == told, "beside it"
    monkeypatch.setattr(training_attention, "missing", lambda kernel, named: "it was taken away")
    with pytest.raises(UserError, match='this run began with the attention kernel "native_math", but it was taken away'):
        settled(pipeline, "auto", tmp_path)


def test_who_asks_for_another_kernel_gets_it(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"attention": {"kernel": "native_math", "asked": "auto"}}))
    assert settled(pipeline, "native_flash", tmp_path)[0] == {"attention": {"kernel": "native_flash", "asked": "native_flash"}}
    assert kernel_of(pipeline.network) == "native_flash"


def test_a_kernel_that_a_run_began_with_elsewhere_may_not_serve_here(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"attention": {"kernel": "native_efficient", "asked": "auto"}}))
    words = 'began with the attention kernel "native_efficient", but it runs on cuda, not on cpu; set speed.attention anew'
    with pytest.raises(UserError, match=words):
        settled(pipeline, "auto", tmp_path)


def test_the_masks_that_guidance_makes_are_seen() -> None:
    """A single prompt has no padding; beside the empty one, which is shorter, it has."""
    pipeline = Pipeline.wrap(qwen_image())
    run = RunConfig("lcm", LCM(), train=TrainConfig(batch=1, sample_prompts=["a small red circle left of a large blue ring"]))
    assert {each.mask_kind for each in one_pass(run, pipeline, nullcontext)} == {None, "keys"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attention": "native"}', '{"attention": {"kernel": "x", "asked": "auto"}}'])
def test_records_that_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    assert recorded(tmp_path / "environment.json", "auto") is None
    assert recorded(tmp_path / "none.json", "auto") is None


@pytest.mark.parametrize(
    ("asked", "method", "words"),
    [
        ("sage", LCM(), "it has no backward pass"),
        ("flash", LCM(), "it runs on cuda, not on cpu"),
        ("native_flash", SCM(), "it has no derivative in forward mode, which this method takes"),
    ],
)
def test_a_run_refuses_a_kernel_that_cannot_train_it(
    pipeline: Pipeline, tmp_path: Path, asked: str, method: Method, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(training_attention, "one_pass", None)  # would be called: it is refused before
        with pytest.raises(UserError, match=words):
            settled(pipeline, asked, tmp_path, method=method)
    with pytest.raises(UserError, match=f'speed.attention: the kernel "{asked}" cannot be had here: {words}'):
        settled(pipeline, asked, tmp_path, method=method)
    assert (
        settled(pipeline, "native_flash", tmp_path, method=SCM(tangent="central"))[0]["attention"]["kernel"] == "native_flash"
    )


def test_all_processes_have_the_choice_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def broadcast(number: torch.Tensor, source: int) -> None:
        number.fill_(sent.pop()) if sent else sent.append(int(number))

    monkeypatch.setattr(training_attention.dist, "broadcast", broadcast)
    monkeypatch.setattr(training_attention, "processes", lambda: 2)

    def refuse() -> Choice:
        raise UserError("no such luck")

    for make, kernel in ((lambda: Choice("xformers", "auto"), "xformers"), (refuse, None)):
        for rank in (0, 1):
            monkeypatch.setattr(training_attention, "rank", lambda rank=rank: rank)
            if kernel is None:
                with pytest.raises(UserError, match="no such luck" if rank == 0 else "the first process cannot"):
                    training_attention.alike(make, CPU)
            else:
                assert training_attention.alike(make, CPU).kernel == kernel


# -- sampling and measuring ---------------------------------------------------------------------------


def test_a_network_that_samples_is_settled_at_its_first_call(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    network, said, seen = copy.deepcopy(pipeline.network), [], []
    condition = pipeline.encode_prompts(["a red cube"])
    noise, time = torch.randn(1, *pipeline.latent_shape), torch.full((1,), 0.5)

    def choose(asked: str, calls: list[Any], **options: Any) -> Choice:
        seen.append((len(calls), options["training"]))
        return Choice("native_math", asked, line="chosen")

    monkeypatch.setattr(inference, "choose", choose)
    inference.settle_at_first_call(network, "native_math", where="--attention", say=said.append)
    assert seen == [(0, False)] and kernel_of(network) == "native", "refused at once where it cannot be had at all"
    before = pipeline.call(pipeline.network, noise, time, condition)
    for _ in range(2):
        torch.testing.assert_close(pipeline.call(network, noise, time, condition), before, atol=1e-4, rtol=1e-4)
    assert len(seen) == 2 and seen[1][0] > 0 and said == ["chosen"] and kernel_of(network) == "native_math"


def test_a_first_call_that_fails_leaves_the_kernel_to_the_next(pipeline: Pipeline) -> None:
    network = copy.deepcopy(pipeline.network)
    inference.settle_at_first_call(network, "native_math", where="--attention")
    with pytest.raises(TypeError):
        network()
    condition, noise = pipeline.encode_prompts(["a red cube"]), torch.randn(1, *pipeline.latent_shape)
    pipeline.call(network, noise, torch.full((1,), 0.5), condition)
    assert kernel_of(network) == "native_math"


def test_the_commands_that_sample_take_a_kernel(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(name: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        add_attention(parser)
        add_common(parser, "somewhere")
        return parser.parse_args(["--attention", name])

    network = copy.deepcopy(pipeline.network)
    for name, words in {
        "saga": "did you mean 'sage'",
        "flash": "--attention flash: the kernel .* runs on cuda, not on cpu",
    }.items():
        with pytest.raises(UserError, match=words):
            set_attention(asked(name), [network])
    condition = pipeline.encode_prompts(["a red cube"])
    for name in ("native", "native_flash", "auto"):
        set_attention(asked(name), [network, network])
        pipeline.call(network, torch.randn(1, *pipeline.latent_shape), torch.full((1,), 0.5), condition)
        assert kernel_of(network) == ("native" if name == "auto" else name)
    assert "attention: native_flash, as asked" in capsys.readouterr().err


def test_the_benchmark_measures_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--presets", "toy", "sana", "--rounds", "1", "--output", str(tmp_path / "attention.json")])
    record = json.loads((tmp_path / "attention.json").read_text())
    for preset in ("toy", "sana"):
        rows = record["presets"][preset]["kernels"]
        assert set(rows) == set(KERNELS)
        assert rows["native"]["forward_ratio"] == rows["native"]["forward_backward_ratio"] == 1
        assert rows["native_math"]["output_error"] < 1e-5 and rows["native_math"]["gradient_error"] < 1e-5
        assert rows["sage"]["left_out"]
    assert "no masks" in record["presets"]["sana"]["kernels"]["native_flash"]["left_out"]
    assert "native_math" in capsys.readouterr().out
