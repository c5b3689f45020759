"""From images to numbers (`score_images`), and from a diffusers pipeline to a record of numbers (`evaluate`)."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fastgen.data.toy.captions import caption
from fastgen.data.toy.scenes import IMAGE_SIZE, Scenes, render, sample_scenes
from fastgen.errors import UserError
from fastgen.eval.generate import generate, load_pipeline
from fastgen.eval.images import Images, PictureFolder, check_images, images_hash, to_uint8
from fastgen.eval.intervals import interval
from fastgen.eval.pictures import split_reference, words, write_pictures
from fastgen.eval.protocol import asking, computing, describe_pipeline, describe_world, measuring, sampling
from fastgen.eval.registry import Evidence, Metric, metrics
from fastgen.eval.results import save_tensors, write_json
from fastgen.eval.statistics import Statistics, read_statistics
from fastgen.eval.weights import file_hash
from fastgen.eval.world import PHOTO, TOY, World

REFERENCE_SEED = 314159
"""Real images are drawn with seeds of their own, so that they are the same for every candidate and never the training's."""


@dataclass
class Measured:
    """Scores by key, their confidence intervals (95 %) where known, and values [N] of single images where a score is a mean."""

    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    each: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """Scores by key (`fastgen.eval.registry.readings` tells how to show them), notes, and all that could change the scores.

    `protocol` is what `fastgen.eval.protocol` compares; `settings` say the same and more in the words of the call. `each` holds
    the values [N] of single images, in the order of `prompts` and `seeds`.
    """

    scores: dict[str, float]
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    each: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All but the values of single images, as plain values."""
        kept = ("scores", "intervals", "notes", "settings", "protocol")
        found: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in kept}, default=str))
        return found

    def save(self, path: Path | str) -> None:
        """Write the record as JSON and, beside it, the values of single images with their prompts and seeds."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = {"prompts": json.dumps(self.prompts), "seeds": json.dumps(self.seeds)}
        save_tensors(values_file(path), self.each or {"none": torch.zeros(0)}, asked)
        write_json(path, self.record())


def values_file(record: Path) -> Path:
    """Where the values of single images are kept that belong to a record."""
    return record.with_suffix(".values.safetensors")


def score_images(
    images: Images,
    prompts: Sequence[str] | None = None,
    *,
    scenes: Scenes | None = None,
    reference: Images | None = None,
    floor: Images | None = None,
    teacher: Images | None = None,
    paired: bool | None = None,
    world: World | None = None,
    only: Sequence[str] | None = None,
    device: str = "cpu",
    notes: list[str] | None = None,
) -> dict[str, float]:
    """The scores of `measure_images` alone; sentences about what was skipped are appended to `notes`."""
    evidence = gather(
        images,
        prompts,
        scenes=scenes,
        reference=reference,
        floor=floor,
        teacher=teacher,
        paired=paired,
        world=world,
        device=device,
    )
    if notes is not None:
        evidence.notes = notes
    return measure_images(evidence, only).scores


def measure_images(evidence: Evidence, only: Sequence[str] | None = None) -> Measured:
    """Every usual metric of the world for which there is evidence, or those that `only` names ("all": every one).

    Raises UserError for unknown names. What cannot be measured is a note, not an error.
    """
    measured = Measured(notes=evidence.notes)
    for entry in chosen_metrics(evidence.world, only):
        if missing := entry.missing(evidence):
            if only is not None:
                evidence.note(f"The metric {entry.name} was left out: it needs {' and '.join(missing)}.")
            continue
        try:
            found = entry.measure(evidence)
        except UserError as error:
            evidence.note(f"The metric {entry.name} was left out: {error}.")
            continue
        for key, score in found.items():
            measured.scores[key] = score.value
            if (ends := interval(score, evidence.prompts)) is not None:
                measured.intervals[key] = ends
            if score.each is not None:
                measured.each[key] = score.each
    return measured


def chosen_metrics(world: World, only: Sequence[str] | None) -> list[Metric]:
    """The metrics of a world that are asked for. Raises UserError for names that are none, or none of this world."""
    known = metrics()
    if only is None or list(only) == ["all"]:
        return [entry for entry in known.values() if world.name in entry.worlds and (entry.usual or only is not None)]
    for name in only:
        if name not in known:
            raise UserError(f"no metric is called {name!r}; there are {', '.join(sorted(known))}")
        if world.name not in known[name].worlds:
            raise UserError(
                f"the metric {name} measures {' and '.join(known[name].worlds)} pictures, not the {world.name} world's"
            )
    return [entry for entry in known.values() if entry.name in only]


