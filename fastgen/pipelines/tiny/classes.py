"""Which pipeline classes of diffusers make an image, or a video, from a prompt alone.

The list is made from the installed diffusers, not kept by hand. A text-to-image class is

- a public class of `diffusers` whose name ends in "Pipeline" and which derives from `DiffusionPipeline`, also where it is
  hidden because an optional package is missing (`HIDDEN`);
- not in `diffusers.pipelines.deprecated`, which its authors no longer maintain;
- with a `__call__` that takes `prompt`, `height` and `width` (so it draws pictures: not sound, text or meshes), nothing
  else without a default, and no frames or video;
- of none of the kinds in `APART`, which start from a picture, a mask, a control signal or embeddings, whatever their defaults.

Of the text-to-video classes, those in `VIDEO` are looked at.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

APART = (
    *("Img2Img", "ImageToVideo", "VideoToVideo", "Pix2Pix", "Depth2Img", "Inpaint", "Fill", "Edit", "Kontext", "Layered"),
    *("Control", "Adapter", "Upscale", "SuperResolution", "Refiner", "Prior"),
)
FRAMES = ("num_frames", "video_length", "frames", "video")
HIDDEN = {
    "KolorsPipeline": "diffusers.pipelines.kolors.pipeline_kolors",
    "KolorsPAGPipeline": "diffusers.pipelines.pag.pipeline_pag_kolors",
}
VIDEO = ("AnimateDiffPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "LTXPipeline", "MochiPipeline", "WanPipeline")


def find(name: str) -> Any:
    """The public pipeline class `name` of diffusers, also where it is hidden; None where there is none of that name."""
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, DiffusionPipeline)):
        found = getattr(importlib.import_module(HIDDEN[name]), name) if name in HIDDEN else None
    return found


def draws_from_a_prompt(pipeline: Any) -> bool:
    """Whether a pipeline class is a text-to-image one, as the module's docstring defines it."""
    if ".deprecated." in pipeline.__module__ or any(kind in pipeline.__name__ for kind in APART):
        return False
    parameters = dict(inspect.signature(pipeline.__call__).parameters)
    parameters.pop("self", None)
    demanded = {
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    return {"prompt", "height", "width"} <= set(parameters) and demanded <= {"prompt"} and not parameters.keys() & set(FRAMES)


def text_to_image() -> tuple[str, ...]:
    """Names of the text-to-image classes of the installed diffusers, sorted."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    return tuple(sorted(name for name in names if (each := find(name)) is not None and draws_from_a_prompt(each)))


def text_to_video() -> tuple[str, ...]:
    """Names of the text-to-video classes that are looked at and that the installed diffusers has, sorted."""
    return tuple(name for name in VIDEO if find(name) is not None)
