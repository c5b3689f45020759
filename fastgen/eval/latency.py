"""Latency and memory of a diffusers pipeline: whole calls, from the prompt to the picture in memory, warm, with their spread.

A number of seconds means nothing without device, threads, precision, attention kernel, size and batch, so all of them are in
the result. The first call is timed by itself (it compiles, chooses kernels and fills caches), then some are made untimed, one
of them to watch the memory, and only then the timed ones. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.eval.generate import generate
from fastgen.eval.protocol import attention, device_name
from fastgen.pipelines.base import base_dtype, network_name

PROMPT = "a red bicycle leaning against a white wall"
WATCHING = 0.002
"""Seconds between two looks at the memory of the process."""


class Watch:
    """Counts a network's calls and times from the start of the first to the end of the last, without waiting for the device."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network, device
        self.calls = self.samples = 0
        self.ends: list[Any] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _before(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self.calls += 1
        self.samples += next(len(each) for each in (*arguments, *named.values()) if isinstance(each, Tensor | list))
        if not self.ends:
            self.ends = [self._now()] * 2

    def _after(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        self.ends[1] = self._now()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts from nothing while it lasts."""
        self.calls = self.samples = 0
        self.ends = []
        hooks = (
            self.network.register_forward_pre_hook(self._before, with_kwargs=True),
            self.network.register_forward_hook(self._after),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def seconds(self) -> float:
        """Between the two ends; the device must have finished."""
        if not self.ends:
            return 0.0
        first, last = self.ends
        found: float = first.elapsed_time(last) / 1000 if self.device.type == "cuda" else last - first
        return found


def measure_latency(
    pipeline: DiffusionPipeline,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    call: dict[str, Any] | None = None,
    batches: Sequence[int] = (1, 8),
    warmup: int = 2,
    repeats: int = 5,
    compile: bool | str = False,
    device: str | None = None,
    prompt: str = PROMPT,
) -> dict[str, Any]:
    """How long a pipeline takes for a batch of each size, and how much memory; a record that JSON can hold.

    `steps`, `guidance` and `call` are as of `generate`. `compile` compiles the network for each batch size, by that backend of
    torch's where it is a name. `device` is where it is measured, by default where the pipeline is. The pipeline comes back as
    it was.

    Under "batches", for each: `first_seconds` (the first call, with all that is done once), `seconds` (median of the warm ones,
    `seconds_low` and `seconds_high` the quartiles, `seconds_all` each), `images_per_second`, `seconds_per_step` (of the
    denoising loop alone), `network_calls` (of a run) and `network_samples` (that went through it: a guided step is two for each
    image), `peak_memory_bytes` and `memory`, what that is of; or `failed`, where memory did not suffice.
    `first_image_seconds` is the warm median at the smallest batch, the time until somebody sees a picture.

    Raises UserError for counts below 1, arguments that the pipeline does not take, and a network that cannot be compiled.
    """
    for name, least in {"warmup": warmup, "repeats": repeats, "batches": min(batches, default=0)}.items():
        if least < 1:
            raise UserError(f"latency needs at least 1 for {name}, not {least}")
    network = getattr(pipeline, network_name(pipeline))
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "call": call}
    with placed(pipeline, device) as place:
        found = [
            _batch(pipeline, network, size, place, compile, prompt=prompt, warmup=warmup, repeats=repeats, **options)
            for size in sorted(set(batches))
        ]
        return {
            "pipeline": type(pipeline).__name__,
            "network": type(network).__name__,
            "device": device_name(str(place)),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "precision": str(base_dtype(network)).removeprefix("torch."),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "attention": attention(pipeline),
            "compile": "inductor" if compile is True else compile,
            "scheduler": type(pipeline.scheduler).__name__,
            "steps": steps,
            "guidance": guidance,
            "call": {name: repr(value) for name, value in (call or {}).items()},
            "prompt": prompt,
            "warmup": warmup,
            "repeats": repeats,
            "torch": torch.__version__,
            "first_image_seconds": found[0].get("seconds"),
            "batches": found,
        }


def _batch(
    pipeline: DiffusionPipeline,
    network: nn.Module,
    size: int,
    place: torch.device,
    compile: bool | str,
    *,
    prompt: str,
    warmup: int,
    repeats: int,
    **options: Any,
) -> dict[str, Any]:
    """The entry of one batch size."""
    watch = Watch(network, place)

    def once() -> tuple[float, Tensor]:
        start = time.perf_counter()
        images = generate(pipeline, [prompt] * size, list(range(size)), batch=size, **options)
        return time.perf_counter() - start, images  # the images are in memory, so the device has finished

    try:
        with compiled(network, compile), watch.watching():
            first, images = _first(once, network, compile)
            calls, samples = watch.calls, watch.samples
            for _ in range(warmup - 1):
                once()
            with peak_memory(place) as peak:
                once()
            runs = []
            for _ in range(repeats):
                watch.ends = []
                seconds, _ = once()
                runs.append((seconds, watch.seconds))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"batch": size, "failed": f"out of memory on {place}"}
    whole = sorted(seconds for seconds, _ in runs)
    low, middle, high = statistics.quantiles(whole, n=4, method="inclusive") if len(whole) > 1 else whole * 3
    made = options["steps"] or len(pipeline.scheduler.timesteps)
    return {
        "batch": size,
        "height": images.shape[2],
        "width": images.shape[3],
        "first_seconds": first,
        "seconds": middle,
        "seconds_low": low,
        "seconds_high": high,
        "seconds_all": [seconds for seconds, _ in runs],
        "images_per_second": size / middle,
        "seconds_per_step": statistics.median(inside for _, inside in runs) / made,
        "network_calls": calls,
        "network_samples": samples,
        **peak,
    }


def _first(once: Any, network: nn.Module, compile: bool | str) -> tuple[float, Tensor]:
    """The first run, in which the network is compiled."""
    if not compile:
        found: tuple[float, Tensor] = once()
        return found
    from torch._dynamo.exc import TorchDynamoException

    try:
        found = once()
    except torch.OutOfMemoryError:
        raise
    except (TorchDynamoException, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{type(network).__name__} cannot be compiled here ({reason}); measure it without compile") from error
    return found


@contextmanager
def compiled(network: nn.Module, backend: bool | str) -> Iterator[None]:
    """The network with its forward compiled for the shapes it will see; its hooks stay outside. As it was, afterwards."""
    if not backend:
        yield
        return
    own = network.__dict__.get("forward")  # such as a hook of accelerate's
    network.forward = torch.compile(network.forward, dynamic=False, backend="inductor" if backend is True else backend)
    try:
        yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own


@contextmanager
def placed(pipeline: DiffusionPipeline, device: str | None) -> Iterator[torch.device]:
    """The pipeline on a device, and where it was, afterwards."""
    former = pipeline.device
    wanted = former if device is None else torch.device(device)
    moved = wanted != former and (wanted.type != former.type or wanted.index not in (None, former.index))
    try:
        if moved:
            pipeline.to(wanted)
        yield wanted
    finally:
        if moved:
            pipeline.to(former)


@contextmanager
def peak_memory(place: torch.device) -> Iterator[dict[str, Any]]:
    """A dictionary that holds, afterwards, the largest `peak_memory_bytes` meanwhile, and of what `memory` that is."""
    found: dict[str, Any] = {}
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
        yield found
        torch.cuda.synchronize(place)
        found |= {"peak_memory_bytes": torch.cuda.max_memory_allocated(place), "memory": "allocated by torch on the GPU"}
        return
    process, ended, seen = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not ended.is_set():
            seen.append(process.memory_info().rss)
            ended.wait(WATCHING)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
    found |= {"peak_memory_bytes": max(*seen, process.memory_info().rss), "memory": "resident memory of the process"}
