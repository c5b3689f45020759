"""`fastgen doctor`: what this machine can do, what is installed, and what is known not to work together."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata as metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fastgen.cli.options import add_common, emit, writable
from fastgen.errors import UserError

GIB = 2**30
DISTRIBUTION = "fastgen-diffusion"
TOY_PARTS = ("teacher", "clip", "reader")
KERNELS = {  # import name -> what brings it
    "xformers.ops":   "xformers",
    "flash_attn":     "flash-attn",
    "sageattention":  "sageattention",
    "kernels":        "kernels (prebuilt flash attention from the hub)",
}


@dataclass
class Finding:
    """One thing looked at. "note": fine, but worth knowing; "warning": some things will not work; "wrong": most will not."""

    topic: str
    status: Literal["ok", "note", "warning", "wrong"]
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, "folder whose write access is tried; default: the current one")


def run(args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a package says on import is told here in our own words
        findings = [*installation(), *devices(), *processor(), *attention(), *shipped(), *storage(args.output or Path())]
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
    for each in requirements:
        extra = next((name for name in ("eval", "xformers") if each.marker and each.marker.evaluate({"extra": name})), None)
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
    yield from conflicts()


def conflicts() -> Iterator[Finding]:
    """Packages that are known to break one another."""
    if installed("fastgen"):
        detail = f"another package imported as `fastgen`; pip uninstall it and install {DISTRIBUTION} again"
        yield Finding("other fastgen", "warning", detail)
    if installed("image-reward") and installed("open_clip_torch"):
        yield Finding("image-reward", "warning", "pins timm==0.6.13, open_clip needs a newer one: use separate environments")
    if installed("hpsv2"):
        yield Finding("hpsv2", "warning", "pins protobuf<4 and pytest==7.2.0: use a separate environment")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use precision fp32"
        yield Finding(f"cuda:{index}", "ok", f"{about.name}, {about.total_memory / GIB:.0f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("gpu", "note", f"none found ({built}); the toy world runs on the CPU, large models do not")


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
        enough = total >= 4
        yield Finding("memory", "ok" if enough else "warning", f"{total:.0f} GiB" + ("" if enough else "; 4 are needed"))


def attention() -> Iterator[Finding]:
    """Each attention kernel: installed, importable, and able to run on the best device here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield Finding("attention", "ok", "torch's scaled dot product: always there, used by default")
    for module, brings in KERNELS.items():
        if importlib.util.find_spec(module.split(".")[0]) is None:
            yield Finding(f"attention: {module}", "note", f"not installed ({brings}); not needed")
            continue
        try:
            kernel = importlib.import_module(module)
            if module == "xformers.ops":
                query = torch.zeros(1, 4, 1, 16, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
                kernel.memory_efficient_attention(query, query, query)
        except Exception as error:  # a broken build may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:90]
            detail = f"installed, but does not run on {device} ({reason}); torch's is used"
            yield Finding(f"attention: {module}", "note", detail)
        else:
            yield Finding(f"attention: {module}", "ok", f"runs on {device}" if module == "xformers.ops" else "imports")


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


def storage(output: Path) -> Iterator[Finding]:
    for topic, folder in (("output", output), ("temporary files", Path(tempfile.gettempdir())), ("model cache", cache())):
        try:
            writable(folder)
        except UserError as error:
            yield Finding(topic, "warning", str(error).removeprefix("--output "))
            continue
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(there).free / GIB
        yield Finding(topic, "ok" if free > 1 else "warning", f"{folder.absolute()} is writable, {free:.0f} GiB free")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    detail = "HF_HUB_OFFLINE is set: only local models" if offline else "not tried"
    yield Finding("network", "note" if offline else "ok", detail)
    if sys.flags.optimize:
        yield Finding("python -O", "warning", "assertions are off; torch and diffusers rely on theirs")


def cache() -> Path:
    """Where the hub's client keeps models, without importing it."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
