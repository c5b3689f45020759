"""The table of attention kernels and the choice among them, with kernels and times that are made up."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY, AttentionBackendName, _AttentionBackendRegistry

from fastgen import config
from fastgen.attention import choose, kernels
from fastgen.attention.calls import Call, made_up
from fastgen.attention.choose import Tools
from fastgen.attention.kernels import KERNELS, Kernel, missing, on_disk, unfit
from fastgen.attention.measure import BOUNDS, Errors, agrees, errors, reference, seconds
from fastgen.errors import UserError

CUDA = torch.device("cuda")
FAST = {"native": 1.0, "native_math": 3.0, "native_flash": 0.5, "sage": 0.1, "xformers": 0.8, "native_efficient": 0.9}


# -- the table --------------------------------------------------------------------------------------


def test_every_kernel_is_one_that_the_installed_dispatcher_knows() -> None:
    for kernel in KERNELS.values():
        backend = AttentionBackendName(kernel.backend)
        assert backend in _AttentionBackendRegistry._backends
        assert kernel.name == backend.value.lstrip("_"), "the name is diffusers' own"
        taken = _AttentionBackendRegistry._supported_arg_names[backend]
        assert not kernel.masks or "attn_mask" in taken
        if kernel.hub:
            assert _HUB_KERNELS_REGISTRY[backend].repo_id == kernel.hub


def test_the_option_offers_exactly_the_table() -> None:
    assert set(get_args(config.Attention)) == {"auto", *KERNELS}
    assert config.SpeedConfig().attention == "auto"


def test_a_wrapped_operator_without_a_derivative_is_for_inference_alone() -> None:
    """diffusers calls FlashAttention-3 as an operator of its own; should it get a derivative, the table is to follow."""
    operator = torch.ops._diffusers_flash_attn_3._flash_attn_forward.default
    x = torch.zeros(1, 4, 1, 8, device="meta", requires_grad=True)
    assert not KERNELS["flash_3"].trains
    with pytest.raises(RuntimeError, match="autograd"):
        operator(x, x, x)[0].sum().backward()


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("sage", {"training": True}, "no backward pass"),
        ("flash_3", {"training": True}, "no backward pass"),
        ("native_flash", {"forward_mode": True}, "no derivative in forward mode"),
        ("xformers", {"device": "cpu"}, "runs on cuda, not on cpu"),
        ("flash", {"dtypes": ["float32"]}, "float16 and bfloat16, not in float32"),
        ("flash", {"head_sizes": [64, 512]}, "256 at most, and the network's are of 512"),
        ("flash", {"masks": ["keys"]}, "no masks, and the network has masks of keys"),
        ("flash_varlen_hub", {"masks": ["added"]}, "takes masks of keys, and the network has numbers added"),
        ("native_flash", {"capability": (7, 5)}, "architecture 8.0, and this one is 7.5"),
        ("flash_3_hub", {"capability": (10, 0)}, "for GPUs of architecture 9.0, and this one is 10.0"),
    ],
)
def test_what_a_kernel_cannot_do(name: str, asked: dict[str, Any], words: str) -> None:
    fitting = {"training": False, "forward_mode": False, "device": "cuda", "capability": (9, 0), "dtypes": ["bfloat16"]}
    assert unfit(KERNELS[name], **fitting) == ""
    assert words in unfit(KERNELS[name], **{**fitting, **asked})


def test_what_is_not_installed_or_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    away = Kernel("away", "xformers", "no-such-package", "no_such_package_at_all")
    assert missing(away) == "no-such-package is not installed"
    (tmp_path / "broken_kernel_build.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = missing(replace(away, module="broken_kernel_build"))
    assert broken == "no-such-package is installed, but does not import (undefined symbol: _ZN3c10)"
    assert missing(KERNELS["native"]) == missing(KERNELS["flex"]) == ""


def test_a_kernel_of_the_hub_is_found_on_the_disk_and_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "kernels", types.ModuleType("kernels"))
    sys.modules["kernels"].__spec__ = types.SimpleNamespace(name="kernels")  # type: ignore[assignment]
    monkeypatch.setattr(kernels, "_too_old", lambda kernel: "")
    hub = KERNELS["flash_hub"]
    assert "has not been downloaded" in missing(hub)
    assert missing(hub, named=True) == "", "who names it wants it fetched"
    (tmp_path / "models--kernels-community--flash-attn2" / "snapshots" / "abc").mkdir(parents=True)
    assert on_disk(hub.hub) and missing(hub) == ""


# -- measuring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "added", "causal", "shared"])
def test_the_reference_is_attention_and_its_gradient(kind: str) -> None:
    call = made_up(2, 4, 6, 6 if kind == "causal" else 9, 8)
    if kind == "keys":
        call = replace(call, mask=torch.arange(9) < torch.tensor([[5], [9]]))
    elif kind == "pairs":
        call = replace(call, mask=torch.rand(2, 1, 6, 9) > 0.3)
    elif kind == "added":
        call = replace(call, mask=torch.randn(2, 1, 1, 9))
    elif kind == "causal":
        call = replace(call, causal=True)
    elif kind == "shared":
        call = replace(call, key=call.key[:, :2], value=call.value[:, :2], shared_heads=True)
    for name in ("native", "native_math"):
        found = errors(KERNELS[name], [call], training=True)
        assert found.output < 1e-6 and found.gradient is not None and found.gradient < 1e-6
    assert agrees(found, [call]) == ""


def test_the_reference_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    call, towards = made_up(1, 1, 7, 5, 4), torch.randn(1, 1, 7, 4)
    whole = reference(call, towards, 0, 0)
    monkeypatch.setattr("fastgen.attention.measure.SCORES", 10)
    for a, b in zip(whole, reference(call, towards, 0, 0), strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_keeps_within_its_bounds_with_room() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        call = made_up(1, 2, 64, 48, 32, dtype=dtype)
        found = errors(KERNELS["native"], [call], training=True)
        assert found.gradient is not None
        assert found.output < BOUNDS[call.dtype] / 3 and found.gradient < BOUNDS[call.dtype] / 3
        assert agrees(found, [call]) == ""


@pytest.mark.parametrize("wrong", [Errors(1.0, 0.0), Errors(0.0, 1.0), Errors(float("nan"), 0.0), Errors(0.0, float("nan"))])
def test_a_wrong_output_or_gradient_is_seen(wrong: Errors) -> None:
    assert "is off by" in agrees(wrong, [made_up(1, 1, 2, 2, 4)])


def test_an_output_without_a_gradient_is_not_taken_for_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As quantised kernels return it, which are called on numbers and not through autograd."""
    call = made_up(1, 1, 4, 4, 8)
    monkeypatch.setattr(
        "fastgen.attention.measure.run", lambda kernel, call, q, k, v: (q @ k.mT).softmax(-1).detach() @ v.detach()
    )
    with pytest.raises(RuntimeError, match="no gradient"):
        errors(KERNELS["native"], [call], training=True)