def gather(
    images: Images,
    prompts: Sequence[str] | None = None,
    *,
    scenes: Scenes | None = None,
    reference: Images | None = None,
    floor: Images | None = None,
    teacher: Images | None = None,
    statistics: Statistics | None = None,
    paired: bool | None = None,
    world: World | None = None,
    device: str = "cpu",
) -> Evidence:
    """What metrics may look at, from whatever there is.

    `images` are uint8 [N, 3, H, W] with one prompt each (the same prompt twice is two seeds of it). `scenes` says what each
    toy image should show; without a `reference` its real images are then drawn here, two sets, one of them for the floor.
    Otherwise `reference` holds real images and `floor` further ones; without a floor, a reference of at least 2 N gives its
    last N. `paired` says that the reference belongs to the same prompts in the same order (default: with scenes).
    `teacher` are the teacher's images of the same prompts from the same noise; `statistics` take the reference's place in the
    Fréchet distance.

    Raises UserError for tensors of the wrong kind and lists of different length.
    """
    world = world or (TOY if scenes is not None else PHOTO)
    check_images(images, "images")
    for name, given in (("prompts", prompts), ("scenes", scenes), ("images of the teacher", teacher)):
        if given is not None and len(given) != len(images):
            raise UserError(f"there are {len(given)} {name} for {len(images)} images; give one for each")
    if scenes is not None and reference is None and statistics is None:
        reference, floor = real_images(scenes, REFERENCE_SEED), real_images(scenes, REFERENCE_SEED + 1)
    elif reference is not None:
        check_images(reference, "reference")
        if floor is None and len(reference) >= 2 * len(images):
            reference, floor = split_reference(reference, len(images))
    if floor is not None:
        check_images(floor, "floor")
    same = scenes is not None if paired is None else paired
    same = same and reference is not None and len(reference) == len(images)
    return Evidence(images, world, prompts, scenes, reference, floor, teacher, same, device, statistics=statistics)


def open_reference(reference: Images | Path | str | None) -> tuple[Images | None, Statistics | None]:
    """Real images, or statistics of some, from what a user names: a folder of pictures, or a file of mean and covariance.

    Raises UserError where it is neither.
    """
    if not isinstance(reference, Path | str):
        return reference, None
    if Path(reference).is_file():
        return None, read_statistics(reference)
    return PictureFolder(reference), None


def known_reference(real: Images | None, reference: Images | Path | str | None) -> tuple[int | None, str] | None:
    """Count and hash of what images are compared with: of pictures their pixels', of statistics the file's."""
    if real is not None:
        return len(real), images_hash(real)
    if isinstance(reference, Path | str) and Path(reference).is_file():
        return read_statistics(reference).count, file_hash(reference)
    return None


def real_images(scenes: Scenes, seed: int) -> Tensor:
    """A render of each scene as uint8 [N, 3, 32, 32]."""
    return to_uint8(render(scenes, torch.Generator().manual_seed(seed)))


