"""Whether fastgen understands a pipeline class of diffusers, tried on a tiny random instance of it.

Of each class: was its condition captured, how does it guide, does our guided denoiser give what the pipeline itself hands its
scheduler at the latents and times it visits, are pictures encoded and decoded, and does a LoRA role fit on it.
"""

from __future__ import annotations

import functools
import gc
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers.utils import logging
from torch import Tensor

from fastgen.adapters import LoraOptions
from fastgen.denoiser import Condition, Guided
from fastgen.errors import UserError
from fastgen.pipelines.autoencoding import decode_latents, encode_images
from fastgen.pipelines.base import Pipeline
from fastgen.pipelines.recording import step_time
from fastgen.pipelines.tiny import PROMPTS, builders, text_to_image, text_to_video

PIXELS = 64
FRAMES = 9
SHORTER = {"num_frames": FRAMES, "enable_prompt_rewrite": False, "prior_num_inference_steps": 2}
GUIDANCE = 4.0
EXACT = 1e-5

Makes = Literal["image", "video"]


@dataclass(frozen=True)
class Row:
    """What was found of one pipeline class; `guidance`, `parity` and the three booleans are None where it did not get that far.

    `guidance` is how the pipeline guides: "batched", "paired" (two calls), "embedded" or "none". `parity` is the largest
    relative error of one of our guided calls against what the pipeline hands its scheduler. `verdict` is "exact",
    "partly: ..." and why, "no: ..." and the error, or "not built".
    """

    name: str
    makes: Makes
    captured: bool
    guidance: str | None = None
    parity: float | None = None
    encodes: bool | None = None
    decodes: bool | None = None
    adapts: bool | None = None
    verdict: str = "not built"

    @property
    def exact(self) -> bool:
        return self.verdict == "exact"


@dataclass(frozen=True)
class Step:
    """What a pipeline hands its scheduler: the network's combined output, the time, and the latents, as it scales them.

    `level` is the noise level, which in some classes is not the timestep; `after` are the scheduler's next latents.
    """

    output: Tensor
    timestep: float
    level: float | None
    sample: Tensor
    after: Tensor


class _Enough(Exception):
    """As many steps have been seen as were asked for."""


def watch(diffusers: Any, prompts: str | Sequence[str], *, steps: int | None = None, **options: Any) -> tuple[list[Step], Any]:
    """Run a diffusers pipeline as a user would: what it hands its scheduler, step by step, and what it returns.

    `options` are the call's; with `steps` the run is broken off after so many, and None is returned.
    """
    seen: list[Step] = []
    scheduler, original = diffusers.scheduler, diffusers.scheduler.step
    signature = inspect.signature(original)

    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        sample = given["sample"]
        if hasattr(scheduler, "scale_model_input"):
            sample = scheduler.scale_model_input(sample, given["timestep"])
        level = float(scheduler.sigmas[len(seen)]) if hasattr(scheduler, "sigmas") else None
        answer = original(*args, **kwargs)
        after = answer[0] if isinstance(answer, tuple) else answer.prev_sample
        timestep = float(torch.as_tensor(given["timestep"]).flatten()[0])
        seen.append(Step(given["model_output"], timestep, level, sample, after))
        if len(seen) == steps:
            raise _Enough
        return answer

    step.__signature__ = signature  # type: ignore[attr-defined]  # pipelines ask for the names of its parameters
    scheduler.step = step
    try:
        return seen, diffusers(prompt=prompts if isinstance(prompts, str) else list(prompts), **options)
    except _Enough:
        return seen, None
    finally:
        del scheduler.step


