"""What `fastgen plan` predicts beside what a run takes: the record in benchmarks/results/memory.json.

    python -m benchmarks.memory [--methods lcm dmd2 ...] [--models sdxl sd3] [--roles full lora nf4]

Models of random weights, some tens of millions of parameters, distilled on the CPU; every run is a process of its own, forked.
Measured is the process's largest resident set (VmHWM, the operating system's own account) over two updates, less what is
resident once a tiny run has warmed the libraries up in that very process: a fork begins without its parent's pages of the
libraries' code, some 60 MB that would count as the run's. Freed memory goes back to the system at once (glibc's
MALLOC_MMAP_THRESHOLD_). It holds what no plan counts: workspaces inside kernels and the heap of the interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from benchmarks.peak import forked, resident
from fastgen import config as configuration
from fastgen.data.encoding import free_text_encoders
from fastgen.plan.estimate import Blank, estimate
from fastgen.training.loop import Trainer
from fastgen.training.run import open_pipeline

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "memory.json"
PACKAGES = ("torch", "diffusers", "peft")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
METHODS = ("progressive", "lcm", "dmd2")
ROLES = ("full", "lora", "nf4")
"""Trained in full, as LoRA, and as LoRA on a base in 4 bits."""
WARM = "warm-lcm-lora"
KERNELS = find_spec("bitsandbytes") is not None


def make_model(name: str, folder: Path) -> None:
    """A pipeline folder: the tests' random pipeline with a larger denoiser."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny = importlib.import_module("tiny_models")
    pipeline: Any = getattr(tiny, "toy" if name == "warm" else name)()
    torch.manual_seed(0)
    if name == "sdxl":
        config = {**pipeline.unet.config, "block_out_channels": (128, 256), "sample_size": 32, "norm_num_groups": 32}
        config |= {"layers_per_block": 2, "transformer_layers_per_block": 4, "attention_head_dim": 8}
        network: Any = UNet2DConditionModel.from_config(config)
        pipeline.register_modules(unet=network)
    elif name == "sd3":
        config = {**pipeline.transformer.config, "num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 6}
        config |= {"caption_projection_dim": 384, "sample_size": 32, "pos_embed_max_size": 32}
        network = SD3Transformer2DModel.from_config(config)
        pipeline.register_modules(transformer=network)
    pipeline.save_pretrained(folder)


def write_run(folder: Path, model: str, method: str, role: str) -> Path:
    """The run that is planned and measured."""
    (folder / "prompts.txt").write_text("a red cube\n")
    file = folder / f"{model}-{method}-{role}.toml"
    base, mode = ("none", role) if role in ("full", "lora") else (role, "lora")
    file.write_text(
        f'pipeline = "{folder / model}"\nquantize = "{base}"\n'
        f'[method]\nname = "{method}"\n[roles]\nstudent = "{mode}"\n[lora]\nrank = 16\n'
        f'[data]\nprompts = "{folder / "prompts.txt"}"\nimages = "{folder}"\n'
        f"[train]\nbatch = 2\nema = 0.9\n"
    )
    return file


def measure(file: Path) -> dict[str, int]:
    """In this process: the run's largest resident set over two updates, beyond that of the imports."""
    config = configuration.load(file)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew.
    before = resident("VmRSS")
    pipeline = open_pipeline(config)
    config.method.setup(pipeline)
    trainer = Trainer(config.method, Blank(pipeline, config.method), config.train, device="cpu")  # type: ignore[arg-type]
    free_text_encoders(pipeline)
    config.method.advance(0, config.train.steps)
    for _ in range(2):
        for turn in trainer.turns:
            trainer.move(turn)
        if trainer.ema is not None:
            trainer.ema.update()
    return {"before": before, "measured": resident("VmHWM") - before}


def measure_warm(file: Path) -> dict[str, int]:
    """`measure`, after the tiny run has done all that a first run does."""
    measure(file.with_name(f"{WARM}.toml"))
    return measure(file)


def predict(file: Path) -> dict[str, int]:
    """What the plan says of the same updates."""
    plan = estimate(configuration.load(file), device="cpu")
    return {"predicted": max(turn.peak for turn in plan.turns), "held": plan.held}


def apart(what: Callable[[Path], dict[str, int]], file: Path) -> dict[str, int]:
    """What `what` finds in a process of its own, forked so that nothing is imported anew."""
    return forked(lambda: what(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sdxl", "sd3"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=[role for role in ROLES if role != "nf4" or KERNELS])
    args = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastgen-memory-") as name:
        folder = Path(name)
        make_model("warm", folder / "warm")
        measure(write_run(folder, "warm", "lcm", "lora"))
        for model in args.models:
            make_model(model, folder / model)
            for method in args.methods:
                for role in args.roles:
                    file = write_run(folder, model, method, role)
                    found = apart(predict, file) | apart(measure_warm, file)
                    ratio = round(found["predicted"] / found["measured"], 3)
                    rows.append({"model": model, "method": method, "role": role, **found, "ratio": ratio})
                    mb = [f"{found[key] / 1e6:8.1f} MB" for key in ("predicted", "measured")]
                    print(f"{model:<6}{method:<13}{role:<6}{mb[0]}{mb[1]}   ratio {ratio:.3f}", flush=True)
                    write_record(rows)


def write_record(rows: list[dict[str, Any]]) -> None:
    """The record with these rows; those of other models, methods and roles stay, with the command that made them."""
    command, names = " ".join(["python -m benchmarks.memory", *sys.argv[1:]]), ("model", "method", "role")
    before = json.loads(RECORD.read_text()) if RECORD.is_file() else {"command": command, "runs": []}
    measured = [[row[name] for name in names] for row in rows]
    rows = [row for row in before["runs"] if [row[name] for name in names] not in measured] + rows
    commands = before["command"].split("; ")
    record = {
        "command": "; ".join(commands if command in commands else [*commands, command]),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
        "runs": rows,
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
