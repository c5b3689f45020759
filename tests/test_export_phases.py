"""Exports of a student of several networks: plain diffusers samples them by the lines of their card, and nothing else does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.cli.targets import own_call
from fastgen.errors import UserError
from fastgen.export import export, read_export
from fastgen.methods.phased_dmd import PhasedDMD
from fastgen.pipelines import LoraOptions, Pipeline
from tests import tiny_models as tiny

PROMPT = "a red cube"


def trained(mode: Any, **options: Any) -> tuple[Pipeline, PhasedDMD]:
    """A run's method, whose networks have moved away from their teacher and from each other."""
    torch.manual_seed(0)
    pipeline = Pipeline.wrap(tiny.sd3(), roles={"student": mode}, lora=LoraOptions(rank=2))
    method = PhasedDMD(experts=True, guidance=1.0, **options)
    method.setup(pipeline)
    with torch.no_grad():
        for weight in method.trained.parameters():
            weight += torch.randn_like(weight) * (0.3 if mode == "lora" else 0.1 * max(float(weight.std(correction=0)), 0.1))
    return pipeline, method


@pytest.mark.parametrize(
    ("format", "mode", "phases"), [("diffusers", "full", 2), ("diffusers-lora", "lora", 4), ("fused", "lora", 2)]
)
def test_the_card_samples_as_we_do(format: str, mode: str, phases: int, tmp_path: Path) -> None:
    pipeline, method = trained(mode, phases=phases)
    tiny.sd3().save_pretrained(tmp_path / "base")
    record = {"base": str(tmp_path / "base"), "prompt": PROMPT, "method": "phased_dmd"}
    output = export(pipeline, method.trained, method.sampler(), tmp_path / "out", format=format, record=record)
    folders = [f"phase-{i + 1}" for i in range(phases)]
    told, card = read_export(output), (output / "README.md").read_text()
    assert told["phases"] == [folders[i * phases // 4] for i in range(4)] and "none is right by itself" in card
    assert sorted(each.name for each in output.iterdir()) == ["README.md", "fastgen.json", *folders]
    assert not list(output.glob("*/README.md")) and not list(output.glob("*/fastgen.json"))
    assert ".partial" not in card and ".partial" not in json.dumps(told)
    with pytest.raises(UserError, match=r"several networks, one for each phase, .* cannot be measured"):
        own_call(output)

    noise, condition = torch.randn(1, *pipeline.latent_shape), pipeline.encode_prompts([PROMPT])
    with torch.no_grad():
        ours = method.sampler().sample(method.trained, noise, condition)
        alone = method.sampler().sample(method.trained.experts[0], noise, condition)
    [code] = re.findall("```python\n(.*?)```", card, re.DOTALL)
    made: dict[str, Any] = {}
    exec(code.replace("image.png", str(tmp_path / "image.png")), made)
    assert (tmp_path / "image.png").stat().st_size > 100
    call = {**told["call"], "latents": noise, "output_type": "latent", "callback_on_step_end": made["change"]}
    for _ in range(2):  # it begins with the first network every time
        theirs = made["pipeline"](PROMPT, **call).images
        assert float((theirs - ours).norm() / ours.norm()) < 1e-4
    assert float((alone - ours).norm() / ours.norm()) > 0.02


def test_what_cannot_hold_several_networks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, method = trained("lora")
    with pytest.raises(UserError, match="cannot have the format 'kohya', but diffusers, fused, diffusers-lora"):
        export(pipeline, method.trained, method.sampler(), tmp_path / "out", format="kohya")
    monkeypatch.setattr(type(pipeline.diffusers), "__call__", lambda self, prompt: None)
    with pytest.raises(UserError, match=r"StableDiffusion3Pipeline takes no callback_on_step_end, .* experts = false"):
        export(pipeline, method.trained, method.sampler(), tmp_path / "out", format="diffusers-lora")
    assert not (tmp_path / "out").exists()
