"""The toy teacher from nothing, as a TOML recipe says: what `fastgen train-teacher` runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from fastgen import schema
from fastgen.data.toy.autoencoder import train_autoencoder
from fastgen.data.toy.teacher import pretrain_text_encoder, train_denoiser
from fastgen.errors import UserError
from fastgen.schema import Checked, Source, setting

Say = Callable[[str], None]


@dataclass
class AutoencoderPhase(Checked):
    """One stretch of the autoencoder's training; the next one goes on from its weights."""

    updates: int       = setting(1000, "number of updates", at_least=1)
    batch: int         = setting(24, "images an update", at_least=1)
    lr: float          = setting(1.5e-3, "first learning rate, falling linearly to 0", above=0)
    kl_weight: float   = setting(2e-5, "weight of the Kullback-Leibler term", at_least=0)
    decoder_only: bool = setting(False, "leave the latents as they are")


@dataclass
class TextPhase(Checked):
    """The text encoder's pretraining."""

    updates: int = setting(1000, "number of updates", at_least=1)
    batch: int   = setting(128, "captions an update", at_least=1)
    lr: float    = setting(1.5e-3, "peak learning rate", above=0)


@dataclass
class DenoiserPhase(Checked):
    """One stretch of the training of UNet and text encoder; the next one goes on from its averaged weights."""

    updates: int           = setting(11000, "number of updates", at_least=1)
    batch: int             = setting(64, "images an update", at_least=1)
    lr: float              = setting(1e-3, "peak learning rate, falling on a cosine to 0", above=0)
    caption_dropout: float = setting(0.1, "share of empty captions, for guidance", at_least=0, at_most=1)
    ema: float             = setting(0.999, "decay of the averaged weights", at_least=0, below=1)
    reading_weight: float  = setting(0.05, "weight of the text encoder's pretraining task, which goes on beside", at_least=0)
    pool: int              = setting(8192, "scenes drawn and encoded at a time", at_least=64)


@dataclass
class TeacherRecipe(Checked):
    """Everything that `train_teacher` is told."""

    seed: int                           = setting(0, "seed of all randomness", at_least=0)
    start: str                          = setting("", 'teacher whose denoiser is trained on; "toy": the one that ships')
    autoencoder: list[AutoencoderPhase] = field(default_factory=lambda: [AutoencoderPhase()])
    text_encoder: TextPhase             = field(default_factory=TextPhase)
    denoiser: list[DenoiserPhase]       = field(default_factory=lambda: [DenoiserPhase()])


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> TeacherRecipe:
    """The recipe in a TOML file. Raises UserError naming file, key and what would be right."""
    tables, source = schema.read(path, overrides)
    known = {each.name for each in fields(TeacherRecipe)}
    for key in tables:
        if key not in known:
            source.wrong((key,), f"is not an option of a teacher{schema.nearest(key, known)}")
    return TeacherRecipe(
        seed=schema.convert(int, tables.get("seed", 0), ("seed",), source),
        start=schema.convert(str, tables.get("start", ""), ("start",), source),
        autoencoder=_phases(AutoencoderPhase, tables, "autoencoder", source),
        text_encoder=_section(TextPhase, tables.get("text_encoder", {}), "text_encoder", source),
        denoiser=_phases(DenoiserPhase, tables, "denoiser", source),
    )


def _phases(cls: type, tables: dict[str, Any], name: str, source: Source) -> list[Any]:
    phases = tables.get(name, [{}])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases) or not phases:
        source.wrong((name,), f"must be one or more sections [[{name}]]")
    return [_section(cls, phase, name, source) for phase in phases]


def _section(cls: type, table: Any, name: str, source: Source) -> Any:
    if not isinstance(table, dict):
        source.wrong((name,), "must be a section")
    known = schema.settings(cls)
    values = {}
    for key, value in table.items():
        if key not in known:
            source.wrong((name, key), f"is not an option{schema.nearest(key, known)}")
        values[key] = schema.convert(known[key][1], value, (name, key), source)
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None


