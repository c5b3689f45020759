"""What every attention kernel here costs and how far off it is: the record in benchmarks/results/attention.json.

    python -m benchmarks.attention [--device cuda] [--presets flux sdxl] [--dtype bfloat16] [--batch 1] [--shrink 1]

Each preset is the attention of one pass of a network: its shapes, and how many layers have them. By turns in one process,
forward alone and forward with backward, so that the ratios to torch's own choice ("native") are of one run; seconds on a CPU
are the process's own, on one thread. Errors are relative, ||x - r|| / ||r||, of the output and the worst gradient against
attention in float64, over a few heads. On a CPU tokens are by default a 64th, so that it takes
minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.methods import ROOT, environment, write
from fastgen.attention import measure
from fastgen.attention.calls import Call, made_up
from fastgen.attention.kernels import FALLBACK, KERNELS, Kernel, first_line, missing, unfit
from fastgen.attention.processors import load
from fastgen.errors import UserError

RECORD = ROOT / "benchmarks" / "results" / "attention.json"


class Shape(NamedTuple):
    """Attention of `heads` heads of `size` between `queries` tokens and `keys`, in `layers` layers; 0 keys: of itself."""

    heads: int
    queries: int
    keys: int
    size: int
    layers: int
    masked: bool = False


PRESETS: dict[str, tuple[str, tuple[Shape, ...]]] = {
    "toy": ("the toy teacher, 32 px", (Shape(4, 16, 0, 32, 4), Shape(4, 16, 22, 32, 4))),
    "sd15": (
        "Stable Diffusion 1.5, 512 px",
        tuple(
            Shape(8, tokens, keys, size, layers)
            for tokens, size, layers in ((4096, 40, 5), (1024, 80, 5), (256, 160, 5), (64, 160, 1))
            for keys in (0, 77)
        ),
    ),
    "sdxl": (
        "SDXL, 1024 px",
        tuple(
            Shape(heads, tokens, keys, 64, layers)
            for heads, tokens, layers in ((10, 4096, 10), (20, 1024, 60))
            for keys in (0, 77)
        ),
    ),
    "flux": ("FLUX.1, 1024 px, 512 tokens of text", (Shape(24, 4608, 0, 128, 57),)),
    "sana": ("Sana 1.6B, 1024 px, attention to 300 tokens of text", (Shape(20, 1024, 300, 112, 20, masked=True),)),
    "wan": ("Wan 2.1 1.3B, 81 frames of 480p", (Shape(12, 32760, 0, 128, 30), Shape(12, 32760, 512, 128, 30))),
}


def calls_of(shapes: Sequence[Shape], batch: int, shrink: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    """The calls of a preset with a `shrink`-th of its tokens; texts keep their length."""
    found = []
    for heads, queries, keys, size, layers, masked in shapes:
        tokens = max(16, queries // shrink)
        call = made_up(batch, heads, tokens, keys or tokens, size, dtype=dtype, device=device, count=layers)
        if masked:  # Half of the text is there.
            seen = torch.arange(call.key.shape[2], device=device) < call.key.shape[2] // 2
            call = Call(call.query, call.key, call.value, seen[None, None, None].expand(batch, 1, 1, -1), count=layers)
        found.append(call)
    return found


def measured(calls: Sequence[Call], device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds and errors of every kernel that can serve, and the reasons of the others."""
    asked: dict[str, Any] = {
        "device": device.type,
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        "dtypes": {call.dtype for call in calls},
        "head_sizes": {call.head_size for call in calls},
        "masks": {call.mask_kind for call in calls if call.mask_kind is not None},
    }
    rows: dict[str, Any] = {}
    for training in (True, False):
        kernels = []
        for kernel in KERNELS.values():
            if "left_out" in rows.get(kernel.name, {}) or (training and not kernel.trains):
                continue
            found = tried(kernel, calls, asked, training)
            rows.setdefault(kernel.name, {}).update(found)
            if "left_out" not in found:
                kernels.append(kernel)
        seconds = measure.seconds(kernels, calls, training=training, rounds=rounds)
        what = "forward_backward" if training else "forward"
        for name, number in seconds.items():
            rows[name] |= {f"{what}_seconds": number, f"{what}_ratio": number / seconds[FALLBACK]}
    return rows


def tried(kernel: Kernel, calls: Sequence[Call], asked: dict[str, Any], training: bool) -> dict[str, Any]:
    """The errors of a kernel, or why there are none; of those too far off to be taken both."""
    reason = missing(kernel) or unfit(kernel, training=training, forward_mode=False, **asked)
    if reason:
        return {"left_out": reason}
    try:
        load(kernel)
        found = measure.errors(kernel, calls, training=training)
    except (UserError, RuntimeError, ValueError, NotImplementedError, AssertionError, TypeError) as error:
        return {"left_out": first_line(error)}
    gradient = {} if found.gradient is None else {"gradient_error": found.gradient}
    reason = measure.agrees(found, calls)
    return {"output_error": found.output, **gradient, **({"too_far_off": reason} if reason else {})}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shrink", type=int, help="a so-many-th of the tokens; default: 64 on a CPU, else 1")
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    shrink = args.shrink or (64 if device.type == "cpu" else 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    setting = {"device": name, "dtype": str(dtype).removeprefix("torch."), "batch": args.batch, "rounds": args.rounds}
    command = " ".join(["python -m benchmarks.attention", *(sys.argv[1:] if arguments is None else arguments)])
    record: dict[str, Any] = {"command": command, "what": __doc__, **environment(), **setting, "presets": {}}
    for preset in args.presets:
        about, shapes = PRESETS[preset]
        less = 1 if preset == "toy" else shrink
        calls = calls_of(shapes, args.batch, less, dtype, device)
        rows = measured(calls, device, args.rounds)
        described = [call.describe() for call in calls]
        record["presets"][preset] = {"about": about, "shrink": less, "calls": described, "kernels": rows}
        for kernel, row in rows.items():
            if "left_out" not in row:
                ratio = row.get("forward_backward_ratio", float("nan"))
                errors = f"off by {row['output_error']:.1e}, {row.get('gradient_error', float('nan')):.1e}"
                print(f"{preset:<6} {kernel:<18} forward {row['forward_ratio']:.2f}, with backward {ratio:.2f}, {errors}")
    write(args.output, record)


if __name__ == "__main__":
    main()
