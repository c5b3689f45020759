"""A whole run: everything built from one `RunConfig`, its directory kept, and read back.

    RUN/config.toml         the run as it was resolved
    RUN/environment.json    versions, machine, threads
    RUN/metrics.jsonl       a line every `train.log_every` updates
    RUN/report.html         how it is going
    RUN/samples/            sample grids
    RUN/checkpoints/        step-00000040/, ...
    RUN/best/               the checkpoint of best quality, where that is measured
    RUN/averages/           of which averages of any width are made, where train.ema_posthoc is set
"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers

from fastgen import config as configuration
from fastgen.config import TOY, RunConfig, TrainConfig
from fastgen.data.cache import digest
from fastgen.data.encoding import free_text_encoders
from fastgen.data.source import Source, check_files, load_source
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.method import Method
from fastgen.pipelines import LoraOptions, Pipeline, load_pipeline
from fastgen.samplers import FewStep, even_times
from fastgen.training import checkpoint as saved
from fastgen.training.attention import settle_attention
from fastgen.training.best import find_best
from fastgen.training.ema import fill
from fastgen.training.environment import describe_environment
from fastgen.training.grids import Grids
from fastgen.training.launch import Interrupted, available_cores, choose_threads, make_accelerator, processes, rank, wait
from fastgen.training.loop import Trainer
from fastgen.training.posthoc import reconstruct
from fastgen.training.progress import Reporter
from fastgen.training.quality import Quality
from fastgen.training.random_state import seed_everything
from fastgen.training.speed import prefetching, set_up

__all__ = ["LoadedRun", "distill", "load_run", "open_pipeline"]

CONFIG, ENVIRONMENT = "config.toml", "environment.json"
OURS = ("metrics.jsonl", "samples", "checkpoints", "best", "averages", ENVIRONMENT)
ENGINES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
TOY_TEACHER = Path(__file__).parents[1] / "data" / "toy" / "weights" / "teacher"
GRID_PROMPTS = 4
FREE_TO_CHANGE = frozenset(
    f"train.{key}"
    for key in (
        *("checkpoint_every", "keep_checkpoints", "sample_every", "sample_prompts", "log_every", "threads", "sharding"),
        *("teacher_steps", "quality_every", "quality_samples", "keep_best", "patience", "trackers"),
    )
) | {"data.cache", "data.workers", "offload", "speed.attention", "speed.prefetch"}
"""What a resumed run may do otherwise: none of it changes what is learned."""


# -- training -------------------------------------------------------------------------------------


def distill(
    config: RunConfig,
    output: Path,
    *,
    resume: str = "auto",
    device: str | None = None,
    offline: bool = False,
    quiet: bool = False,
    trackers: Sequence[str] = (),
) -> int:
    """Train what `config` describes in the run directory `output`; 0 when it is trained, 130 or 143 when interrupted.

    `resume`: "auto" goes on with the run in `output` if there is one, "never" refuses to, else the path of a checkpoint. Raises
    UserError for whatever is the user's to put right; nothing of another run is overwritten.
    """
    output, text = Path(output), config.to_toml()
    wanted = list(dict.fromkeys([*config.train.trackers, *trackers]))
    refuse_engines()
    accelerator = make_accelerator(config.train.precision, device, trackers=wanted, folder=output)
    start = where_to_start(config, text, output, resume)
    place = torch.device(device) if device else accelerator.device
    reporter = Reporter(quiet=quiet or rank() > 0, images=config.train.batch * processes())
    try:
        check_files(config.data, config.method.needs, config.method.why_images)
        threads = threads_for(config, start, place)
        torch.set_num_threads(threads)
        reporter.say(f"loading {config.pipeline} ({threads} CPU thread{'s' * (threads > 1)}, {place})")
        pipeline = open_pipeline(config, device=place, offline=offline)
        kernel = settle_attention(config, pipeline, start, output, place, autocast=accelerator.autocast, say=reporter.say)
        seed_everything(config.seed)
        set_up(config, pipeline, reporter.say)
        reporter.say("encoding the data")
        share: dict[str, Any] = {"rank": rank(), "processes": processes(), "say": reporter.say, "seed": config.seed}
        data = prefetching(load_source(pipeline, config.data, config.method.needs, device=place, **share), config)
        agree(data, place)
        grids, quality = None, None
        if rank() == 0 or config.train.sharding != "none":  # What is sharded is sampled by all.
            prompts = config.train.sample_prompts or list(dict.fromkeys(data.prompts))[:GRID_PROMPTS]
            # What fits in training fits in sampling; a CPU has the memory for more at once.
            size = 16 if place.type == "cpu" else config.train.batch // (config.train.micro_batches or config.train.batch)
            times = even_times(config.train.teacher_steps, pipeline.process)
            teacher = FewStep(times, guidance=teacher_guidance(config, pipeline))
            drawn: dict[str, Any] = {"at_once": size, "teacher": teacher, "autocast": accelerator.autocast}
            grids = Grids(pipeline, output / "samples", prompts, **drawn)
            if config.train.quality_every:
                every = list(dict.fromkeys(data.prompts)) or prompts
                quality = Quality(pipeline, output / "samples", every, samples=config.train.quality_samples, **drawn)
        free_text_encoders(pipeline)
        seed_everything(config.seed + 1_000_003 * rank())
        trainer = Trainer(
            *(config.method, data, config.train),
            run_directory=output,
            device=place,
            accelerator=accelerator,
            grids=grids,
            quality=quality,
            reporter=reporter,
            texts={CONFIG: text},
        )
        if start is not None:
            trainer.load(start)
            joint, before = config.train.batch * processes(), joint_batch(start)
            reporter.say(f"going on from {start}{f' with joint batches of {joint} in place of {before}' * (joint != before)}")
    except BaseException:
        leave_nothing(output)
        raise
    if rank() == 0:
        set_aside(output, start)
        if start is None and trainer.metrics is not None:
            trainer.metrics.cut(0)
        write_text(output / CONFIG, text)
        write_text(output / ENVIRONMENT, json.dumps(describe_environment(place, processes()) | kernel, indent=1))
    wait()
    trainer.trackers.start("fastgen", tracked(text))
    try:
        trainer.fit()
    except Interrupted as interrupted:
        reporter.say(f"{interrupted}; the same command goes on from there")
        return interrupted.status
    finally:
        trainer.trackers.finish()
    reporter.say(f"done: {output}")
    return 0


def refuse_engines() -> None:
    """Raise UserError where accelerate was launched with an engine that would cut or wrap one model as it sees fit."""
    for name, engine in ENGINES.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate was launched with {engine}, which fastgen does not use; launch plain processes (--multi_gpu), and "
                'set train.sharding = "fsdp" to cut weights over them'
            )


def agree(data: Source, device: torch.device) -> None:
    """Raise UserError where the processes have found different data, whose batches would not belong together."""
    if processes() > 1:
        number = int(digest(data.prompts)[:12], 16)
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends.tolist() != [number, -number]:
            raise UserError("the processes have found different data; every one must be able to read all of it, and alike")


def open_pipeline(config: RunConfig, *, device: torch.device | str = "cpu", offline: bool = False) -> Pipeline:
    """The pipeline that a run distils, with its roles. Raises UserError where it cannot be loaded.

    Its weights are float32, but where they are never trained (all roles LoRA) and the run is bf16.
    """
    roles: dict[str, Any] = {role: config.role(role) for role in configuration.ROLES}
    frozen_base = all(mode == "lora" for mode in roles.values())
    lora = config.lora
    targets = None if lora.targets is None else tuple(lora.targets)
    if config.teacher_weights and not Path(config.teacher_weights).expanduser().exists():
        raise UserError(f"teacher_weights = {config.teacher_weights!r}: there is no such file or folder")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # The bars of loading a file are not the run's.
    try:
        return load_pipeline(
            str(TOY_TEACHER) if config.pipeline == TOY else config.pipeline,
            roles=roles,
            lora=LoraOptions(lora.rank, lora.alpha, targets, init=lora.init, dora=lora.dora, ranks=lora.ranks),
            teacher_weights=config.teacher_weights,
            teacher_loras=config.teacher_loras,
            dtype=torch.bfloat16 if frozen_base and config.train.precision == "bf16" else torch.float32,
            quantize=config.quantize,
            offload=config.offload,
            device=device,
            offline=offline,
            gradient_checkpointing=config.train.gradient_checkpointing,
            height=config.data.height,
            width=config.data.width,
        )
    except ValueError as problem:  # What diffusers raises for a resolution that its pipeline cannot have.
        if config.data.height is None and config.data.width is None:
            raise
        size = f"data.height = {config.data.height}, data.width = {config.data.width}"
        raise UserError(f"{size} do not suit {config.pipeline}: {problem}") from problem


def teacher_guidance(config: RunConfig, pipeline: Pipeline) -> float:
    """The guidance to show the teacher with: what the method distils it with, or its pairs are made with."""
    made_with = config.data.pair_guidance if "pairs" in config.method.needs else None
    known = (config.method.teacher_guidance, made_with, pipeline.default_guidance)
    return float(next(scale for scale in known if scale is not None))


def threads_for(config: RunConfig, start: Path | None, device: torch.device) -> int:
    """CPU threads: as configured; else as before, for a resumed run, since sums depend on them; else the fastest."""
    if start is not None and not config.train.threads:
        return max(1, min(int(saved.read_state(start)["threads"]), available_cores()))
    return choose_threads(config.train.threads, device)


def tracked(text: str) -> dict[str, Any]:
    """A config for trackers, which take flat numbers and text only."""
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in flat(text).items()}


# -- the run directory ----------------------------------------------------------------------------


def where_to_start(config: RunConfig, text: str, output: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, None for the beginning. Raises UserError where `output` cannot or must not be written."""
    if rank() == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=output, prefix=".fastgen-"):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--output {output}: cannot be written ({reason}); choose another folder") from error
    mine = output / CONFIG
    if mine.exists():
        if resume == "never":
            raise UserError(f"--output {output}: holds a run already; choose another folder, or --resume auto to go on with it")
        check_same(config, text, mine)
    else:
        there = [name for name in OURS if (output / name).exists()]
        if there:
            raise UserError(f"--output {output}: has {there[0]} but no {CONFIG}, so it is not a run; choose another folder")
    start = saved.choose(output, resume)
    if start is not None:
        check_same(config, text, start / CONFIG)
        done = saved.step_of(start)
        if done > config.train.steps:
            raise UserError(f"{start}: has {done} updates already, more than train.steps = {config.train.steps}")
    return start


