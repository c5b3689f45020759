"""The kernels of attention that can serve a network here: what each can do, where it is found, and why it may not fit.

Facts are those of diffusers' dispatcher (`diffusers.models.attention_dispatch`, read at 0.42.1) and of torch's scaled dot
product. What is listed is refused early and in words; what a kernel does beyond that is found out by calling it
(`fastgen.attention.measure`). Nothing here downloads: kernels of the hub count as found where they are on the disk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Mask = Literal["keys", "pairs", "added"]
"""True for the keys that every query looks at; true or false for each pair of query and key; numbers added to the scores."""

HALF = ("float16", "bfloat16")
ANY = ("float32", *HALF)
EVERY_MASK: tuple[Mask, ...] = ("keys", "pairs", "added")


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name in `speed.attention`, which is diffusers' name for it without a leading underscore.

    `forward_mode`: torch.func.jvp goes through it, or our own rules take its place (`fastgen.tangents`). `head` is the largest
    size of a head, `least` the compute capability that it needs, `most` the last it is for. `hub` is the repository that
    `kernels` loads it from.
    """

    name: str
    backend: str
    package: str = "torch"
    module: str = ""
    hub: str = ""
    trains: bool = True
    forward_mode: bool = False
    masks: tuple[Mask, ...] = ()
    dtypes: tuple[str, ...] = HALF
    head: int = 256
    devices: tuple[str, ...] = ("cuda",)
    least: tuple[int, int] = (8, 0)
    most: tuple[int, int] | None = None
    about: str = ""


_FLASH_3: dict[str, Any] = {"least": (9, 0), "most": (9, 9)}
_EVERYWHERE: dict[str, Any] = {"masks": EVERY_MASK, "dtypes": (*ANY, "float64"), "head": 1 << 16, "least": (0, 0)}

KERNELS: dict[str, Kernel] = {
    each.name: each
    for each in (
        Kernel(
            "native", "native", forward_mode=True, devices=("cpu", "cuda", "mps", "xpu"), **_EVERYWHERE,
            about="torch's own choice among its kernels, call by call",
        ),
        Kernel(
            "native_math", "_native_math", forward_mode=True, devices=("cpu", "cuda", "mps", "xpu"), **_EVERYWHERE,
            about="torch's matrix products; holds all scores, and is what the others are compared with",
        ),
        Kernel(
            "native_flash", "_native_flash", dtypes=HALF, devices=("cpu", "cuda"), about="FlashAttention-2 as built into torch"
        ),
        Kernel(
            "native_efficient", "_native_efficient", masks=EVERY_MASK, dtypes=ANY, head=1 << 16, least=(5, 0),
            about="memory-efficient attention as built into torch",
        ),
        Kernel("native_cudnn", "_native_cudnn", masks=EVERY_MASK, about="cuDNN's, through torch"),
        Kernel(
            "xformers", "xformers", "xformers", "xformers.ops", masks=EVERY_MASK, dtypes=ANY, head=1 << 16, least=(7, 5),
            about="memory-efficient attention of xformers",
        ),
        Kernel("flash", "flash", "flash-attn", "flash_attn", about="FlashAttention-2"),
        Kernel(  # diffusers wraps it in an operator that has no derivative.
            "flash_3", "_flash_3", "flash-attn 3", "flash_attn_interface", trains=False, **_FLASH_3, about="FlashAttention-3"
        ),
        Kernel("flash_hub", "flash_hub", "kernels", "kernels", "kernels-community/flash-attn2", about="FlashAttention-2"),
        Kernel(
            "flash_varlen_hub", "flash_varlen_hub", "kernels", "kernels", "kernels-community/flash-attn2", masks=("keys",),
            about="FlashAttention-2 on the keys that a mask leaves",
        ),
        Kernel(
            "flash_3_hub", "_flash_3_hub", "kernels", "kernels", "kernels-community/flash-attn3", **_FLASH_3,
            about="FlashAttention-3",
        ),
        Kernel(
            "flex", "flex", masks=EVERY_MASK, dtypes=ANY, devices=("cuda",),
            about="torch's flex attention, with block masks; not fused unless it is compiled",
        ),
        Kernel("sage", "sage", "sageattention", "sageattention", trains=False, head=128, about="8-bit products"),
        Kernel(
            "sage_hub", "sage_hub", "kernels", "kernels", "SageAttention/sage-attention", trains=False, head=128,
            about="8-bit products",
        ),
    )
}  # fmt: skip
FALLBACK = "native"
REFERENCE = "native_math"


