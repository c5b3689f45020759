"""Latency: what a record holds, which calls are made and counted, and that the pipeline comes back as it was. No timings."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval.latency import Watch, compiled, measure_latency, peak_memory, placed


@cache
def pipeline():
    """A random UNet, VAE and text encoder in a stock pipeline class: 16 x 16 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from fastgen.data.toy.tokenizer import toy_tokenizer

    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    vae = AutoencoderKL(
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    unet = UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **blocks,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(), safety_checker=None, feature_extractor=None
    )


def state() -> tuple:
    """What could be left behind on the pipeline."""
    unet = pipeline().unet
    hooks = len(unet._forward_hooks), len(unet._forward_pre_hooks), len(unet._forward_hooks_with_kwargs)
    return hooks, "forward" in unet.__dict__, unet.forward.__func__, str(pipeline().device), type(unet), unet.training


def test_a_record_and_its_counts():
    before = state()
    found = measure_latency(pipeline(), steps=3, guidance=2.0, batches=(2, 1), warmup=2, repeats=3, prompt="a small red circle")
    assert json.loads(json.dumps(found)) == found
    assert state() == before
    assert (found["pipeline"], found["network"]) == ("StableDiffusionPipeline", "UNet2DConditionModel")
    assert found["precision"] == "float32" and found["attention"] == "native" and found["compile"] is False
    assert found["threads"] == torch.get_num_threads() and found["device"].startswith("cpu")
    assert [entry["batch"] for entry in found["batches"]] == [1, 2]
    for entry in found["batches"]:
        assert (entry["height"], entry["width"]) == (16, 16)
        assert entry["network_calls"] == 3 and entry["network_samples"] == 3 * 2 * entry["batch"]
        assert len(entry["seconds_all"]) == 3
        assert 0 < min(entry["seconds_all"]) <= entry["seconds_low"] <= entry["seconds"] <= entry["seconds_high"]
        assert entry["images_per_second"] == pytest.approx(entry["batch"] / entry["seconds"])
        assert 0 < 3 * entry["seconds_per_step"] < max(entry["seconds_all"])
        assert entry["memory"] == "resident memory of the process" and entry["peak_memory_bytes"] > 10**7
    assert found["first_image_seconds"] == found["batches"][0]["seconds"]


def test_the_network_runs_for_every_announced_call(monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[int, dict]] = []

    def fake(given, prompts, seeds, **options):
        made.append((len(prompts), options))
        given.unet(torch.zeros(len(prompts), 4, 8, 8), 1, torch.zeros(len(prompts), 7, 16))
        return torch.zeros(len(prompts), 3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr("fastgen.eval.latency.generate", fake)
    found = measure_latency(pipeline(), steps=1, batches=(4,), warmup=3, repeats=2, call={"eta": 0.5})
    assert [number for number, _ in made] == [4] * (1 + 3 + 2)
    assert made[0][1]["call"] == {"eta": 0.5} and made[0][1]["guidance"] is None and made[0][1]["batch"] == 4
    assert found["batches"][0]["network_calls"] == 1 and found["batches"][0]["network_samples"] == 4
    assert found["call"] == {"eta": "0.5"}


def test_too_large_a_batch_is_told_and_the_others_stay(monkeypatch: pytest.MonkeyPatch):
    def fake(given, prompts, seeds, **options):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return torch.zeros(len(prompts), 3, 16, 16, dtype=torch.uint8)

    before = state()
    monkeypatch.setattr("fastgen.eval.latency.generate", fake)
    found = measure_latency(pipeline(), steps=1, batches=(1, 64), warmup=1, repeats=1)["batches"]
    assert found[0]["seconds"] > 0 and found[1] == {"batch": 64, "failed": "out of memory on cpu"}
    assert state() == before


def test_compiled_it_makes_the_same_pictures_and_comes_back(monkeypatch: pytest.MonkeyPatch):
    before, asked = state(), []

    def compile(function, **options):
        asked.append(options)
        return lambda *arguments, **named: function(*arguments, **named)

    monkeypatch.setattr(torch, "compile", compile)
    options = {"steps": 2, "batches": (1, 2), "warmup": 1, "repeats": 1, "prompt": "a small red circle"}
    found = measure_latency(pipeline(), compile=True, **options)
    assert found["compile"] == "inductor" and [entry["network_calls"] for entry in found["batches"]] == [2, 2]
    assert asked == [{"dynamic": False, "backend": "inductor"}] * 2
    assert state() == before
    assert measure_latency(pipeline(), compile="eager", **options)["compile"] == "eager"
    assert asked[-1]["backend"] == "eager"


def test_torch_compiles_a_network_whose_hooks_stay():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU())
    watch, own = Watch(layer, torch.device("cpu")), lambda x: x + 1
    x = torch.randn(2, 3)
    expected = layer(x)
    with compiled(layer, "eager"), watch.watching():
        torch.testing.assert_close(layer(x), expected)
        layer(x)
        assert "forward" in layer.__dict__
    assert watch.calls == 2 and watch.samples == 4 and watch.seconds > 0
    assert "forward" not in layer.__dict__ and not layer._forward_hooks and not layer._forward_pre_hooks
    layer.forward = own
    with compiled(layer, "eager"):
        assert torch.equal(layer(x), x + 1)
    assert layer.forward is own


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch):
    before = state()

    def compile(function, **options):
        def fail(*arguments, **named):
            raise RuntimeError("no compiler found\nmore about that")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(
        UserError, match=r"UNet2DConditionModel cannot be compiled here \(no compiler found\); measure it without"
    ):
        measure_latency(pipeline(), steps=1, batches=(1,), compile=True, prompt="a small red circle")
    assert state() == before


def test_memory_is_watched_while_it_is_used():
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as found:
        block = torch.ones(60_000_000)
        for _ in range(3):
            block.add_(1)
        del block
    assert found["peak_memory_bytes"] > before["peak_memory_bytes"] + 200_000_000


def test_a_pipeline_is_moved_and_moved_back():
    class Movable:
        def __init__(self):
            self.device, self.moves = torch.device("cuda:1"), []

        def to(self, device):
            self.device = torch.device(device)
            self.moves.append(str(device))

    for wanted, moves in (
        (None, []),
        ("cuda", []),
        ("cuda:1", []),
        ("cuda:0", ["cuda:0", "cuda:1"]),
        ("cpu", ["cpu", "cuda:1"]),
    ):
        movable = Movable()
        with placed(movable, wanted) as place:
            assert place.type == torch.device(wanted or "cuda").type
        assert movable.moves == moves and movable.device == torch.device("cuda:1")


@pytest.mark.parametrize("name, value", [("warmup", 0), ("repeats", 0), ("batches", (0, 1)), ("batches", ())])
def test_counts_below_one_are_named(name: str, value):
    with pytest.raises(UserError, match=f"at least 1 for {name}, not 0"):
        measure_latency(pipeline(), **{name: value})


def test_arguments_that_the_pipeline_does_not_take_are_named():
    before = state()
    with pytest.raises(UserError, match="takes no argument 'sharpness'"):
        measure_latency(pipeline(), steps=1, batches=(1,), call={"sharpness": 3})
    assert state() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_is_the_allocators():
    found = measure_latency(pipeline(), steps=2, batches=(1,), repeats=2, device="cuda", prompt="a small red circle")
    entry = found["batches"][0]
    assert entry["memory"] == "allocated by torch on the GPU" and entry["peak_memory_bytes"] > 10**5
    assert 0 < 2 * entry["seconds_per_step"] < max(entry["seconds_all"])
    assert str(pipeline().device) == "cpu"