def check_same(config: RunConfig, text: str, path: Path) -> None:
    """Raise UserError, naming key and both values, where the run of the config at `path` is not this one."""
    try:
        theirs = flat(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a run's configuration ({error})") from error
    # Options that did not exist when the run was started have their defaults.
    theirs = flat(RunConfig(config.method_name, type(config.method)()).to_toml()) | theirs
    mine = flat(text)
    free = set(FREE_TO_CHANGE)
    if processes() != processes_of(path.parent) and joint_batch(path.parent) == config.train.batch * processes():
        free |= {"train.batch", "train.micro_batches"}  # the same joint batch, cut in another way
    curriculum = type(config.method).advance is not Method.advance
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        if mine.get(key) == theirs.get(key) or key in free or (key == "train.steps" and not curriculum):
            continue
        raise UserError(
            f"{path}: this run has {key} = {theirs.get(key)!r}, but the configuration given has {key} = {mine.get(key)!r}; "
            f"choose another --output, or go on with the run's own {CONFIG}"
        )


def processes_of(folder: Path) -> int:
    """By how many processes a checkpoint was written, or a run directory was last trained."""
    for name in (saved.STATE, ENVIRONMENT):
        try:
            return int(json.loads((folder / name).read_text(encoding="utf-8"))["processes"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 1


def joint_batch(folder: Path) -> int:
    """Samples of an update over all the processes that wrote a checkpoint, or last trained in a run directory."""
    return int(flat((folder / CONFIG).read_text(encoding="utf-8")).get("train.batch", TrainConfig.batch)) * processes_of(folder)


def flat(text: str) -> dict[str, Any]:
    """A TOML text as dotted keys and values."""

    def walk(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in table.items():
            result |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return result

    return walk(tomllib.loads(text), "")


def leave_nothing(output: Path) -> None:
    """Remove a folder that was made for a run which did not begin."""
    if rank() == 0 and output.is_dir() and not any(output.iterdir()):
        output.rmdir()


def set_aside(output: Path, start: Path | None) -> None:
    """Rename checkpoints later than the one a run goes on from, so that nobody takes them for this run's newest."""
    for path in saved.find(output):
        if start is not None and saved.step_of(path) > saved.step_of(start):
            names = (path.with_name(f"set-aside-{path.name}{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
            path.rename(next(name for name in names if not name.exists()))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        saved.flush(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


# -- reading a run back ---------------------------------------------------------------------------


@dataclass
class LoadedRun:
    """A run read back: its student in evaluation mode, `averaged` or not, after `step` updates."""

    config: RunConfig
    pipeline: Pipeline
    method: Method
    checkpoint: Path
    step: int
    averaged: bool

    @property
    def student(self) -> Denoiser:
        return self.method.trained


def load_run(
    run: Path,
    *,
    checkpoint: Path | None = None,
    ema: bool = True,
    sigma_rel: float | None = None,
    device: torch.device | str = "cpu",
    offline: bool = False,
) -> LoadedRun:
    """The student of a run directory, from its newest checkpoint or the one given; "best" is the one of best quality.

    Its weights are the averaged ones where the run has an average, unless `ema` is false; `sigma_rel` asks for the power-law
    average of that width (`posthoc.reconstruct`). Raises UserError where there is none of that, no run or no checkpoint, and
    names a broken file.
    """
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: is not a run's directory (it has no {CONFIG})")
    path = newest(run) if checkpoint is None else find_best(run) if str(checkpoint) == "best" else Path(checkpoint)
    saved.verify(path)
    config = configuration.load(path / CONFIG)
    # What adapters learnt on a reduced base is for the base itself.
    pipeline = open_pipeline(replace(config, quantize="none"), device=device, offline=offline)
    method = config.method
    method.setup(pipeline)
    state = saved.read_state(path)
    method.load_state(saved.join(state["method"], saved.read(path, "method")))
    own = {id(weight) for weight in method.trained.parameters()}
    for player in method.players():
        if any(id(weight) in own for weight in player.weights.parameters()):
            saved.restore(saved.weights_of(player.weights), path, f"player-{player.name}")
    averaged = sigma_rel is not None or (ema and state["ema"] is not None)
    if averaged:
        average = saved.read(path, "ema") if sigma_rel is None else reconstruct(run, path, sigma_rel)
        fill(dict(method.trained.named_parameters()), average)
    method.trained.requires_grad_(False).eval()
    return LoadedRun(config, pipeline, method, path, int(state["step"]), averaged)


def newest(run: Path) -> Path:
    paths = saved.find(run)
    if not paths:
        raise UserError(f"{run}: has no checkpoint yet; train it further")
    return paths[-1]
