"""The description of a run: one TOML file of 15 to 25 lines, plus dotted overrides.

The method's dataclass is the schema of `[method]`: its fields are the keys, its defaults the paper's. Files do not inherit
from one another and nothing is interpolated; what a run resolved to is saved beside its checkpoints and exports.

    pipeline = "toy"
    [method]
    name = "lcm"
    [train]
    steps = 400
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fastgen import schema
from fastgen.errors import UserError
from fastgen.schema import Checked, Source, nearest, setting

if TYPE_CHECKING:
    from fastgen.method import Method

__all__ = ["DataConfig", "LoRAConfig", "PlayerConfig", "RunConfig", "SpeedConfig", "TrainConfig", "load", "starter"]

ROLES = ("student", "fake_score")
TOY = "toy"


@dataclass
class LoRAConfig(Checked):
    """Shape of the adapters of roles trained as "lora"."""

    rank: int                 = setting(64, "rank of every adapter", at_least=1, at_most=4096)
    alpha: float              = setting(64.0, "scale of the adapters is alpha / rank", above=0)
    targets: list[str] | None = setting(None, 'names of the layers adapted; "none": the usual ones')
    init: Literal["default", "gaussian"] = setting("default", "how the first factor starts; the second starts at zero")
    dora: bool                = setting(False, "learn the weights' magnitudes beside (DoRA)")
    ranks: dict[str, int]     = setting({}, "rank of single roles, such as {fake_score = 16}; the others have `rank`")


@dataclass
class DataConfig(Checked):
    """What the run learns from."""

    prompts: str       = setting("", 'text file, one prompt a line, or captions of shards, of a dataset; "toy": the toy\'s')
    images: str        = setting("", 'folder of pictures with .txt captions, .tar shards, dataset; "toy": scenes for the run')
    split: str         = setting("train", "split of a dataset that has several")
    image: str         = setting("", "column of a dataset with the pictures; empty: image, jpg, png or img")
    caption: str       = setting("", "column of a dataset, or key of a shard's .json, with captions; empty: caption or text")
    bad_samples: Literal["stop", "skip"] = setting("stop", "what is done about samples that cannot be read")
    workers: int       = setting(0, "processes beside this one that decode pictures; 0: this one does", at_least=0, at_most=256)
    pool: int          = setting(4096, 'how many captioned scenes are drawn where the data is "toy"', at_least=1)
    height: int | None = setting(None, 'pixels of what is trained, a multiple of 16; "none": the pipeline\'s own', at_least=16)
    width: int | None  = setting(None, 'pixels of what is trained, a multiple of 16; "none": the pipeline\'s own', at_least=16)
    buckets: bool      = setting(False, "pictures of every aspect ratio, each batch of one; else all are cropped to one size")
    cache: str | None  = setting("~/.cache/fastgen", 'folder of encoded prompts and pictures; "none": in memory')
    pairs: int         = setting(1000, "teacher pairs (noise and sample) made for methods that learn from them", at_least=1)
    pair_steps: int    = setting(50, "steps of the teacher's sampler in making pairs", at_least=1)
    pair_guidance: float | None = setting(None, 'guidance in making pairs, 1 = off; "none": the pipeline\'s own', at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and pixels % 16:
                below = pixels // 16 * 16
                raise UserError(
                    f"{name} = {pixels} must be a multiple of 16, as autoencoders and networks need it: {below} or {below + 16}"
                )


Schedule = Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"]
Optimizer = Literal["adamw", "adamw8bit", "adafactor", "muon", "came"]


@dataclass
class PlayerConfig(Checked):
    """What one player does otherwise than the run's common settings say; None: as they say."""

    optimizer: Optimizer | None       = setting(None, "its optimiser")
    lr: float | None                  = setting(None, "its learning rate, not scaled by the method", above=0, at_most=10)
    weight_decay: float | None        = setting(None, "its weight decay", at_least=0)
    betas: tuple[float, float] | None = setting(None, "its moment decays", at_least=0, below=1)
    max_grad_norm: float | None       = setting(None, "its limit of the gradient's norm; 0: never clipped", at_least=0)


