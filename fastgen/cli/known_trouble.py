"""What `fastgen doctor` knows to go wrong: packages that break one another, and where a run is told to live."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DISTRIBUTION = "fastgen-diffusion"
GIB = 2**30
SECONDS = 3.0

COMPANIONS = (  # packages whose own demands on the others are looked at
    "torchvision", "torchaudio", "xformers", "flash-attn", "sageattention", "kernels", "bitsandbytes", "torchao", "diffusers",
    "transformers", "accelerate", "peft", "open-clip-torch", "timm", "torch-fidelity", "datasets", "pytorch-optimizer",
    "tokenizers", "huggingface-hub",
)  # fmt: skip
CORE = frozenset({
    "torch", "numpy", "pillow", "diffusers", "transformers", "accelerate", "peft", "safetensors", "tokenizers",
    "huggingface-hub", "torchvision", "packaging", "pyarrow",
})  # fmt: skip
REMOTE = ("nfs", "cifs", "smb", "9p", "lustre", "gpfs", "beegfs", "ceph", "fuse.", "glusterfs", "drvfs", "afs")
ENGINES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


@dataclass
class Finding:
    """One thing looked at. "note": fine, but worth knowing; "warning": some things will not work; "wrong": most will not."""

    topic: str
    status: Literal["ok", "note", "warning", "wrong"]
    detail: str


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# -- packages ---------------------------------------------------------------------------------------


def conflicts() -> Iterator[Finding]:
    """Packages that are known to break one another, and those whose own demands are not met."""
    if installed("fastgen"):
        detail = f"another package imported as `fastgen`; pip uninstall it and install {DISTRIBUTION} again"
        yield Finding("other fastgen", "warning", detail)
    if installed("image-reward") and installed("open_clip_torch"):
        yield Finding("image-reward", "warning", "pins timm==0.6.13, open_clip needs a newer one: use separate environments")
    if installed("hpsv2"):
        yield Finding("hpsv2", "warning", "pins protobuf<4 and pytest==7.2.0: use a separate environment")
    for name in COMPANIONS:
        yield from unmet(name)


def unmet(name: str) -> Iterator[Finding]:
    """What an installed package demands of the core ones and does not get, such as xformers a certain torch."""
    from packaging.requirements import InvalidRequirement, Requirement

    version = installed(name)
    for line in (metadata.requires(name) or []) if version else []:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        needed = wanted.name.lower().replace("_", "-")
        if needed not in CORE or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        there = installed(needed)
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            has = f"{there} is installed" if there else "it is not installed"
            cure = f"pip install -U '{name}' '{needed}{wanted.specifier}'"
            yield Finding(f"{name} {version}", "warning", f"needs {needed}{wanted.specifier}, but {has}; {cure}")


# -- surroundings -----------------------------------------------------------------------------------


def file_system(path: Path, mounts: str | None = None) -> str:
    """The kind of file system that a path is on, such as "ext4" or "nfs4"; "" where that is not to be known."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    best, kind = "", ""
    for line in mounts.splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, parts[2]
    return kind


def over_network(kind: str) -> bool:
    return kind.startswith(REMOTE)


def accelerate_config(file: Path | None = None) -> Iterator[Finding]:
    """What `accelerate config` has left for `accelerate launch`, where it is not for us."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")).expanduser()
    file = file or home / "accelerate" / "default_config.yaml"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    kind = next((line.split(":", 1)[1].strip().strip("'\"") for line in lines if line.startswith("distributed_type:")), "")
    if kind.upper() in ENGINES:
        cure = 'run `accelerate config` again for plain multi-GPU; train.sharding = "fsdp" cuts weights'
        yield Finding("accelerate config", "warning", f"{file} asks for {ENGINES[kind.upper()]}, which fastgen refuses: {cure}")
    else:
        yield Finding("accelerate config", "ok", f"{file}: {kind or 'no distributed_type'}")


def network(offline: bool, seconds: float = SECONDS) -> Finding:
    """Whether the hub answers within some seconds; not asked where that is not wanted."""
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        why = "--offline" if offline else "HF_HUB_OFFLINE is set"
        return Finding("network", "note", f"{why}: not tried; only local models and data can be loaded")
    place, found = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), list[str]()
    asking = threading.Thread(target=lambda: found.append(ask(place, seconds)), daemon=True)
    asking.start()
    asking.join(seconds + 1)  # looking up a name has no limit of its own
    problem = found[0] if found else f"no answer within {seconds:g} s"
    if not problem:
        return Finding("network", "ok", f"{place} answers")
    cure = "models and data must be local; --offline, or HF_HUB_OFFLINE=1, saves the waiting"
    return Finding("network", "note", f"{place} cannot be reached ({problem}); {cure}")


def ask(place: str, seconds: float) -> str:
    """What is wrong with a server, "" if it answers anything at all."""
    try:
        with urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=seconds):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, socket.gaierror) as error:
        return " ".join(str(getattr(error, "reason", error)).split())[:90]


def shared_memory(devices: int) -> Iterator[Finding]:
    """Whether several GPUs have the shared memory that NCCL needs; containers are often given 64 MB."""
    try:
        status = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return
    size = status.f_frsize * status.f_blocks / GIB
    if devices > 1 and size < 1:
        cure = "start the container with --shm-size=8g or --ipc=host"
        yield Finding("shared memory", "warning", f"/dev/shm has {size:.2f} GiB, too little for {devices} GPUs: {cure}")
    else:
        yield Finding("shared memory", "ok", f"/dev/shm has {size:.1f} GiB")


def subsystem(version: str | None = None) -> Iterator[Finding]:
    """Windows' Linux, whose file systems of Windows are slow."""
    if version is None:
        try:
            version = Path("/proc/version").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
    if "microsoft" in version.lower():
        yield Finding("WSL", "note", "files under /mnt are many times slower: keep runs and data in Linux's own folders")


def cuda_trouble(built: str | None, available: bool, nodes: Sequence[Path] | None = None) -> Iterator[Finding]:
    """An NVIDIA GPU that is there and that torch cannot use."""
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*")) if nodes is None else nodes
    if not nodes or available:
        return
    if not built:
        detail = "this torch is built without CUDA; pip install torch as https://pytorch.org tells for your CUDA"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        detail = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides it; unset it"
    else:
        detail = f"torch is built for CUDA {built}, which the driver may be too old for (see nvidia-smi): update it"
    yield Finding("gpu", "warning", f"an NVIDIA GPU is here ({nodes[0]}), but torch cannot use it: {detail}")
