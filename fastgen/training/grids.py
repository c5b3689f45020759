"""Sample grids: the same prompts and the same noise, the teacher beside the student, through the student's own sampler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.data.source import encode_prompts
from fastgen.denoiser import Condition, Predicts
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.pipelines.base import Pipeline
from fastgen.samplers import FewStep, Sampler, even_times
from fastgen.training.ema import EMA
from fastgen.training.launch import rank
from fastgen.training.pictures import beside_teacher
from fastgen.training.random_state import undisturbed

__all__ = ["Grids", "describe", "draw_latents", "evaluating", "grid", "noise_of"]

TEACHER_STEPS = 50
GAP = 4
SMALL = 128


class Grids:
    """Draws one picture at a time into `folder`: a row a prompt, the teacher's columns at the left, the student's beside."""

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] = (0, 1),
        at_once: int = 16,
        teacher: Sampler | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        """A column a seed. `at_once` samples are computed together. `teacher` samples the teacher: by default 50 even steps of
        the ODE with the pipeline's own guidance.
        """
        self.pipeline, self.folder, self.prompts, self.seeds = pipeline, folder, list(prompts), list(seeds)
        self.at_once, self.autocast = at_once, autocast
        self.teacher = teacher or FewStep(even_times(TEACHER_STEPS, pipeline.process), guidance=pipeline.default_guidance)
        self.condition = encode_prompts(pipeline, self.prompts)
        self.teacher_images: Tensor | None = None
        self.seen: dict[str, float] = {}
        """What the last pictures look like beside the teacher's: `beside_teacher`."""

    def draw(self, method: Method, step: int, ema: EMA | None = None) -> Path:
        """Sample the student as it is after `step` updates, averaged if `ema` is given; writes the PNG and a JSON beside it."""
        sampler = method.sampler()
        with undisturbed(self.pipeline.device), torch.no_grad(), self.autocast():
            if self.teacher_images is None:
                self.teacher_images = self.teachers()
            with evaluating(method.trained), ema.applied(method.trained) if ema else nullcontext():
                images = self.sample(method.trained, sampler)
        path = self.folder / f"step-{step:08d}.png"
        if rank() > 0:  # Here only for its part of the weights.
            return path
        self.seen = beside_teacher(images, self.teacher_images, len(self.seeds))
        about = {
            "step": step,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "student": describe(sampler) | {"averaged": ema is not None},
            "teacher": describe(self.teacher),
            "beside_teacher": self.seen,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{path.stem}.partial"
            grid([self.teacher_images, images], len(self.seeds)).save(partial, format="PNG")
            partial.replace(path)
            partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
            partial.replace(path.with_suffix(".json"))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
        return path

    def sample(self, denoiser: Predicts, sampler: Sampler) -> Tensor:
        """Images [prompts * seeds, 3, H, W] in [-1, 1], on the CPU; a sample's noise depends on its prompt and seed alone."""
        device, shape = self.pipeline.device, self.pipeline.latent_shape
        noise = torch.stack([noise_of(i, seed, shape) for i in range(len(self.prompts)) for seed in self.seeds])
        condition = self.condition.repeat(len(self.seeds))
        latents = in_parts(denoiser, sampler, noise, condition, device, self.at_once)
        return torch.cat([self.pipeline.decode(x0).float().cpu() for x0 in latents])

    def teachers(self) -> Tensor:
        """The teacher's pictures, drawn once: a run that goes on finds them beside its grids.

        They are kept in 8 bits, as they are shown.
        """
        about = json.dumps([describe(self.teacher), self.prompts, self.seeds, list(self.pipeline.latent_shape)])
        key, path = hashlib.sha256(about.encode()).hexdigest(), self.folder / "teacher.safetensors"
        kept = read_kept(path, key)
        if kept is None:
            drawn = self.sample(self.pipeline.frozen(), self.teacher)
            kept = ((drawn.clamp(-1, 1) + 1) * 127.5).nan_to_num().round().to(torch.uint8)
            if rank() == 0:
                keep(path, key, kept)
        return kept.float() / 127.5 - 1


def in_parts(
    denoiser: Predicts, sampler: Sampler, noise: Tensor, condition: Condition, device: torch.device, at_once: int
) -> Iterator[Tensor]:
    """Latents from `noise` [N, ...], `at_once` at a time, each part with a generator of its own."""
    for start in range(0, len(noise), at_once):
        part = slice(start, start + at_once)
        generator = torch.Generator().manual_seed(start)
        yield sampler.sample(denoiser, noise[part].to(device), condition[part].to(device), generator=generator)


def draw_latents(
    denoiser: Predicts, sampler: Sampler, noise: Tensor, condition: Condition, device: torch.device, at_once: int
) -> Tensor:
    """Latents [N, ...] on the CPU, float32, from `noise` [N, ...]."""
    return torch.cat([x0.float().cpu() for x0 in in_parts(denoiser, sampler, noise, condition, device, at_once)])


def read_kept(path: Path, key: str) -> Tensor | None:
    """What `keep` wrote under this key; None where there is nothing, or something else."""
    try:
        with safe_open(str(path), "pt") as file:
            return file.get_tensor("kept") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None


def keep(path: Path, key: str, tensor: Tensor) -> None:
    """Write a tensor, whole or not at all. Raises UserError where that cannot be done."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"kept": tensor.contiguous()}, partial, metadata={"key": key})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def noise_of(prompt: int, seed: int, shape: Sequence[int]) -> Tensor:
    """Unit noise of one latent `shape` for a prompt's number and a seed."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * 100_003 + prompt))


def describe(sampler: Sampler) -> dict[str, Any]:
    """A sampler in words and numbers, for JSON."""
    options: dict[str, Any] = asdict(sampler) if is_dataclass(sampler) and not isinstance(sampler, type) else {}
    return {"sampler": type(sampler).__name__, "steps": sampler.steps, **options}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A block in which `module` is in evaluation mode (no dropout); each part's mode is put back after it."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def grid(groups: Sequence[Tensor], columns: int) -> Image.Image:
    """Groups of images [N, 3, H, W] in [-1, 1], each `columns` wide, side by side with a white gap; small ones are enlarged."""
    blocks = []
    for images in groups:
        number, _, height, width = images.shape
        rows = images.view(number // columns, columns, 3, height, width).permute(2, 0, 3, 1, 4)
        blocks.append(rows.reshape(3, number // columns * height, columns * width))
    gap = torch.ones(3, blocks[0].shape[1], max(1, GAP * groups[0].shape[-1] // SMALL))
    joined = torch.cat([part for block in blocks for part in (gap, block)][1:], 2)
    pixels = ((joined.clamp(-1, 1) + 1) * 127.5).nan_to_num().round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = max(1, SMALL // groups[0].shape[-1])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
