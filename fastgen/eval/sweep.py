"""Step-quality curves: every candidate at every setting on the same prompts and seeds, through stock diffusers pipelines.

Sweeping into the same folder again goes on where it stopped and adds what is new (`fastgen.eval.results`).
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fastgen.data.toy.reader import correct
from fastgen.data.toy.scenes import IMAGE_SIZE, Scenes
from fastgen.errors import UserError
from fastgen.eval.evaluation import REFERENCE_SEED, describe_world, real_images, score_images, toy_prompts
from fastgen.eval.generate import generate, load_pipeline
from fastgen.eval.images import from_uint8, read_images
from fastgen.eval.registry import metrics as all_metrics
from fastgen.eval.results import REAL, Results, Row, load_images, open_results, save_images
from fastgen.eval.weights import file_hash
from fastgen.eval.world import PHOTO, TOY, World
from fastgen.export.directory import MARK, read_export
from fastgen.pipelines.base import network_name
from fastgen.samplers import SchedulerSpec

Source: TypeAlias = Path | str | DiffusionPipeline
TEACHER_STEPS = (50, 8, 4, 2, 1)
Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many images of how many are done."""


@dataclass(frozen=True)
class Setting:
    """One way to call a pipeline: steps, guidance (diffusers convention, 1 = off; None: the pipeline's own), more arguments.

    `scheduler` takes the place of the pipeline's own; its config is completed from that one's.
    """

    steps: int
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    scheduler: SchedulerSpec | None = None


@dataclass(frozen=True)
class Candidate:
    """A pipeline (diffusers folder or object) and the settings to try. Candidates of the same name are one curve."""

    name: str
    source: Source
    role: Literal["teacher", "student"]
    settings: tuple[Setting, ...]


def teacher(
    source: Source,
    *,
    steps: Iterable[int] = TEACHER_STEPS,
    guidance: float | None = None,
    name: str = "teacher",
) -> Candidate:
    """A pipeline with the scheduler it came with, at each of `steps`."""
    return Candidate(name, source, "teacher", tuple(Setting(number, guidance) for number in steps))


def student(folder: Path | str, *, steps: Iterable[int] | None = None, name: str | None = None) -> Candidate:
    """An export, called as its `fastgen.json` says, at the steps it was made for or at each of `steps`.

    Raises UserError where the folder is no export, or its timesteps are listed one by one and others are asked for.
    """
    folder = Path(folder)
    description = read_export(folder)
    own, call = int(description["sampler"]["steps"]), dict(description["call"])
    guidance = call.pop("guidance_scale", None)
    listed = sorted(call.keys() & {"timesteps", "sigmas"})
    call.pop("num_inference_steps", None)
    wanted = [own] if steps is None else list(steps)
    if listed and (others := [number for number in wanted if number != own]):
        raise UserError(f"{folder / MARK} lists {listed[0]} for {own} steps alone; export the student again for {others[0]}")
    return Candidate(name or folder.name, folder, "student", tuple(Setting(number, guidance, call) for number in wanted))