@pytest.mark.parametrize("head", [(0, 0), (1, 1)])
def test_one_number_that_is_none_is_seen(monkeypatch: pytest.MonkeyPatch, head: tuple[int, int]) -> None:
    def run(kernel: Kernel, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        spoilt = torch.zeros_like(found)
        spoilt[head][-1, -1] = float("nan")
        return found + spoilt

    call = made_up(2, 2, 4, 4, 8)
    monkeypatch.setattr("fastgen.attention.measure.run", run)
    assert "its output is off by nan" in agrees(errors(KERNELS["native"], [call], training=True), [call])


def test_times_are_of_all_calls_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [made_up(1, 1, 2, 2, 4, count=3), made_up(1, 1, 4, 4, 4, count=2)]
    monkeypatch.setattr(
        "fastgen.attention.measure._once", lambda kernel, call, repeats, training: {2: 1.0, 4: 10.0}[call.query.shape[2]]
    )
    assert seconds([KERNELS["native"]], calls, training=True) == {"native": 23.0}


# -- choosing ---------------------------------------------------------------------------------------


class Bench:
    """Kernels with made-up times and errors, all of them installed but for `away`; counts the measurements."""

    def __init__(self, wrong: dict[str, Any] | None = None, away: Sequence[str] = (), times: dict[str, float] | None = None):
        self.wrong, self.away, self.times, self.measured = wrong or {}, away, times or FAST, 0

    def errors(self, kernel: Kernel, calls: Sequence[Call], *, training: bool) -> Errors:
        found = self.wrong.get(kernel.name, Errors(1e-6, 1e-6 if training else None))
        if isinstance(found, Exception):
            raise found
        return found

    def seconds(self, agreeing: Sequence[Kernel], calls: Sequence[Call], *, training: bool) -> dict[str, float]:
        self.measured += 1
        return {each.name: self.times[each.name] for each in agreeing}

    def tools(self) -> Tools:
        there = {name: KERNELS[name] for name in FAST}
        return Tools(there, self.missing, lambda kernel: None, self.errors, self.seconds)

    def missing(self, kernel: Kernel, *, named: bool = False) -> str:
        return f"{kernel.package} is not installed" if kernel.name in self.away else ""

    def choose(self, asked: str = "auto", **options: Any) -> choose.Choice:
        calls = [made_up(1, 2, 4, 4, 8, dtype=torch.bfloat16)]
        options = {"training": True, "device": CUDA, **options}
        return choose.choose(asked, calls, tools=self.tools(), **options)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_the_fastest_that_agrees_is_chosen_and_said_in_a_line() -> None:
    found = Bench().choose()
    assert found.kernel == "native_flash"
    ratio = "attention: native_flash, 2.00 times as fast as torch's own choice,"
    assert found.line == f"{ratio} over the 1 shape of this network, forward and backward"
    assert "no backward pass" in found.left_out["sage"], "the fastest of all, for inference alone"
    assert Bench().choose(training=False).kernel == "sage"


@pytest.mark.parametrize(
    "wrong", [Errors(0.5, 1e-6), Errors(1e-6, 0.5), Errors(1e-6, float("nan")), RuntimeError("no kernel image")]
)
def test_a_kernel_that_is_wrong_is_not_chosen_however_fast(wrong: Any) -> None:
    found = Bench({"native_flash": wrong}).choose()
    assert found.kernel == "xformers"
    assert found.left_out["native_flash"] and "native_flash" not in found.seconds


def test_what_runs_out_of_memory_is_tried_again_the_next_time(tmp_path: Path) -> None:
    bench = Bench({"native_flash": torch.OutOfMemoryError("of 80 GB")})
    found = bench.choose(cache=tmp_path)
    assert found.kernel == "xformers" and found.left_out["native_flash"] == "there was not the memory to try it"
    bench.wrong.clear()
    assert bench.choose(cache=tmp_path).kernel == "native_flash" and bench.measured == 2


def test_what_cannot_be_compared_with_torchs_own_choice_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Bench({"native": RuntimeError("a driver of the year before last")}).choose(cache=tmp_path)
    assert found.kernel == "native" and "as none could be timed" in found.line and not list(tmp_path.rglob("*.json"))

    def no_room(*_: Any, **__: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Bench, "seconds", no_room)
    assert Bench().choose(cache=tmp_path).kernel == "native"


def test_a_method_that_takes_derivatives_gets_a_kernel_with_forward_mode() -> None:
    found = Bench().choose(forward_mode=True)
    assert found.kernel == "native" and set(found.seconds) == {"native", "native_math"}
    assert "3.00 times as fast as native_math" in found.line


def test_what_is_hardly_faster_or_not_installed_is_not_taken() -> None:
    assert Bench(times={**FAST, "native_flash": 0.98}, away=["xformers", "native_efficient"]).choose().kernel == "native"
    assert Bench(dict.fromkeys(FAST, RuntimeError("out of memory"))).choose().kernel == "native"


@pytest.mark.parametrize(
    ("asked", "options", "bench", "words"),
    [
        ("sage", {}, Bench(), ["speed.attention", '"sage"', "no backward pass"]),
        ("xformers", {}, Bench(away=["xformers"]), ['"xformers"', "xformers is not installed"]),
        ("native_flash", {"forward_mode": True}, Bench(), ["no derivative in forward mode"]),
        ("xformers", {"device": torch.device("cpu")}, Bench(), ["runs on cuda, not on cpu"]),
        ("native_flash", {}, Bench({"native_flash": Errors(1e-6, 0.5)}), ["its gradient is off by 5.0e-01"]),
        ("native_flash", {}, Bench({"native_flash": ValueError("bad stride\nmore")}), ["does not take", "(bad stride)"]),
        ("sage", {"where": "--attention"}, Bench(), ["--attention: "]),
    ],
)
def test_a_named_kernel_is_refused_in_a_sentence(asked: str, options: dict[str, Any], bench: Bench, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        bench.choose(asked, **options)
    assert all(each in str(refusal.value) for each in words), refusal.value
    assert "\n" not in str(refusal.value) and '"auto"' in str(refusal.value)


def test_a_named_kernel_is_applied_as_asked_and_not_timed() -> None:
    bench = Bench({"sage": Errors(0.04)})
    assert bench.choose("xformers").line == "attention: xformers, as asked"
    assert bench.choose("sage", training=False).kernel == "sage", "eight bits are what was asked for"
    assert bench.measured == 0


def test_a_cpu_is_not_measured() -> None:
    bench = Bench()
    found = bench.choose(device=torch.device("cpu"))
    assert (found.kernel, bench.measured) == ("native", 0)
    assert "cpu" in found.line and found.record() == {"kernel": "native", "asked": "auto"}
    assert not choose.needs_watching("auto", torch.device("cpu")) and choose.needs_watching("auto", CUDA)
    assert choose.needs_watching("native_math", torch.device("cpu")) and not choose.needs_watching("native", CUDA)


# -- what was measured before -----------------------------------------------------------------------


def test_a_measurement_is_kept_for_the_same_circumstances_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({"native_efficient": Errors(0.5, 0.5)})
    first = bench.choose(cache=tmp_path)
    again = bench.choose(cache=tmp_path)
    assert bench.measured == 1 and (again.kernel, again.left_out) == (first.kernel, first.left_out)
    assert again.line == f"{first.line} (measured before)"
    bench.choose(cache=tmp_path, training=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    bench.choose(cache=tmp_path)
    bench.away = ["xformers"]
    bench.choose(cache=tmp_path)
    assert bench.measured == 4, "another task, device or set of kernels is another measurement"
    assert len(list((tmp_path / "attention").iterdir())) == 4, "and nothing half written stays"


@pytest.mark.parametrize(
    "kept", ["", "{", "[]", '{"made-with": {}}', "same:{}", 'same:{"native": -1}', 'same:{"x": 1}', 'same:{"native": "a"}']
)
def test_a_broken_measurement_is_made_anew(tmp_path: Path, kept: str) -> None:
    bench = Bench()
    bench.choose(cache=tmp_path)
    (file,) = (tmp_path / "attention").iterdir()
    if kept.startswith("same:"):
        kept = json.dumps(json.loads(file.read_text()) | {"seconds": json.loads(kept.removeprefix("same:"))})
    file.write_text(kept)
    assert bench.choose(cache=tmp_path).kernel == "native_flash" and bench.measured == 2
    assert bench.choose(cache=tmp_path).kernel == "native_flash" and bench.measured == 2


def test_a_measurement_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    assert Bench().choose(cache=tmp_path).kernel == "native_flash"
    assert list((tmp_path / "attention").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    if os.geteuid():
        os.chmod(tmp_path, 0o500)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert Bench().choose(cache=tmp_path / "file").kernel == "native_flash"
