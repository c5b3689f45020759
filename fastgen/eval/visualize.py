"""What a model predicts at each step (DT-visualisation), and what becomes of diversity when the teacher makes the first steps.

At every call of its network a sampler has an estimate of the clean image. Shown side by side these tell when a model settles on
its image: distilled ones at their first call, their teachers over many (Gandikota and Bau 2025, arXiv:2503.10637, who call it
diffusion target visualisation). Handing over from teacher to student (`fastgen.eval.handover`) is their remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgen.data.toy.scenes import Scenes
from fastgen.denoiser import Predicts
from fastgen.errors import UserError
from fastgen.eval.evaluation import Measured, gather, measure_images
from fastgen.eval.generate import noise_seed
from fastgen.eval.handover import Handover
from fastgen.eval.images import Images, to_pillow, to_uint8
from fastgen.eval.report import columns_for, document, picture_source, section
from fastgen.eval.table import number, reading
from fastgen.eval.world import World
from fastgen.pipelines.base import Pipeline
from fastgen.process import Prediction
from fastgen.samplers import FewStep, Sampler

GAP = 2
"""Pixels between the pictures of a grid."""


@dataclass(frozen=True)
class Actor:
    """A network with its sampler; `pipeline` makes its conditions and decodes."""

    name: str
    pipeline: Pipeline
    denoiser: Predicts
    sampler: Sampler


@dataclass(frozen=True)
class Track:
    """Estimates of the clean image: uint8 [B, S, 3, H, W], for each prompt and seed at each of S times."""

    name: str
    prompts: list[str]
    seeds: list[int]
    times: list[float]
    images: Tensor

    def settled(self) -> list[float]:
        """Root mean square distance of each step's estimates to the last ones, pixels in [0, 1], averaged over images."""
        values = self.images.double() / 255
        found: list[float] = (values - values[:, -1:]).square().flatten(2).mean(2).sqrt().mean(0).tolist()
        return found


@torch.no_grad()
def predictions(actor: Actor, prompts: Sequence[str], seeds: Sequence[int]) -> Track:
    """What `actor` takes the clean image for at each call, from noise that depends on prompt and seed alone.

    Raises UserError for lists that are empty or of different length.
    """
    found: list[Prediction] = []
    _draw(actor, prompts, seeds, found)
    images = torch.stack([to_uint8(actor.pipeline.decode(each.x0.to(_dtype(actor))).float().cpu()) for each in found], 1)
    return Track(actor.name, list(prompts), list(seeds), [float(each.t.flatten()[0]) for each in found], images)


@torch.no_grad()
def draw_images(actor: Actor, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 64) -> Tensor:
    """The images that `actor` makes: uint8 [N, 3, H, W]. Errors as of `predictions`."""
    made = []
    for start in range(0, max(1, len(prompts)), batch):
        latents = _draw(actor, prompts[start : start + batch], seeds[start : start + batch], None)
        made.append(to_uint8(actor.pipeline.decode(latents).float().cpu()))
    return torch.cat(made)


def _draw(actor: Actor, prompts: Sequence[str], seeds: Sequence[int], found: list[Prediction] | None) -> Tensor:
    if len(prompts) != len(seeds) or not prompts:
        raise UserError(f"every image needs a prompt and a seed, but there are {len(prompts)} prompts and {len(seeds)} seeds")
    marks = [noise_seed(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    shape = actor.pipeline.latent_shape
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(mark)) for mark in marks])
    noise = noise.to(actor.pipeline.device, _dtype(actor))
    condition = actor.pipeline.encode_prompts(list(prompts))
    generator = torch.Generator().manual_seed(marks[0])
    watch = None if found is None else found.append
    return actor.sampler.sample(actor.denoiser, noise, condition, generator=generator, watch=watch)


def _dtype(actor: Actor) -> torch.dtype:
    return next(actor.pipeline.network.parameters()).dtype


def grid(track: Track) -> Image.Image:
    """One picture: a row for each prompt, a column for each step."""
    count, steps, _, height, width = track.images.shape
    whole = Image.new("RGB", (steps * (width + GAP) - GAP, count * (height + GAP) - GAP), "white")
    for row in range(count):
        for column, picture in enumerate(to_pillow(track.images[row])):
            whole.paste(picture, (column * (width + GAP), row * (height + GAP)))
    return whole


def page(tracks: Sequence[Track], handovers: Sequence[HandedOver] = ()) -> str:
    """The tracks prompt by prompt, how soon each model settles, and the handovers where there are some, as one HTML file.

    Raises UserError where the tracks are of different prompts or seeds.
    """
    first = tracks[0]
    if any((track.prompts, track.seeds) != (first.prompts, first.seeds) for track in tracks):
        raise UserError("models are shown side by side on the same prompts and seeds alone")
    names = ", ".join(track.name for track in tracks)
    lead = "Each picture is what the model takes the finished image for at that call of its network."
    blocks = []
    for index, (prompt, seed) in enumerate(zip(first.prompts, first.seeds, strict=True)):
        strips = "".join(_strip(track, index) for track in tracks)
        head = f'<h3>{escape(prompt)} <span class="muted">seed {seed}</span></h3>'
        blocks.append(f'<article class="prompt card">{head}{strips}</article>')
    about = "Root mean square distance of each call's estimate to the last one, over pixels from 0 to 1, averaged over images."
    body = [
        f'<header><h1>What is predicted at each step: {escape(names)}</h1><p class="lead">{lead}</p></header>',
        section("When the image is settled", _settling(tracks), about),
        section(
            "Prompt by prompt", "\n".join(blocks), "From the same noise; the time at each picture runs from 1, noise, to 0."
        ),
    ]
    if handovers:
        body.insert(1, section("The teacher makes the first steps", _handed_over(handovers), HANDOVER))
    return document(f"Predictions: {names}", body)


