"""`fastgen doctor`: what this machine can do, what is installed, and what is known not to work together."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli import known_trouble
from fastgen.cli.known_trouble import DISTRIBUTION, GIB, Finding
from fastgen.cli.options import add_common, emit, writable
from fastgen.errors import UserError

if TYPE_CHECKING:
    from fastgen.attention.kernels import Kernel

MOST = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
EXTRAS = ("eval", "adversarial", "quantized", "came", "datasets", "xformers")
LITTLE_DISK = 5  # GiB
TOY_PARTS = ("teacher", "clip", "reader")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, "folder whose write access is tried; default: the current one")


def run(args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a package says on import is told here in our own words
        findings = [*installation(), *devices(), *processor(), *attention(), *shipped(), *pictures()]
        findings += [*storage(args.output or Path()), *known_trouble.accelerate_config(), known_trouble.network(args.offline)]
    width = max(len(each.topic) for each in findings)
    lines = [f"{each.status:<7}  {each.topic:<{width}}  {each.detail}" for each in findings]
    wrong = sum(each.status == "wrong" for each in findings)
    warned = sum(each.status == "warning" for each in findings)
    lines += ["", f"{wrong} wrong, {warned} warnings" if wrong or warned else "all is well"]
    emit(args, {"findings": [asdict(each) for each in findings], "wrong": wrong, "warnings": warned}, "\n".join(lines))
    return 2 if wrong else 0


def installation() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(each) for each in metadata.requires(DISTRIBUTION) or []]
        yield Finding("fastgen", "ok", f"{metadata.version(DISTRIBUTION)} in {Path(__file__).parents[1]}")
    except metadata.PackageNotFoundError:
        requirements = []
        yield Finding("fastgen", "note", f"run from {Path(__file__).parents[2]}, not installed: versions are not checked")
        for name in MOST:
            version = known_trouble.installed(name)
            yield Finding(name, "ok" if version else "wrong", version or f"not installed; pip install {name}")
    for each in requirements:
        extra = next((name for name in EXTRAS if each.marker and each.marker.evaluate({"extra": name})), None)
        if each.name == DISTRIBUTION or (each.marker and not extra):
            continue
        try:
            version = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            cure = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install '{each.name}{each.specifier}'"
            yield Finding(each.name, "note" if extra else "wrong", f"not installed; {cure}")
            continue
        fits = each.specifier.contains(version, prereleases=True)
        yield Finding(each.name, "ok" if fits else "wrong", version if fits else f"{version}, but {each.specifier} is needed")
    yield from known_trouble.conflicts()
    if sys.flags.optimize:
        yield Finding("python -O", "warning", "assertions are off, on which torch and diffusers rely: leave out -O")


def devices() -> Iterator[Finding]:
    import torch

    there = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if there else 0):
        yield gpu(index)
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")
    trouble = list(known_trouble.cuda_trouble(torch.version.cuda, there))
    yield from trouble
    if not there and not torch.backends.mps.is_available() and not trouble:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("gpu", "note", f"none found ({built}); the toy world runs on the CPU, large models do not")
    yield from known_trouble.shared_memory(torch.cuda.device_count() if there else 0)


def gpu(index: int) -> Finding:
    """A GPU: can this torch run on it, how much of its memory is free, does it have bf16."""
    import torch

    about, (major, minor) = torch.cuda.get_device_properties(index), torch.cuda.get_device_capability(index)
    topic, total = f"cuda:{index}", about.total_memory / GIB
    built = [each.removeprefix("sm_").rstrip("af") for each in torch.cuda.get_arch_list() if each.startswith("sm_")]
    if built and not any(each[:-1] == str(major) and int(each[-1]) <= minor for each in built):
        detail = f"{about.name} is of architecture {major}.{minor}, which this torch is not built for ({', '.join(built)})"
        return Finding(topic, "wrong", f"{detail}; install another torch")
    free = torch.cuda.mem_get_info(index)[0] / GIB
    told = f"{about.name}, {free:.0f} of {total:.0f} GiB free"
    if (major, minor) < (8, 0):
        return Finding(topic, "warning", f'{told}; no bf16: recipes with it need train.precision="fp16" or "fp32"')
    if free < total / 2:
        return Finding(topic, "warning", f"{told}: another program holds the rest (see nvidia-smi); end it or use another GPU")
    return Finding(topic, "ok", f"{told}, bf16")


def processor() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    capability = f"{torch.backends.cpu.get_cpu_capability()}{', AMX (bf16 is fast)' if amx else ''}"
    yield Finding("cpu", "ok", f"{cores} cores, {capability}")
    threads = torch.get_num_threads()
    chosen = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if os.environ.get("OMP_NUM_THREADS") else "torch's choice"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads > 1 and busy > cores / 2:
        cure = "threads that wait for busy cores slow torch many times over; set train.threads=1"
        yield Finding("threads", "warning", f"{threads} ({chosen}) while the load is {busy:.1f}: {cure}")
    else:
        yield Finding("threads", "ok", f"{threads} ({chosen})")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        limit = memory_limit()
        told = f"{total:.0f} GiB" if limit >= total else f"{limit:.0f} GiB, the limit of this container, of {total:.0f}"
        few = "; 4 are needed, and more than a model's weights to load one: give the container more"
        enough = min(limit, total) >= 4
        yield Finding("memory", "ok" if enough else "warning", told + ("" if enough else few))


def memory_limit() -> float:
    """GiB that the control group of this process may use."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int(Path("/sys/fs/cgroup", name).read_text()) / GIB
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return float("inf")


