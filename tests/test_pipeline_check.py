"""`fastgen pipelines --check`: the list of classes, the tiny models, the measurement, and the share that is captured."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from fastgen.cli import main
from fastgen.errors import UserError
from fastgen.pipelines import check, tiny
from fastgen.pipelines.check import Row

# What was reached with diffusers 0.42.1.
CAPTURED = 54
EXACT = 54


def test_the_classes_are_those_of_diffusers() -> None:
    names = tiny.text_to_image()
    assert list(names) == sorted(set(names))
    assert {"StableDiffusionPipeline", "FluxPipeline", "KolorsPipeline", "QwenImagePipeline", "IFPipeline"} <= set(names)
    for stranger in (
        *("StableDiffusionImg2ImgPipeline", "FluxFillPipeline", "StableDiffusionXLControlNetPipeline", "WanPipeline"),
        *("KandinskyPriorPipeline", "StableAudioPipeline", "ShapEPipeline", "IFSuperResolutionPipeline", "DDPMPipeline"),
        *("VersatileDiffusionTextToImagePipeline", "FluxKontextPipeline", "FluxModularPipeline"),
    ):
        assert hasattr(diffusers, stranger) and stranger not in names
    assert len(names) >= 50
    assert len(tiny.text_to_video()) == 6 and not set(tiny.text_to_video()) & set(names)
    assert set(tiny.builders()) <= {*names, *tiny.text_to_video()}


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_a_class_that_is_understood(name: str) -> None:
    row = check.check(name, "image", tiny.builders()[name])
    assert row == Row(name, "image", True, "batched", row.parity, True, True, True, "exact") and row.exact
    assert row.parity is not None and row.parity < check.EXACT


def test_pipelines_that_rewrite_the_prompts_they_are_given_are_checked_on_the_same_prompts() -> None:
    before = list(tiny.PROMPTS)
    assert check.check("ZImagePipeline", "image", tiny.builders()["ZImagePipeline"]).exact
    assert before == tiny.PROMPTS


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("DreamLitePipeline", "batched"),  # One prompt a call, and an empty place beside the latents.
        ("PRXPixelPipeline", "batched"),  # Pixels, predicted as they are.
        ("SanaSprintPipeline", "embedded"),  # TrigFlow around a rectified flow.
        ("Cosmos2TextToImagePipeline", "paired"),  # A variance-exploding process around one.
        ("ZImageOmniPipeline", "batched"),  # Lists of lists.
        ("HiDreamImagePipeline", "batched"),  # An argument with the batch in its second dimension.
        ("Kandinsky5T2IPipeline", "paired"),  # Positions as long as the prompt, channels last.
        ("LongCatImagePipeline", "paired"),  # One empty prompt for all, a norm that may only shrink.
        ("BriaFiboPipeline", "batched"),  # Tokens of a single latent.
        ("KandinskyV22CombinedPipeline", "batched"),  # Two stages.
    ],
)
def test_what_pipelines_do_in_ways_of_their_own(name: str, guidance: str) -> None:
    row = check.check(name, "image", tiny.builders()[name])
    assert row == Row(name, "image", True, guidance, row.parity, True, True, True, "exact")


def test_a_network_that_ignores_its_prompt_proves_nothing() -> None:
    def deaf() -> Any:
        pipeline = tiny.builders()["StableDiffusionPipeline"]()
        for name, module in pipeline.unet.named_modules():
            if name.endswith("attn2.to_out.0"):
                torch.nn.init.zeros_(module.weight)
        return pipeline

    row = check.check("X", "image", deaf)
    assert row.parity is None and "the same whatever the prompt" in row.verdict


def test_builders_are_seeded() -> None:
    build = tiny.builders()["StableDiffusionPipeline"]
    first, second = (next(build().unet.parameters()) for _ in range(2))
    assert torch.equal(first, second)


def test_what_fails_becomes_the_verdict() -> None:
    def broken() -> Any:
        raise RuntimeError("no such\nconfiguration")

    assert check.check("X", "image", broken) == Row("X", "image", False, verdict="no: RuntimeError: no such configuration")
    assert check.check("X", "image", None).verdict == "not built"

    def blind() -> Any:
        pipeline = tiny.builders()["StableDiffusionPipeline"]()
        pipeline.vae.encode = broken
        return pipeline

    row = check.check("X", "image", blind)
    assert row.captured and not row.exact and row.verdict.startswith("partly: encodes: TypeError")


def test_wrong_statistics_of_latents_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.Pipeline, "_latent_statistics", lambda self, raw: (0.0, 0.5))
    row = check.check("X", "image", tiny.builders()["StableDiffusionPipeline"])
    assert row.encodes and not row.decodes and row.verdict == "partly: decodes wrongly"


def test_a_wrong_guidance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weaker(check.Guided):
        def __init__(self, denoiser: Any, scale: float):
            super().__init__(denoiser, scale - 0.01)

    monkeypatch.setattr(check, "Guided", Weaker)
    row = check.check("X", "image", tiny.builders()["StableDiffusionPipeline"])
    assert row.captured and not row.exact and row.parity is not None and row.parity > check.EXACT
    assert row.verdict == "partly: the guided output is not the pipeline's"


def test_table_and_counts() -> None:
    rows = [
        Row("A", "image", True, "batched", 0.0, True, True, True, "exact"),
        Row("B", "image", True, "paired", 3e-3, True, False, True, "partly: a | b"),
        Row("C", "image", False),
        Row("V", "video", True, "batched", 2e-7, None, None, True, "exact"),
    ]
    assert (
        check.summary(rows) == "2 of 3 text-to-image classes captured, 1 exact; 1 of 1 text-to-video classes captured, 1 exact"
    )
    lines = check.table(rows).splitlines()
    assert len(lines) == 6 and {line.count("|") for line in lines} == {9}
    assert [cell.strip() for cell in lines[4].split("|")][1:-1] == ["C", "no", "-", "-", "-", "-", "-", "not built"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipelines", "--check", "--only", "StableDiffusionPipeline", "Ideogram4Pipeline", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [row["name"] for row in result["classes"]] == ["StableDiffusionPipeline", "Ideogram4Pipeline"]
    assert result["classes"][0]["verdict"] == "exact" and result["classes"][1]["captured"] is False
    assert result["summary"] == "1 of 2 text-to-image classes captured, 1 exact"
    assert err.splitlines()[0] == "StableDiffusionPipeline: exact"


def test_names_that_are_not_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--only Nonsense: not a text-to-image"):
        list(check.check_all(["Nonsense"]))
    for arguments in (["--only", "FluxPipeline"], ["toy", "--check"]):
        assert main(["pipelines", *arguments]) == 2
    assert "together with --check" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_share_that_is_captured() -> None:
    rows = [row for row in check.check_all() if row.makes == "image"]
    assert len(rows) == len(tiny.text_to_image())
    failed = [f"{row.name}: {row.verdict}" for row in rows if not row.captured]
    assert sum(row.captured for row in rows) >= CAPTURED, failed
    assert sum(row.exact for row in rows) >= EXACT
