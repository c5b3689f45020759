"""The images of one row of a sweep: drawn once, batch by batch, by one process or several, kept as PNG files.

While a batch is drawn, a thread encodes the one before it and computes its features. A batch is finished when its
`part-000000.safetensors` is there (features and what was measured meanwhile); what is finished is never drawn again. At the
end the parts become `drawn.json` and one file of features.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.candidates import Setting, Source
from fastgen.eval.generate import generate, load_pipeline
from fastgen.eval.pictures import words, write_pictures
from fastgen.eval.protocol import attention, sampling
from fastgen.eval.results import write_json
from fastgen.pipelines.base import network_name
from fastgen.samplers import SchedulerSpec

WAITING = 2
"""Batches that may wait for being encoded: more would only cost memory."""
TIMED = 4
"""Batches at the start of each process's row that nothing else runs beside, so that their seconds are the sampler's own."""
PATIENCE = timedelta(days=1)
"""How long a process waits for the others."""

Features = Callable[[Tensor], dict[str, Tensor]]
Prepare = Callable[[DiffusionPipeline], object]


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is. The first does everything but the drawing alone."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        return self.index == 0


def processes(device: str) -> tuple[Processes, str]:
    """The processes that `accelerate launch` or torchrun started, and the device of this one; else one, on `device`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    own = str(state.device) if device.startswith("cuda") else device
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone), own


def draw(
    load: Callable[[], DiffusionPipeline],
    setting: Setting,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    name: str,
    batch: int,
    features: Features | None = None,
    check: Callable[[Tensor], None] = lambda images: None,
    team: Processes | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> None:
    """Draw those batches that this process has to and that are not there yet. `check` sees each before it is written.

    `name` is written into the pictures beside prompt, seed, steps and guidance. Raises UserError as `generate`.
    """
    team = team or Processes()
    starts = list(range(0, len(prompts), batch))[team.index :: team.count]
    wanted = [start for start in starts if not part_file(folder, start).is_file()]
    if not wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, pending = load(), deque[Future[None]]()
    options: dict[str, Any] = {"steps": setting.steps, "guidance": setting.guidance, "call": dict(setting.call)}
    if setting.call.keys() & {"timesteps", "sigmas"}:
        options["steps"] = None
    with scheduled(pipeline, setting.scheduler), counted(pipeline) as count, ThreadPoolExecutor(1) as worker:
        about = sampling(pipeline, setting.steps, _guidance(pipeline, setting), setting.call)
        for turn, start in enumerate(wanted):
            while pending and (turn < TIMED or len(pending) >= WAITING):
                pending.popleft().result()
            part = slice(start, min(start + batch, len(prompts)))
            calls, begin = count(), time.perf_counter()
            images = generate(pipeline, prompts[part], seeds[part], batch=batch, **options)
            seconds = (time.perf_counter() - begin) / len(images)
            check(images)
            about["attention"] = attention(pipeline)  # A kernel may be chosen at the first call.
            measured = {"seconds": seconds, "calls": (count() - calls) / len(images), "alone": turn < TIMED, "warm": turn > 0}
            asked = zip(prompts[part], seeds[part], strict=True)
            texts = [words(name, prompt, seed, about["sampler"]) for prompt, seed in asked]
            pending.append(worker.submit(_keep, images, texts, folder, start, features, measured | about))
            tell(min(len(prompts), team.count * (starts.index(start) + 1) * batch))
        for future in pending:
            future.result()


def _guidance(pipeline: DiffusionPipeline, setting: Setting) -> float | None:
    """The guidance scale that is used: the setting's, or else the pipeline's own."""
    if setting.guidance is not None:
        return setting.guidance
    default = inspect.signature(pipeline.__call__).parameters.get("guidance_scale")
    return default.default if default is not None and isinstance(default.default, int | float) else None


@torch.no_grad()
def _keep(
    images: Tensor, texts: Sequence[dict[str, str]], folder: Path, start: int, features: Features | None, measured: Mapping
) -> None:
    write_pictures(images, folder, texts, start=start)
    found = {} if features is None else features(images)
    target = part_file(folder, start)
    temporary = target.with_suffix(".tmp")
    tensors = {key: values.contiguous().clone() for key, values in found.items()} or {"none": torch.zeros(0)}
    save_file(tensors, str(temporary), metadata={"measured": json.dumps(dict(measured))})
    temporary.replace(target)


def part_file(folder: Path, start: int) -> Path:
    """The file that says that the batch from image `start` on is finished."""
    return folder / f"part-{start:06d}.safetensors"


def is_drawn(folder: Path) -> bool:
    """Whether all images are there."""
    return (folder / "drawn.json").is_file()


def finish(folder: Path, count: int, batch: int, keep: Callable[[Iterator[dict[str, Tensor]]], None] | None = None) -> None:
    """Put the parts of all processes together into `drawn.json`; `keep` takes the features of the batches in order.

    Raises UserError where a part is missing or damaged.
    """
    measured = [_read_part(part_file(folder, start))[0] for start in range(0, count, batch)]
    sizes = [min(batch, count - start) for start in range(0, count, batch)]
    timed = [each for each in measured if each["alone"] and each["warm"]] or [each for each in measured if each["alone"]]
    about = {key: measured[0][key] for key in ("sampler", "attention")}
    about["calls"] = sum(each["calls"] * size for each, size in zip(measured, sizes, strict=True)) / count
    about["seconds"] = statistics.median(each["seconds"] for each in timed or measured)
    if keep is not None:
        keep(_read_part(part_file(folder, start))[1] for start in range(0, count, batch))
    write_json(folder / "drawn.json", about)
    for start in range(0, count, batch):
        part_file(folder, start).unlink()


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key != "none"}  # noqa: SIM118
            return json.loads(file.metadata()["measured"]), tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); delete it to have its images drawn again") from error


@contextmanager
def scheduled(pipeline: DiffusionPipeline, spec: SchedulerSpec | None) -> Iterator[None]:
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
def counted(pipeline: DiffusionPipeline) -> Iterator[Callable[[], int]]:
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
def loaded(
    source: Source, device: str, dtype: torch.dtype, prepare: Prepare | None = None
) -> Iterator[Callable[[], DiffusionPipeline]]:
    """A function that loads the pipeline when it is first wanted, and calls `prepare` with it; it is let go of at the end."""
    kept: list[DiffusionPipeline] = []

    def load() -> DiffusionPipeline:
        if not kept:
            made = isinstance(source, DiffusionPipeline)
            kept.append(source if made else load_pipeline(source, dtype=dtype, device=device))
            if prepare is not None:
                prepare(kept[0])
        return kept[0]

    yield load
    if kept and not isinstance(source, DiffusionPipeline):
        kept.clear()
        gc.collect()