def attention() -> Iterator[Finding]:
    """The attention kernels of each package: found, and able to run on the best device here."""
    import torch

    from fastgen.attention.kernels import KERNELS, missing, unfit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    asked: dict[str, Any] = {"training": False, "forward_mode": False, "device": device, "capability": capability}
    for package in dict.fromkeys(each.package for each in KERNELS.values()):
        own = [each for each in KERNELS.values() if each.package == package]
        reasons = {each: missing(each) or unfit(each, **asked) or failing(each, device) for each in own}
        runs = [f"{each.name}{'' if each.trains else ' (inference alone)'}" for each, reason in reasons.items() if not reason]
        topic = "attention" if package == "torch" else f"attention: {package}"
        if runs:
            chosen = "native is used" if device == "cpu" else 'speed.attention = "auto" takes the fastest that a run can have'
            yield Finding(topic, "ok", f"{', '.join(runs)} on {device}{f': {chosen}' if package == 'torch' else ''}")
        else:
            yield Finding(topic, "note", f"{next(iter(reasons.values()))}; not needed")


def failing(kernel: Kernel, device: str) -> str:
    """Why a kernel that is there does not compute on a GPU, "" where it does; a CPU has torch's alone."""
    if device == "cpu":
        return ""
    import torch

    from fastgen.attention.calls import made_up
    from fastgen.attention.measure import agrees, errors
    from fastgen.attention.processors import load

    call = made_up(1, 2, 64, 64, 64, dtype=torch.float16, device=device)
    try:
        load(kernel)
        found = errors(kernel, [call], training=kernel.trains)
        return agrees(found, [call]) if kernel.trains else ""
    except Exception as error:  # a broken build may raise anything
        return f"installed, but does not run ({(str(error).splitlines() or [type(error).__name__])[0][:90]})"


def shipped() -> Iterator[Finding]:
    """The toy world's weights, which come with the package."""
    folder = Path(__file__).parents[1] / "data" / "toy" / "weights"
    weights = {part: list((folder / part).rglob("*.safetensors")) for part in TOY_PARTS}
    missing = [part for part, files in weights.items() if not files]
    if missing:
        detail = f"{', '.join(missing)} missing from {folder}: quickstart cannot run; install the package again"
        yield Finding("toy weights", "wrong", detail)
        return
    size = sum(each.stat().st_size for files in weights.values() for each in files) / 2**20
    yield Finding("toy weights", "ok", f"{', '.join(weights)}: {size:.1f} MiB")


def pictures() -> Iterator[Finding]:
    """What kinds of pictures Pillow was built to read."""
    from PIL import features

    missing = [name for name, library in (("jpg", "jpg"), ("png", "zlib"), ("webp", "webp")) if not features.check(library)]
    cure = f"this Pillow cannot read {', '.join(missing)}; pip install --force-reinstall pillow"
    yield Finding("pictures", "warning" if missing else "ok", cure if missing else "jpg, png and webp can be read")


def storage(output: Path) -> Iterator[Finding]:
    for topic, folder in (("output", output), ("temporary files", Path(tempfile.gettempdir())), ("model cache", cache())):
        try:
            writable(folder)
        except UserError as error:
            yield Finding(topic, "warning", str(error).removeprefix("--output "))
            continue
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        free, kind = shutil.disk_usage(there).free / GIB, known_trouble.file_system(there.resolve())
        told = f"{folder.absolute()} is writable, {free:.0f} GiB free"
        if free < LITTLE_DISK:
            yield Finding(topic, "warning", f"{told}: little for models and checkpoints; name another folder")
        elif known_trouble.over_network(kind):
            cure = "what is memory-mapped or written often, such as data.cache, is better on a local disk"
            yield Finding(topic, "note", f"{told}, over a network ({kind}): {cure}")
        else:
            yield Finding(topic, "ok", f"{told}{f' ({kind})' if kind else ''}")
    yield from known_trouble.subsystem()


def cache() -> Path:
    """Where the hub's client keeps models, without importing it."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