def relative(a: Tensor, b: Tensor) -> float:
    """The distance of `a` from `b`, in units of `b`."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-12))


def check(name: str, makes: Makes, build: Callable[[], Any] | None) -> Row:
    """Try one class. Whatever goes wrong becomes its verdict."""
    if build is None:
        return Row(name, makes, captured=False)
    try:
        with _silence():
            diffusers = build()
            diffusers.set_progress_bar_config(disable=True)
            _shorten(diffusers)
            pipeline = Pipeline.wrap(
                diffusers, roles={"student": "lora"}, lora=LoraOptions(rank=2), height=PIXELS, width=PIXELS
            )
            condition = pipeline.encode_prompts(PROMPTS)
            return _examine(Row(name, makes, captured=True), diffusers, pipeline, condition)
    except Exception as problem:  # One broken class never stops the table.
        return Row(name, makes, captured=False, verdict=f"no: {_sentence(problem)}")


def check_all(only: Iterable[str] = ()) -> Iterator[Row]:
    """A row for each class that makes images, then for each that makes videos; with `only`, for those alone.

    Raises UserError for a name that is none of them.
    """
    makes: dict[str, Makes] = {**dict.fromkeys(text_to_image(), "image"), **dict.fromkeys(text_to_video(), "video")}
    wanted = list(only) or list(makes)
    if strangers := [name for name in wanted if name not in makes]:
        raise UserError(
            f"--only {strangers[0]}: not a text-to-image or text-to-video class that is checked: {', '.join(makes)}"
        )
    known = builders()
    for name in wanted:
        yield check(name, makes[name], known.get(name))
        gc.collect()


def _examine(row: Row, diffusers: Any, pipeline: Pipeline, condition: Condition) -> Row:
    """Fill in a captured class's row. Pictures are no matter for a class that makes videos."""
    found: dict[str, Any] = {}
    faults: list[str] = []
    trials: dict[str, Callable[[], Any]] = {
        "parity": lambda: _parity(diffusers, pipeline, condition),
        "encodes": lambda: _encodes(diffusers, pipeline),
        "decodes": lambda: _decodes(diffusers, pipeline),
        "adapts": lambda: _adapts(pipeline, condition),
    }
    for key, trial in trials.items():
        if row.makes == "video" and key in ("encodes", "decodes"):
            continue
        try:
            found[key] = trial()
        except Exception as problem:
            found[key] = None if key == "parity" else False
            faults.append(f"{key}: {_sentence(problem)}")
    if (error := found["parity"]) is not None and not error < EXACT:
        faults.insert(0, "the guided output is not the pipeline's")
    faults += [
        f"{key} wrongly" for key in ("encodes", "decodes", "adapts") if found.get(key) is False and key not in str(faults)
    ]
    form = pipeline.form
    guidance = "embedded" if pipeline.embeds_guidance else {"single": "none"}.get(form.guides, form.guides)
    verdict = f"partly: {'; '.join(faults)}" if faults else "exact"
    return replace(row, **found, guidance=guidance, verdict=verdict)