def _strip(track: Track, index: int) -> str:
    tiles = []
    for time, picture in zip(track.times, to_pillow(track.images[index]), strict=True):
        source, size = picture_source(picture)
        alt = escape(f"{track.name} at time {time:.2f}: {track.prompts[index]}", quote=True)
        tiles.append(f'<figure><img src="{source}" alt="{alt}" {size}><figcaption>{time:.2f}</figcaption></figure>')
    columns = max(8, columns_for(len(tiles)))
    name = f'<p class="name">{escape(track.name)}</p>'
    return f'{name}<div class="tiles" style="--columns: {columns}">{"".join(tiles)}</div>'


def _settling(tracks: Sequence[Track]) -> str:
    lines = []
    for track in tracks:
        cells = "".join(f"<td>{number(value)}</td>" for value in track.settled())
        lines.append(f'<tr><th scope="row">{escape(track.name)}</th>{cells}</tr>')
    most = max(len(track.times) for track in tracks)
    head = "".join(f'<th scope="col">Call {i + 1}</th>' for i in range(most))
    table = f'<table><thead><tr><th scope="col">Model</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Distances">{table}</div></div>'


HANDOVER = (
    "Diversity distillation: the teacher, guided, makes the first calls at the student's times, the student the rest. "
    "Scores as in a sweep, ± half the width of a 95 % interval; a guided call is two network calls."
)
SHOWN = ("fd", "precision", "recall", "clip_score", "accuracy", "diversity", "diversity_ratio", "diversity_teacher_ratio")


@dataclass(frozen=True)
class HandedOver:
    """What was measured with `first` of `steps` calls made by the teacher; `calls` counts network evaluations per image."""

    first: int
    steps: int
    calls: int
    measured: Measured
    images: Tensor

    def record(self) -> dict[str, Any]:
        """As plain values, without the images."""
        kept = {"scores": self.measured.scores, "intervals": self.measured.intervals, "notes": self.measured.notes}
        return {"teacher_steps": self.first, "steps": self.steps, "network_calls": self.calls, **kept}


def handovers(
    student: Actor,
    teacher: Actor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float,
    scenes: Scenes | None = None,
    reference: Images | None = None,
    world: World | None = None,
    only: Sequence[str] | None = ("fidelity", "clip_score", "accuracy", "diversity"),
    batch: int = 64,
) -> list[HandedOver]:
    """Quality and diversity against the number of the student's steps that the teacher makes, from none to all.

    `teacher` as it samples by itself gives the images whose diversity the students' is a share of. Raises UserError where the
    student's sampler is not one of few steps, or the two have latents of different shapes.
    """
    if not isinstance(student.sampler, FewStep):
        raise UserError(f"only samplers of few steps can be handed over to, and {student.name} has another")
    if tuple(student.pipeline.latent_shape) != tuple(teacher.pipeline.latent_shape):
        shapes = f"{tuple(student.pipeline.latent_shape)} and {tuple(teacher.pipeline.latent_shape)}"
        raise UserError(f"{student.name} and {teacher.name} have latents of different shapes, {shapes}")
    theirs = draw_images(teacher, prompts, seeds, batch=batch)
    made = []
    for first in range(student.sampler.steps + 1):
        sampler = Handover(student.sampler, teacher.denoiser, first, guidance)
        images = draw_images(replace(student, sampler=sampler), prompts, seeds, batch=batch)
        evidence = gather(images, list(prompts), scenes=scenes, reference=reference, teacher=theirs, world=world)
        guided = 1 if guidance == 1 or teacher.pipeline.embeds_guidance else 2
        own = 1 if student.sampler.guidance == 1 or student.pipeline.embeds_guidance else 2
        calls = guided * first + own * (student.sampler.steps - first)
        made.append(HandedOver(first, student.sampler.steps, calls, measure_images(evidence, only), images))
    return made


def _handed_over(found: Sequence[HandedOver]) -> str:
    keys = [key for key in SHOWN if any(key in each.measured.scores for each in found)]
    arrows = {"low": " ↓", "high": " ↑", "none": ""}
    titles = ["Teacher's steps", "Network calls", *(reading(key).label + arrows[reading(key).best] for key in keys)]
    lines = []
    for each in found:
        cells = [str(each.calls)]
        for key in keys:
            low, high = each.measured.intervals.get(key, (0.0, 0.0))
            half = f" ± {number((high - low) / 2)}" if high > low else ""
            cells.append(number(each.measured.scores[key]) + half if key in each.measured.scores else "")
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{each.first} of {each.steps}</th>{row}</tr>')
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Handovers">{table}</div></div>'


def write_grid(track: Track, path: Path) -> Path:
    """Write the grid as a PNG file by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    grid(track).save(temporary, format="PNG")
    temporary.replace(path)
    return path