def train_teacher(recipe: TeacherRecipe, output: Path, *, say: Say = print) -> StableDiffusionPipeline:
    """Train every part and save the pipeline folder `output`; parts already finished beside it are not trained again.

    With `recipe.start` that teacher's autoencoder and text encoder are taken, and its denoiser is where training begins.
    The parts lie in `output`.parts until the folder is complete, so an interrupted training goes on with the part it was at.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already; name a new folder or remove it")
    parts = output.with_name(output.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    _same_recipe(recipe, parts / "recipe.json")
    pipeline = _load(recipe.start) if recipe.start else None
    autoencoder: AutoencoderKL | None = pipeline.vae if pipeline else None
    for number, phase in enumerate(() if pipeline else recipe.autoencoder):
        folder = parts / f"autoencoder-{number}"
        if not folder.exists():
            options = {key: getattr(phase, key) for key in ("updates", "batch", "lr", "kl_weight", "decoder_only")}
            reported = _reporter(say, f"autoencoder {number + 1} of {len(recipe.autoencoder)}", phase.updates)
            _save(train_autoencoder(**options, start=autoencoder, seed=recipe.seed + number, report=reported), folder)
        autoencoder = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    assert autoencoder is not None
    text, encoder = recipe.text_encoder, None
    if pipeline is None and not (parts / "denoiser-0").exists():
        reported = _reporter(say, "text encoder", text.updates)
        encoder = pretrain_text_encoder(text.updates, batch=text.batch, lr=text.lr, seed=recipe.seed, report=reported)
    for number, stretch in enumerate(recipe.denoiser):
        folder = parts / f"denoiser-{number}"
        if not folder.exists():
            options = {each.name: getattr(stretch, each.name) for each in fields(DenoiserPhase)}
            reported = _reporter(say, f"denoiser {number + 1} of {len(recipe.denoiser)}", stretch.updates)
            known = pipeline.text_encoder if pipeline else encoder
            trained = train_denoiser(
                autoencoder, known, **options, start=pipeline, seed=recipe.seed + number, report=reported
            )
            _save(trained, folder)
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline is not None
    save_teacher(pipeline, output)
    shutil.rmtree(parts)
    return pipeline


def _load(start: str) -> StableDiffusionPipeline:
    folder = Path(__file__).parent / "weights" / "teacher" if start == "toy" else Path(start)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"start = {start!r}: is not a teacher's folder; it must be one that train-teacher made, or 'toy'")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.vae.eval().requires_grad_(False)
    return pipeline


def save_teacher(pipeline: StableDiffusionPipeline, output: Path) -> None:
    """Write a teacher as it ships: a diffusers folder, its large networks in bfloat16.

    Not the text encoder: transformers 5 loads weights in the precision they are stored in, diffusers in float32, and the two
    must agree where nobody asks for a precision.
    """
    pipeline.unet.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    _save(pipeline, output)
    for path in (output / "model_index.json", *output.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # Where its parts lay on this machine.
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save(model: Any, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def _same_recipe(recipe: TeacherRecipe, path: Path) -> None:
    text = json.dumps(asdict(recipe), sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise UserError(f"{path.parent} holds parts made by another recipe; remove it or name another output")
    path.write_text(text)


def _reporter(say: Say, what: str, updates: int) -> Callable[[int, dict[str, float]], None]:
    start, recent = time.monotonic(), 0.0

    def report(step: int, losses: dict[str, float]) -> None:
        nonlocal recent
        loss = sum(losses.values())
        recent = loss if step == 0 else 0.98 * recent + 0.02 * loss
        if (step + 1) % max(1, updates // 50) == 0 or step + 1 == updates:
            left = (time.monotonic() - start) / (step + 1) * (updates - step - 1)
            say(f"{what}: update {step + 1} of {updates}, loss {recent:.4f}, {left / 60:.1f} minutes left")

    return report