def toy_prompts(
    number: int, *, seeds_per_prompt: int = 2, seed: int = 0, split: str = "held-out", objects: int | None = None
) -> tuple[list[str], list[int], Scenes]:
    """Prompts, seeds and scenes of `number` toy images: each prompt occurs `seeds_per_prompt` times in a row.

    A prompt that is drawn again by chance goes on with its next seeds, so that no image is made twice.
    """
    if number < 1 or seeds_per_prompt < 1:
        raise UserError(f"number and seeds_per_prompt must be at least 1, not {number} and {seeds_per_prompt}")
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(-(-number // seeds_per_prompt), generator, split=split, objects=objects)
    texts = caption(scenes, generator)
    rows = (torch.arange(number) // seeds_per_prompt).tolist()
    prompts, used = [texts[row] for row in rows], Counter[str]()
    seeds = []
    for prompt in prompts:
        seeds.append(seed + used[prompt])
        used[prompt] += 1
    return prompts, seeds, scenes[torch.tensor(rows)]


def evaluate(
    target: DiffusionPipeline | Path | str,
    *,
    prompts: Sequence[str] | None = None,
    number: int = 1000,
    prompts_from: str = "the user",
    seeds_per_prompt: int = 2,
    seed: int = 0,
    split: str = "held-out",
    objects: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: dict[str, Any] | None = None,
    reference: Tensor | Path | str | None = None,
    world: World | None = None,
    only: Sequence[str] | None = None,
    batch: int = 64,
    device: str = "cpu",
    images_folder: Path | str | None = None,
    output: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    prepare: Callable[[DiffusionPipeline], object] | None = None,
) -> Evaluation:
    """Sample a diffusers pipeline (object or folder) and measure the images.

    Without `prompts` the toy world's are used: `number` images of held-out prompts, and everything is measured. With prompts,
    each is sampled `seeds_per_prompt` times and measured against `reference`: a tensor or a folder of real images, or a file of
    statistics (`fastgen.eval.statistics`).
    `images_folder` keeps the images, each with its prompt and seed, and the record as `evaluation.json`; `output` is a file for
    the record. Beside either lie the values of single images, which `fastgen.eval.compare` reads. `prepare` is called with the
    pipeline before it samples.

    Raises UserError where the pipeline, the prompts or the reference cannot be used.
    """
    where = None if isinstance(target, DiffusionPipeline) else Path(target)
    scenes = None
    if prompts is None:
        texts, seeds, scenes = toy_prompts(number, seeds_per_prompt=seeds_per_prompt, seed=seed, split=split, objects=objects)
        prompts_from = toy_name(split, objects)
    else:
        texts = [text for text in prompts for _ in range(seeds_per_prompt)]
        seeds = [seed + i for _ in prompts for i in range(seeds_per_prompt)]
    world = world or (TOY if scenes is not None else PHOTO)
    chosen = chosen_metrics(world, only)
    real, statistics = open_reference(reference)
    pipeline = load_pipeline(where, device=device) if where is not None else target
    assert isinstance(pipeline, DiffusionPipeline)
    if prepare is not None:
        prepare(pipeline)
    start = time.perf_counter()
    images = generate(pipeline, texts, seeds, steps=steps, guidance=guidance, batch=batch, call=call, progress=progress)
    seconds = time.perf_counter() - start
    if scenes is not None and images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
        made = f"{images.shape[3]} x {images.shape[2]}"
        raise UserError(f"the pipeline makes {made} images, not toy scenes; give prompts of its own")
    sampler = sampling(pipeline, steps, guidance, call or {})
    name = str(where) if where is not None else type(pipeline).__name__
    evidence = gather(images, texts, scenes=scenes, reference=real, statistics=statistics, world=world, device=device)
    measured = measure_images(evidence, only)
    described = describe_pipeline(pipeline, where)
    known = known_reference(evidence.reference, reference)
    protocol = {
        **measuring(world, chosen),
        **asking(texts, seeds, name=prompts_from, reference=known),
        **computing(device, batch, pipeline.dtype),
        "model": {"name": name, "weights": described["weights_sha256"]},
        **sampler,
    }
    toy = {"split": split, "objects": objects} if scenes is not None else {}
    settings = {
        "target": name,
        "number": len(images),
        "seeds": sorted(set(seeds)),
        "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        **toy,
        "steps": steps,
        "guidance": guidance,
        "call": {name: repr(value) for name, value in (call or {}).items()},
        **described,
        **describe_world(world),
        "reference_sha256": None if known is None else known[1],
        "device": device,
        "sampling_seconds": round(seconds, 3),
    }
    evaluation = Evaluation(
        *(measured.scores, measured.notes, settings, measured.intervals, protocol, measured.each, texts, seeds)
    )
    if images_folder is not None:
        told = [words(name, prompt, number, sampler["sampler"]) for prompt, number in zip(texts, seeds, strict=True)]
        write_pictures(images, Path(images_folder), told)
        evaluation.save(Path(images_folder) / "evaluation.json")
    if output is not None:
        evaluation.save(output)
    return evaluation


def toy_name(split: str, objects: int | None) -> str:
    """The toy world's prompts in words."""
    return f"the toy world, {split}" + ("" if objects is None else f", {objects} objects")