def missing(kernel: Kernel, *, named: bool = False) -> str:
    """Why a kernel cannot be called in this environment, "" where it can.

    A kernel of the hub that is not on the disk is missing, but where the user has `named` it: then it is loaded when applied.
    """
    if not kernel.module:
        return ""
    if importlib.util.find_spec(kernel.module.split(".")[0]) is None:
        return f"{kernel.package} is not installed"
    try:
        importlib.import_module(kernel.module)
    except Exception as error:  # a broken build may raise anything
        return f"{kernel.package} is installed, but does not import ({first_line(error)})"
    if kernel.hub and not named and not on_disk(kernel.hub):
        return f"{kernel.hub} has not been downloaded; it is where speed.attention names it"
    return _too_old(kernel)


@functools.cache
def _too_old(kernel: Kernel) -> str:
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    try:
        _check_attention_backend_requirements(AttentionBackendName(kernel.backend))
    except RuntimeError as error:
        return f"diffusers cannot use the {kernel.package} that is installed ({first_line(error)})"
    return ""


def on_disk(repository: str) -> bool:
    """Whether the hub's client has something of a repository, in the folder where `kernels` keeps it."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    folder = Path(os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any(folder.glob(f"*--{repository.replace('/', '--')}/snapshots/*"))


def unfit(
    kernel: Kernel,
    *,
    training: bool,
    forward_mode: bool,
    device: str,
    capability: tuple[int, int] | None = None,
    dtypes: Iterable[str] = (),
    head_sizes: Iterable[int] = (),
    masks: Collection[Mask] = (),
) -> str:
    """Why a kernel cannot serve what is asked of it, "" where nothing is known against it.

    `device` is a type such as "cuda", `capability` its compute capability; `dtypes` are as "bfloat16".
    """
    if training and not kernel.trains:
        return "it has no backward pass, so it serves inference alone"
    if forward_mode and not kernel.forward_mode:
        return "it has no derivative in forward mode, which this method takes"
    if device not in kernel.devices:
        return f"it runs on {' and '.join(kernel.devices)}, not on {device}"
    if capability is not None and device == "cuda":
        if capability < kernel.least:
            return f"it needs a GPU of architecture {_dotted(kernel.least)}, and this one is {_dotted(capability)}"
        if kernel.most is not None and capability > kernel.most:
            return f"it is for GPUs of architecture {_dotted(kernel.least)}, and this one is {_dotted(capability)}"
    for dtype in dtypes:
        if not computes_in(kernel, dtype, device):
            return f"it computes in {' and '.join(kernel.dtypes)}, not in {dtype}"
    for size in head_sizes:
        if size > kernel.head:
            return f"its heads are of size {kernel.head} at most, and the network's are of {size}"
    for mask in masks:
        if mask not in kernel.masks:
            return f"it takes {_masks(kernel)}, and the network has {MASKS[mask]}"
    return ""


def computes_in(kernel: Kernel, dtype: str, device: str) -> bool:
    """Whether a kernel takes numbers of a `dtype` such as "bfloat16" on a device; torch's flash takes any on a CPU."""
    return dtype in kernel.dtypes or (device == "cpu" and kernel.name == "native_flash")


MASKS = {"keys": "masks of keys", "pairs": "masks of pairs", "added": "numbers added to its scores"}


def _masks(kernel: Kernel) -> str:
    return " and ".join(MASKS[each] for each in kernel.masks) or "no masks"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def first_line(error: BaseException, most: int = 90) -> str:
    """What an exception says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
