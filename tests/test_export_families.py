"""Every exact image family, in every format that diffusers loads: plain diffusers draws what fastgen's own sampler draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

from fastgen.errors import UserError
from fastgen.export import export
from fastgen.pipelines.tiny import classic_transformers, prompted_transformers, transformers, unets
from fastgen.samplers import FewStep
from tests.exports import Case, Drawn, drawn_elsewhere, sdxl, trained, wrapped


def sd21() -> Any:
    """Stable Diffusion 2.1: v-prediction, linear projections, another number of heads in every block."""
    scheduler = DDIMScheduler(**unets.BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    return unets.sd15(scheduler=scheduler, use_linear_projection=True, attention_head_dim=(2, 4))


def schnell() -> Any:
    return classic_transformers.flux(guidance=False)


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd15": unets.sd15,
    "sd21": sd21,
    "sdxl": sdxl,
    "sd3": classic_transformers.sd3,
    "flux": classic_transformers.flux,
    "schnell": schnell,
    "flux2": transformers.flux2,
    "klein": transformers.flux2_klein,
    "qwen-image": transformers.qwen_image,
    "z-image": transformers.z_image,
    "sana": prompted_transformers.sana,
    "pixart-alpha": prompted_transformers.pixart,
    "pixart-sigma": prompted_transformers.pixart_sigma,
    "lumina2": transformers.lumina2,
    "hunyuan-dit": prompted_transformers.hunyuan_dit,
    "hunyuan-image": transformers.hunyuan_image,
    "aura-flow": transformers.aura_flow,
    "chroma": classic_transformers.chroma,
    "cogview4": transformers.cogview4,
    "kolors": unets.kolors,
}
SINGLE_FILES = (
    "sd15",
    "sdxl",
    "sd3",
    "flux",
    "schnell",
    "chroma",
    "klein",
    "flux2",
    "qwen-image",
    "z-image",
    "lumina2",
    "aura-flow",
)
WITHOUT_LORA = ("pixart-alpha", "pixart-sigma", "hunyuan-dit", "hunyuan-image")
FAST = ("sd21", "qwen-image", "z-image", "cogview4")
PROMPTS = ("a red cube", "two blue rings on a dark floor")


# Kolors and others have no original names that diffusers reads, Stable Diffusion 2's text encoder has a layer more there.
REFUSED = sorted(set(FAMILIES) - set(SINGLE_FILES))


def cases(families: Iterable[str]) -> Iterator[tuple[str, Case]]:
    for family in families:
        # CogView4's pipeline tells its network whole timesteps: with its own shift, those of even times are whole.
        shift = 0.4375 if family == "cogview4" else 1.0
        each: dict[str, Any] = {"base": FAMILIES[family], "size": 64, "prompts": PROMPTS, "shift": shift, "error": 1e-5}
        # A negative prompt is for one prompt.
        guided = {"guidance": 3.0, "prompts": PROMPTS[1:] if family in ("qwen-image", "schnell") else PROMPTS}
        yield f"{family}-diffusers", Case(**each)
        yield f"{family}-fused", Case(**each | guided, format="fused", mode="lora", steps=2)
        if family not in WITHOUT_LORA:
            yield f"{family}-diffusers-lora", Case(**each, format="diffusers-lora", mode="lora", gamma=1.0, steps=2)
        if family in SINGLE_FILES:
            yield f"{family}-single-file", Case(**each, format="single-file", mode="lora", steps=2)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_elsewhere(dict(cases(FAST)), tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    others = [family for family in FAMILIES if family not in FAST]
    return drawn_elsewhere(dict(cases(others)), tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", dict(cases(FAST)))
def test_plain_diffusers_draws_what_we_draw(name: str, fast: Drawn) -> None:
    assert fast.error(name) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", dict(cases(family for family in FAMILIES if family not in FAST)))
def test_plain_diffusers_draws_what_we_draw_of_the_other_families(name: str, rest: Drawn) -> None:
    assert rest.error(name) < 1e-5


def test_what_a_family_cannot_have_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Each family's other formats, of a student with LoRA."""
    for family in ("sana", "cogview4", "kolors", "pixart-alpha", "z-image"):
        case = Case(FAMILIES[family], mode="lora", size=64)
        pipeline = wrapped(case)
        student = trained(pipeline)
        name = type(pipeline.diffusers).__name__
        for format in ("kohya", "comfyui", *(["single-file"] if family in REFUSED else [])):
            with pytest.raises(UserError, match=f"'{format}' is known for .*, not for {name}; export it as 'diffusers'"):
                export(pipeline, student, FewStep((1.0,)), tmp_path / "x", format=format)
        if family in WITHOUT_LORA:
            with pytest.raises(UserError, match=f"{name} loads no LoRA; export the student with the format 'diffusers'"):
                export(pipeline, student, FewStep((1.0,)), tmp_path / "x", format="diffusers-lora")
    assert list(tmp_path.iterdir()) == []