def sweep(
    candidates: Sequence[Candidate],
    output: Path | str,
    *,
    images: int = 1000,
    seed: int = 0,
    seeds_per_prompt: int = 2,
    prompts: Sequence[str] | None = None,
    reference: Tensor | Path | str | None = None,
    world: World | None = None,
    split: str = "held-out",
    objects: int | None = None,
    metrics: Sequence[str] | None = None,
    batch: int = 64,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure every candidate at every setting, and real images against real ones, at `images` images each.

    Without `prompts` they are the toy world's (`split`, `objects`). With prompts, each is taken `seeds_per_prompt` times in a
    row, again and again until there are enough images, and `reference` (a tensor or a folder of real images) is what they are
    compared with; with at least twice as many real images as generated ones there is a floor. `metrics` names some of
    `fastgen.eval.metrics()`, by default all that there is evidence for. Finished rows of an earlier sweep in `output` are kept
    where weights and setting are the same. Gives the rows asked for, the floor first.

    Raises UserError for a bad argument, a folder that cannot be loaded, and an `output` with rows of another protocol.
    """
    output = Path(output)
    _check(candidates, images, seeds_per_prompt, metrics)
    world = world or (TOY if prompts is None else PHOTO)
    task = _task(images, seed, seeds_per_prompt, prompts, reference, split, objects, world, device, metrics)
    drawing = {"split": split if prompts is None else None, "objects": objects, "batch": batch, "dtype": str(dtype)}
    results = open_results(output, task.protocol | drawing, task.prompts, task.seeds)
    total = images * (sum(len(candidate.settings) for candidate in candidates) + (task.floor is not None))
    done, asked = 0, ["real"]

    def tell(what: str, number: int) -> None:
        if progress is not None:
            progress(what, done + number, total)

    if task.floor is not None:
        _measure_floor(results, task, tell)
        done += images
    for candidate in candidates:
        fingerprint = _fingerprint(candidate.source)
        with _loaded(candidate.source, device, dtype) as load:
            for setting in candidate.settings:
                row = _row(candidate, setting, fingerprint)
                asked.append(row.fingerprint)
                if not results.has(row):
                    _measure(results, row, task, load, setting, batch, tell)
                done += images
                tell(row.label, 0)
    return [row for mark in asked for row in results.rows if row.fingerprint == mark]


@dataclass
class _Task:
    """What every candidate is asked, and what its images are compared with."""

    prompts: list[str]
    seeds: list[int]
    scenes: Scenes | None
    reference: Tensor | None
    floor: Tensor | None
    world: World
    device: str
    metrics: Sequence[str] | None
    protocol: dict[str, Any]

    def right(self, images: Tensor) -> Tensor | None:
        return None if self.scenes is None else correct(from_uint8(images), self.scenes)["strict"].bool()

    def score(self, images: Tensor, notes: list[str]) -> dict[str, float]:
        evidence = {"scenes": self.scenes, "reference": self.reference, "floor": self.floor, "world": self.world}
        return score_images(images, self.prompts, **evidence, only=self.metrics, device=self.device, notes=notes)  # type: ignore[arg-type]


def _check(candidates: Sequence[Candidate], images: int, seeds_per_prompt: int, metrics: Sequence[str] | None) -> None:
    if images < 4:
        raise UserError(f"a sweep needs at least 4 images a row, not {images}")
    if seeds_per_prompt < 1:
        raise UserError(f"seeds_per_prompt must be at least 1, not {seeds_per_prompt}")
    keys = [_row(candidate, setting, "").key for candidate in candidates for setting in candidate.settings]
    if not keys:
        raise UserError("there is nothing to sweep: give at least one candidate with at least one setting")
    if twice := sorted(key for key in set(keys) if keys.count(key) > 1):
        raise UserError(f"two candidates are called {twice[0]!r}; give each a name or steps of its own")
    if unknown := sorted(set(metrics or ()) - all_metrics().keys()):
        raise UserError(f"no metric is called {unknown[0]!r}; there are {', '.join(sorted(all_metrics()))}")
    for candidate in candidates:
        if wrong := [setting.steps for setting in candidate.settings if setting.steps < 1]:
            raise UserError(f"{candidate.name}: steps must be at least 1, not {wrong[0]}")


def _task(
    images: int,
    seed: int,
    seeds_per_prompt: int,
    prompts: Sequence[str] | None,
    reference: Tensor | Path | str | None,
    split: str,
    objects: int | None,
    world: World,
    device: str,
    metrics: Sequence[str] | None,
) -> _Task:
    scenes = None
    real = reference if reference is None or isinstance(reference, Tensor) else read_images(reference)
    floor = None
    if prompts is None:
        texts, seeds, scenes = toy_prompts(images, seeds_per_prompt=seeds_per_prompt, seed=seed, split=split, objects=objects)
        if real is None:
            real, floor = real_images(scenes, REFERENCE_SEED), real_images(scenes, REFERENCE_SEED + 1)
    elif not prompts:
        raise UserError("the list of prompts is empty")
    else:
        block = seeds_per_prompt * len(prompts)
        texts = [prompts[i // seeds_per_prompt % len(prompts)] for i in range(images)]
        seeds = [seed + i % seeds_per_prompt + seeds_per_prompt * (i // block) for i in range(images)]
    if floor is None and real is not None and len(real) >= 2 * images:
        real, floor = real[:-images], real[-images:]
    protocol = {
        **{"images": images, "seed": seed, "seeds_per_prompt": seeds_per_prompt, "metrics": sorted(metrics or all_metrics())},
        "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "reference_images": None if real is None else len(real),
        "reference_sha256": None if real is None else hashlib.sha256(real.contiguous().numpy().tobytes()).hexdigest(),
        **describe_world(world),
        "machine": {"device": _device_name(device), "threads": torch.get_num_threads()},
    }
    return _Task(texts, seeds, scenes, real, floor, world, device, metrics, protocol)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.processor() or platform.machine()}"


def _row(candidate: Candidate, setting: Setting, fingerprint: str) -> Row:
    """The row of a candidate and a setting before anything is measured; its file name tells both apart from all others."""
    call = json.dumps(dict(setting.call), sort_keys=True, default=repr)
    chosen = None if setting.scheduler is None else asdict(setting.scheduler)
    sampler = {"call": json.loads(call), **({"scheduler": chosen} if chosen else {})}
    identity = [fingerprint, candidate.name, setting.steps, setting.guidance, sampler]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()[:16]
    slug = "-".join(re.findall(r"\w+", candidate.name)) or "candidate"
    file = f"images/{slug}-{setting.steps:03d}-{digest}.safetensors"
    return Row(candidate.name, candidate.role, setting.steps, setting.guidance, 0.0, 0.0, {}, file, digest, sampler)


def _measure_floor(results: Results, task: _Task, tell: Callable[[str, int], None]) -> None:
    assert task.floor is not None
    row = Row(REAL, "real", 0, None, 0.0, 0.0, {}, "images/real.safetensors", "real")
    if not results.has(row):
        tell(REAL, 0)
        save_images(results.folder / row.images, task.floor, task.right(task.floor), {})
        row.scores = task.score(task.floor, row.notes)
        results.add(row)


def _measure(
    results: Results,
    row: Row,
    task: _Task,
    load: Callable[[], DiffusionPipeline],
    setting: Setting,
    batch: int,
    tell: Callable[[str, int], None],
) -> None:
    """Generate (unless the images are there already) and score."""
    path = results.folder / row.images
    if not path.is_file():
        images, measured = _generate(load(), setting, task, batch, lambda number: tell(row.label, number))
        if task.scenes is not None and images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            made = f"{images.shape[3]} x {images.shape[2]}"
            raise UserError(f"{row.name} makes {made} images, not toy scenes; give prompts of its own")
        save_images(path, images, task.right(images), measured)
    images, _, measured = load_images(path)
    row.calls, row.seconds = measured["calls"], measured["seconds"]
    row.guidance = measured["guidance"] if row.guidance is None else row.guidance
    row.sampler |= {"scheduler": measured["scheduler"]}
    tell(f"{row.label}: scores", len(images))
    row.scores = task.score(images, row.notes)
    results.add(row)


def _generate(
    pipeline: DiffusionPipeline, setting: Setting, task: _Task, batch: int, tell: Callable[[int], None]
) -> tuple[Tensor, dict[str, Any]]:
    """Images, and what was measured on the way: network calls and seconds per image (median over batches), the scheduler."""
    marks = [(0, time.perf_counter())]

    def mark(done: int, total: int) -> None:
        marks.append((done, time.perf_counter()))
        tell(done)

    tell(0)
    listed = setting.call.keys() & {"timesteps", "sigmas"}
    options = {"steps": None if listed else setting.steps, "guidance": setting.guidance, "call": dict(setting.call)}
    with _scheduled(pipeline, setting.scheduler), _counted(pipeline) as count:
        images = generate(pipeline, task.prompts, task.seeds, **options, batch=batch, progress=mark)  # type: ignore[arg-type]
        scheduler = {"class": type(pipeline.scheduler).__name__, "config": _plain_config(pipeline.scheduler)}
    times = sorted((end - start) / (b - a) for (a, start), (b, end) in itertools.pairwise(marks))
    default = inspect.signature(pipeline.__call__).parameters.get("guidance_scale")
    guidance = default.default if default is not None and isinstance(default.default, int | float) else None
    measured = {"calls": count() / len(images), "seconds": times[len(times) // 2], "scheduler": scheduler, "guidance": guidance}
    return images, measured


def _plain_config(scheduler: Any) -> dict[str, Any]:
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_") and name != "trained_betas"}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=repr))
    return plain


@contextmanager
def _scheduled(pipeline: DiffusionPipeline, spec: SchedulerSpec | None) -> Iterator[None]:
    """The pipeline with the scheduler of `spec`, for as long as the block lasts."""
    former = pipeline.scheduler
    if spec is not None:
        made: Any = getattr(diffusers, spec.class_name)
        known = inspect.signature(made.__init__).parameters
        values = {**former.config, **spec.config}
        pipeline.scheduler = made(**{name: value for name, value in values.items() if name in known})
    try:
        yield
    finally:
        pipeline.scheduler = former


@contextmanager
def _counted(pipeline: DiffusionPipeline) -> Iterator[Callable[[], int]]:
    """Counts how many samples go through the denoiser: guidance as a batch of two counts twice, as it costs."""
    seen = [0]

    def see(module: Any, arguments: tuple, named: dict[str, Any]) -> None:
        seen[0] += next(len(each) for each in (*arguments, *named.values()) if isinstance(each, Tensor | list))

    hook = getattr(pipeline, network_name(pipeline)).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield lambda: seen[0]
    finally:
        hook.remove()


@contextmanager
def _loaded(source: Source, device: str, dtype: torch.dtype) -> Iterator[Callable[[], DiffusionPipeline]]:
    """A function that loads the pipeline when it is first wanted; it is let go of at the end."""
    kept: list[DiffusionPipeline] = []

    def load() -> DiffusionPipeline:
        if not kept:
            made = isinstance(source, DiffusionPipeline)
            kept.append(source if made else load_pipeline(source, dtype=dtype, device=device))
        return kept[0]

    yield load
    if kept and not isinstance(source, DiffusionPipeline):
        kept.clear()
        gc.collect()


def _fingerprint(source: Source) -> str:
    """A hash of the weights and settings of a pipeline, so that rows of weights that have changed since are seen."""
    digest = hashlib.sha256()
    if isinstance(source, DiffusionPipeline):
        digest.update(json.dumps(_plain_config(source.scheduler), sort_keys=True).encode())
        modules = {name: part for name, part in source.components.items() if isinstance(part, torch.nn.Module)}
        for key, value in sorted(torch.nn.ModuleDict(modules).state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    folder = Path(source)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    for path in sorted([*folder.rglob("*.safetensors"), *folder.glob("*/*.json")]):
        digest.update(f"{path.relative_to(folder)} {file_hash(path)}".encode())
    return digest.hexdigest()