@dataclass
class TrainConfig(Checked):
    """The loop: how long, how fast, what is kept."""

    steps: int                 = setting(1000, "updates of the student's loop", at_least=1)
    batch: int                 = setting(16, "samples per update on each process", at_least=1)
    micro_batches: int         = setting(1, "parts of a batch, one after another: more need less memory; 0: found", at_least=0)
    gradient_checkpointing: bool = setting(False, "compute blocks again in the backward pass: less memory, more time")
    optimizer: Optimizer       = setting("adamw", '"muon": AdamW for all but matrices; "adamw8bit", "came": with their extras')
    lr: float                  = setting(1e-5, "learning rate; Adafactor's is relative to a weight's size", above=0, at_most=10)
    weight_decay: float        = setting(0.0, "decoupled weight decay", at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's moment decays", at_least=0, below=1)
    warmup: int                = setting(0, "updates over which the learning rate rises from 0", at_least=0)
    schedule: Schedule         = setting("constant", "course of the learning rate after the warmup, in every stage anew")
    cooldown: float            = setting(0.2, "share of a stage, its last, in which wsd's rate falls to 0", above=0, at_most=1)
    max_grad_norm: float       = setting(1.0, "clip each player's gradient to this norm; 0: never", at_least=0)
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "arithmetic of the networks; weights stay fp32")
    players: dict[str, PlayerConfig] = setting({}, "what single players do otherwise, such as {fake_score = {lr = 1e-6}}")
    sharding: Literal["none", "fsdp"] = setting("none", '"fsdp": weights cut over the processes (FSDP2); less memory each')
    ema: float                 = setting(0.0, "decay of the average of the student's weights; 0: none", at_least=0, below=1)
    ema_halflife: int          = setting(0, "in place of ema: samples after which a weight counts half; 0: none", at_least=0)
    ema_sigma_rel: float       = setting(0.0, "in place of ema: width of a power-law average; 0: off", at_least=0, at_most=0.28)
    ema_posthoc: bool          = setting(False, "keep what power-law averages of any width are made of after training")
    checkpoint_every: int      = setting(500, "updates between checkpoints; 0: only the last", at_least=0)
    keep_checkpoints: int      = setting(2, "newest checkpoints kept; 0: all", at_least=0)
    sample_every: int          = setting(0, "updates between sample grids; 0: only at the end", at_least=0)
    sample_prompts: list[str]  = setting([], "prompts of the sample grids; empty: the first of the data's")
    teacher_steps: int         = setting(50, "steps of the teacher's pictures beside the student's", at_least=1, at_most=1000)
    quality_every: int         = setting(0, "updates between measurements of quality; 0: none", at_least=0)
    quality_samples: int       = setting(64, "samples of a measurement of quality", at_least=8)
    keep_best: bool            = setting(True, "keep the checkpoint of best quality apart; needs quality_every")
    patience: int              = setting(0, "training ends after so many measurements without a better one; 0: no", at_least=0)
    trackers: list[str]        = setting([], "where metrics also go: tensorboard, wandb, trackio")
    log_every: int             = setting(10, "updates between lines of metrics.jsonl", at_least=1)
    threads: int               = setting(0, "CPU threads; 0: chosen for this machine", at_least=0, at_most=1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        averages = {"ema": self.ema, "ema_halflife": self.ema_halflife, "ema_sigma_rel": self.ema_sigma_rel}
        chosen = [f"{name} = {value}" for name, value in averages.items() if value]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are kinds of one average; set one of them")
        if self.patience and not self.quality_every:
            raise UserError(f"patience = {self.patience} needs measurements of quality to wait for; set quality_every")

    def of(self, player: str) -> TrainConfig:
        """These settings with what `player` does otherwise laid over them."""
        own = self.players.get(player)
        changed = {} if own is None else {each.name: getattr(own, each.name) for each in fields(own)}
        return replace(self, **{key: value for key, value in changed.items() if value is not None})


Attention = Literal[
    "auto", "native", "native_math", "native_flash", "native_efficient", "native_cudnn", "xformers",
    "flash", "flash_3", "flash_hub", "flash_varlen_hub", "flash_3_hub", "flex", "sage", "sage_hub",
]  # fmt: skip


@dataclass
class SpeedConfig(Checked):
    """How the same is computed sooner."""

    attention: Attention = setting("auto", 'kernel of attention; "auto": the fastest of those that agree, as measured')
    partial_passes: bool    = setting(True, "end a pass that a discriminator alone looks at behind the last layer it looks at")
    batched_guidance: bool  = setting(True, "both halves of a guided call as one batch; false: two calls, in less memory")
    compile: bool           = setting(False, "torch.compile for the blocks that networks repeat; not with forward mode")
    channels_last: bool     = setting(False, "convolutions' weights with the channels last, for UNets on a GPU")
    prefetch: bool          = setting(True, "get the next batch ready meanwhile, where it is read from a disk or sent to a GPU")


@dataclass
class RunConfig(Checked):
    """Everything a run is made of. `method` is an instance of the class that `fastgen.methods.find(method_name)` gives."""

    method_name: str
    method: Method
    pipeline: str            = setting(TOY, 'teacher: a diffusers folder or hub id; "toy": the one that ships')
    teacher_weights: str     = setting("", "fine-tuned unet or transformer in the teacher's place: folder or .safetensors file")
    teacher_loras: list[str] = setting([], "LoRA files laid over the teacher, student included")
    quantize: Literal["none", "int8", "nf4"] = setting("none", "weights of a base that is not trained, in 8 or 4 bits")
    offload: Literal["none", "encoders"] = setting("none", '"encoders": text encoders and autoencoder stay in CPU memory')
    seed: int                = setting(0, "seed of all randomness", at_least=0)
    roles: dict[str, str]    = setting({"student": "full"}, '"full" or "lora" for student and fake_score')
    lora: LoRAConfig         = field(default_factory=LoRAConfig)
    data: DataConfig         = field(default_factory=DataConfig)
    train: TrainConfig       = field(default_factory=TrainConfig)
    speed: SpeedConfig       = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pipeline:
            raise UserError("pipeline is empty; it must be a diffusers folder, a hub id, or 'toy'")
        for role, how in self.roles.items():
            if role not in ROLES:
                raise UserError(f"roles.{schema.printable(role, 60)} is not a role{nearest(role, ROLES)}")
            if how not in ("full", "lora"):
                raise UserError(f"roles.{role} must be 'full' or 'lora', not {schema.shown(how)}")
        for role, rank in self.lora.ranks.items():
            if role not in ROLES or not 1 <= rank <= 4096:
                key = f"lora.ranks.{schema.printable(role, 60)}"
                raise UserError(f"{key} = {rank} must be a rank, 1 to 4096, of {' or '.join(ROLES)}")
        self.roles = {"student": "full", **self.roles}
        for role in ROLES:
            if self.quantize != "none" and self.role(role) != "lora":
                raise UserError(
                    f'quantize = "{self.quantize}" is for a base that is not trained, but roles.{role} = "{self.role(role)}"; '
                    f'set roles.{role} = "lora", or quantize = "none"'
                )
        if self.train.micro_batches and self.train.batch % self.train.micro_batches:
            train = self.train
            raise UserError(f"train.batch = {train.batch} cannot be cut into {train.micro_batches} equal micro_batches")
        if self.pipeline == TOY:
            self.data = replace(self.data, prompts=self.data.prompts or TOY, images=self.data.images or TOY)
        if not self.data.prompts:
            named = schema.shown(self.pipeline)
            raise UserError(f"pipeline = {named} needs data.prompts, which is missing: a text file with one prompt a line")

    def role(self, name: str) -> str:
        """"full" or "lora" for a role; a role that is not set goes as the student does."""
        return self.roles.get(name, self.roles["student"])

    def to_toml(self, *, help: bool = False) -> str:
        """The whole run as a file that `load` reads back to an equal run; with a line of help beside each key if asked."""
        run = {each.name: each for each in fields(self)}
        parts = [schema.dump({key: getattr(self, key) for key in SCALARS}, helps(run) if help else None)]
        for section in ("method", "roles", *SECTIONS):
            part = getattr(self, section)
            if section == "roles":
                values, comments = part, {"student": run["roles"].metadata["help"]}
            else:
                known = schema.settings(type(part))
                values = {key: getattr(part, key) for key in known}
                comments = helps({key: each for key, (each, _) in known.items()})
            if section == "method":
                values = {"name": self.method_name, **values}
            parts.append(f"[{section}]\n" + schema.dump(values, comments if help else None))
        return "\n".join(parts)


SECTIONS = {"lora": LoRAConfig, "data": DataConfig, "train": TrainConfig, "speed": SpeedConfig}
SCALARS = ("pipeline", "teacher_weights", "teacher_loras", "quantize", "offload", "seed")
ROOT_KEYS = (*SCALARS, "method", "roles", *SECTIONS)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a TOML file describes, with overrides such as `train.lr=1e-5` over it.

    Raises `UserError` naming file or override, key, and what would be right, for anything that is not a run.
    """
    tables, source = schema.read(path, overrides)
    return from_tables(tables, source)


def from_tables(tables: dict[str, Any], source: Source) -> RunConfig:
    """The run that nested tables describe; `source` says where each value came from."""
    for key in tables:
        if key not in ROOT_KEYS:
            source.wrong((key,), f"is not an option of a run{elsewhere(key)}")
    name, method = method_from(tables.get("method", {}), source)
    run_fields = {each.name: each for each in fields(RunConfig)}
    types = get_type_hints(RunConfig, localns={"Method": object})
    values = {key: schema.convert(types[key], tables[key], (key,), source) for key in (*SCALARS, "roles") if key in tables}
    for key, value in values.items():
        problem = schema.out_of_range(run_fields[key], value)
        if problem:
            source.wrong((key,), problem)
    for key, cls in SECTIONS.items():
        if key in tables:
            values[key] = schema.convert(cls, tables[key], (key,), source)
    try:
        return RunConfig(method_name=name, method=method, **values)
    except UserError as error:
        raise UserError(f"{blamed(str(error), source)}: {error}") from error


def method_from(table: Any, source: Source) -> tuple[str, Method]:
    from fastgen.methods import find, names  # the registry imports torch

    if not isinstance(table, dict):
        source.wrong(("method",), f"must be a section with a name, not {schema.shown(table)}")
    if "name" not in table:
        source.wrong(("method", "name"), f"is missing{nearest('', names())}")
    name = schema.convert(str, table["name"], ("method", "name"), source)
    try:
        cls = find(name)
    except UserError as error:
        raise UserError(f"{source.of(('method', 'name'))}: method.name: {error}") from error
    rest = {key: value for key, value in table.items() if key != "name"}
    return name, schema.build(cls, rest, ("method",), source, called=name)


def elsewhere(key: str) -> str:
    """Where a key that is not at the top belongs: in a section, or a slip of the pen."""
    for section, cls in SECTIONS.items():
        if key in schema.settings(cls):
            return f"; did you mean '{section}.{key}'?"
    return nearest(key, ROOT_KEYS)


def blamed(problem: str, source: Source) -> str:
    """The file or override whose key a message starts with."""
    return source.of(tuple(problem.split(" ", 1)[0].split(".")))


def helps(named: dict[str, Field[Any]]) -> dict[str, str]:
    return {key: str(each.metadata.get("help", "")) for key, each in named.items()}


def starter(method_name: str) -> str:
    """A complete config file for a method with every key, its default and a line of help, to copy and cut down."""
    name, method = method_from({"name": method_name}, Source("fastgen methods"))
    return RunConfig(method_name=name, method=method).to_toml(help=True)