def _shorten(diffusers: Any) -> None:
    """Make a pipeline draw a few frames and take prompts as they are, unless it is told otherwise."""
    own = type(diffusers)
    known = inspect.signature(own.__call__).parameters
    shorter = {key: value for key, value in SHORTER.items() if key in known}
    if not shorter:
        return

    @functools.wraps(own.__call__)
    def short(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own.__call__(self, *args, **(shorter | kwargs))

    diffusers.__class__ = type(own.__name__, (own,), {"__call__": short, "__module__": own.__module__})


def _options(diffusers: Any, **wanted: Any) -> dict[str, Any]:
    """Arguments of a short run at the size of the check; those alone that the pipeline's call knows."""
    known = inspect.signature(type(diffusers).__call__).parameters
    size = {"height": PIXELS, "width": PIXELS, "use_resolution_binning": False, "use_kv_cache": False}
    usual = {**size, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "pag_scale": 0.0}
    return {key: value for key, value in (usual | wanted).items() if key in known}


def _parity(diffusers: Any, pipeline: Pipeline, condition: Condition) -> float:
    """The largest relative error of our guided call over the steps of a run."""
    # More steps than are looked at: the last one of a variance-exploding schedule cancels most of its digits.
    longer = {"num_inference_steps": 4, "intermediate_timesteps": None}
    options = _options(diffusers, **longer, guidance_scale=GUIDANCE, distilled_guidance_scale=GUIDANCE, output_type="latent")
    if getattr(diffusers, "guider", None) is not None:
        diffusers.guider.guidance_scale = GUIDANCE
    scale = GUIDANCE + pipeline.form.guidance_offset
    if not pipeline.embeds_guidance and "true_cfg_scale" in inspect.signature(type(diffusers).__call__).parameters:
        options |= {"true_cfg_scale": GUIDANCE, "negative_prompt": [""] * len(PROMPTS)}
    elif pipeline.form.guides == "single" and not pipeline.embeds_guidance:
        scale = 1.0
    groups = [[prompt] for prompt in PROMPTS] if pipeline.form.alone else [PROMPTS]
    runs = []
    for prompts in groups:
        own = {"generator": torch.Generator().manual_seed(0)}
        runs.append(watch(diffusers, prompts[0] if pipeline.form.alone else prompts, steps=2, **options | own)[0])
    guided = Guided(pipeline.frozen(), scale)
    errors, heard = [], []
    for steps in zip(*runs, strict=True):
        output, sample = (torch.cat([getattr(step, key) for step in steps]) for key in ("output", "sample"))
        xt = sample / pipeline.scheduler_scale
        t = torch.full((len(PROMPTS),), step_time(pipeline.process, steps[0].timestep, steps[0].level), dtype=torch.float64)
        with torch.no_grad():
            ours, others = (guided(xt, t, each).output * pipeline.scheduler_scale for each in (condition, condition[[1, 0]]))
        heard.append(relative(ours, others))
        errors.append(relative(ours, output[:, : ours.shape[1]]))  # Without the variance that some hand over too.
    if max(heard) < EXACT:
        raise UserError("the network says the same whatever the prompt, so nothing was compared")
    return max(errors)


def _encodes(diffusers: Any, pipeline: Pipeline) -> bool:
    """Whether a picture's latents have the network's shape, and decode to what the autoencoder itself makes of the picture."""
    images = torch.rand(len(PROMPTS), 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = pipeline.encode(images)
    with torch.no_grad():
        expected = images
        if (vae := pipeline.autoencoder) is not None:
            expected = decode_latents(vae, encode_images(vae, images))
        return latents.shape[1:] == pipeline.latent_shape and relative(pipeline.decode(latents), expected) < EXACT


def _decodes(diffusers: Any, pipeline: Pipeline) -> bool:
    """Whether the pipeline's last latents decode to the pipeline's pictures; those of some are rounded to bytes."""
    prompts = PROMPTS[0] if pipeline.form.alone else PROMPTS
    seen, (drawn, *_) = watch(diffusers, prompts, **_options(diffusers, output_type="np", return_dict=False))
    with torch.no_grad():
        ours = pipeline.decode(seen[-1].after / pipeline.scheduler_scale)
    theirs = torch.as_tensor(drawn).movedim(-1, 1)[:, :3]
    rounded = bool(((theirs * 255).round() - theirs * 255).abs().max() < 1e-3)
    return torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1 / 255 if rounded else 1e-4)


def _adapts(pipeline: Pipeline, condition: Condition) -> bool:
    """Whether a LoRA role starts as the teacher, gets gradients, and then changes the output."""
    teacher, student = pipeline.frozen(), pipeline.trainable("student")
    xt, t = torch.randn(len(PROMPTS), *pipeline.latent_shape), torch.full((len(PROMPTS),), 0.5)
    before = student(xt, t, condition).output
    before.square().mean().backward()
    with torch.no_grad():
        plain = teacher(xt, t, condition).output
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        after = student(xt, t, condition).output
    moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    return relative(before, plain) < EXACT and moved and relative(after, plain) > EXACT


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and log lines: a tiny model is no place for advice."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _sentence(problem: Exception) -> str:
    """An error in one line, with its kind where it is not one of ours."""
    text = " ".join(str(problem).split())[:200]
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    yes = {True: "yes", False: "no", None: "-"}
    head = ["class", "condition captured", "guidance", "parity", "encode", "decode", "LoRA", "verdict"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        parity = "-" if row.parity is None else f"{row.parity:.0e}" if row.parity else "0"
        flags = [yes[each] for each in (row.encodes, row.decodes, row.adapts)]
        lines.append([row.name, yes[row.captured], row.guidance or "-", parity, *flags, row.verdict.replace("|", "/")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "| " + " | ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) + " |"
        for line in lines
    )


def summary(rows: Sequence[Row]) -> str:
    """How many classes of each kind were captured, and how many are exact."""
    parts = []
    for makes in ("image", "video"):
        mine = [row for row in rows if row.makes == makes]
        if mine:
            captured, exact = sum(row.captured for row in mine), sum(row.exact for row in mine)
            parts.append(f"{captured} of {len(mine)} text-to-{makes} classes captured, {exact} exact")
    return "; ".join(parts)
