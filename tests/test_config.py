"""A config file becomes a run or one sentence: never a traceback, never a silent default."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastgen
from fastgen import config, schema
from fastgen.config import DataConfig, LoRAConfig, PlayerConfig, RunConfig, TrainConfig
from fastgen.errors import UserError


@dataclass
class Consistency:
    """A stand-in for a method: every kind of field that one may have."""

    guidance: float = 7.5
    steps: int = field(default=4, metadata={"help": "network calls", "at_least": 1})
    times: tuple[float, ...] = (1.0, 0.5)
    distance: str | None = None
    huber: bool = True
    network: object = None  # not a setting: no file can hold it

    def __post_init__(self) -> None:
        if self.guidance == 13:
            raise UserError("guidance 13 brings bad luck")


@dataclass
class Progressive:
    start: int = 32


REGISTRY = {"lcm": Consistency, "progressive": Progressive}


def find(name: str) -> type:
    if name not in REGISTRY:
        raise UserError(f"no method named {name!r}{schema.nearest(name, REGISTRY)}")
    return REGISTRY[name]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("fastgen.methods")
    fake.find, fake.names = find, lambda: list(REGISTRY)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastgen.methods", fake)
    monkeypatch.setattr(fastgen, "methods", fake, raising=False)


pytestmark = pytest.mark.usefixtures("registry")

FILE = """
pipeline = "toy"
[method]
name = "lcm"
guidance = 6
times = [1.0, 0.75, 0.25]
[train]
steps = 20
lr = 1e-4
"""


def load(tmp_path: Path, text: str = FILE, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    run = load(tmp_path)
    assert run.method == Consistency(guidance=6.0, times=(1.0, 0.75, 0.25))
    assert isinstance(run.method.guidance, float) and isinstance(run.method.times, tuple)
    assert run.train == TrainConfig(steps=20, lr=1e-4)
    assert run.lora == LoRAConfig()
    assert run.roles == {"student": "full"}
    assert run.data == DataConfig(prompts="toy", images="toy"), "the toy teacher brings its own world"


def test_overrides_win_the_last_one_first(tmp_path: Path) -> None:
    run = load(
        tmp_path, FILE, "train.lr=1e-5", "train.lr=2e-5", "pipeline=my/finetune", 'teacher_loras=["style.safetensors"]',
        "data.prompts=prompts.txt", "roles.student=lora", "roles.fake_score=full", "lora={rank=8, alpha=4}", "train.warmup = 3",
        'lora.targets=["to_q", "to_k"]', "method.huber=false", "train.betas=[0, 0.99]", "method.distance=l1",
    )  # fmt: skip
    assert (run.train.lr, run.train.steps, run.train.warmup, run.train.betas) == (2e-5, 20, 3, (0.0, 0.99))
    assert (run.pipeline, run.teacher_loras, run.data.prompts) == ("my/finetune", ["style.safetensors"], "prompts.txt")
    assert (run.role("student"), run.role("fake_score")) == ("lora", "full")
    assert run.lora == LoRAConfig(rank=8, alpha=4.0, targets=["to_q", "to_k"])
    assert run.method.huber is False and run.method.distance == "l1"
    assert load(tmp_path, FILE, "lora.targets=none", "method.distance=none").lora.targets is None
    assert load(tmp_path, FILE, "roles.student=lora").role("fake_score") == "lora", "unset roles go as the student does"


def test_the_resolved_config_reads_back_to_the_same_run(tmp_path: Path) -> None:
    run = load(
        tmp_path, FILE, 'pipeline="a \\"b\\" \\\\ \\u007f \\n é 🎨"', "data.prompts=p", 'train.sample_prompts=["a", ""]',
        "method.distance=l2", "lora.targets=[]", "roles.fake_score=lora", "train.lr=1.2345678901234567e-07",
    )  # fmt: skip
    again = load(tmp_path, run.to_toml())
    assert again == run
    assert load(tmp_path, run.to_toml(help=True)) == run
    assert run.pipeline == 'a "b" \\ \x7f \n é 🎨'


def test_settings_of_single_players(tmp_path: Path) -> None:
    run = load(tmp_path, FILE + "[train.players.critic]\nlr = 1e-6\n", "train.players.critic.betas=[0, 0.9]")
    assert run.train.players == {"critic": PlayerConfig(lr=1e-6, betas=(0.0, 0.9))}
    assert "players = { critic = { lr = 1e-06, betas = [0.0, 0.9] } }" in run.to_toml()
    assert load(tmp_path, run.to_toml()) == run
    critic, student = run.train.of("critic"), run.train.of("student")
    assert (critic.lr, critic.betas, critic.steps, critic.optimizer) == (1e-6, (0.0, 0.9), 20, "adamw")
    assert student == run.train


def test_the_starter_config_is_complete_and_loads(tmp_path: Path) -> None:
    text = config.starter("lcm")
    run = load(tmp_path, text)
    assert run == RunConfig(method_name="lcm", method=Consistency())
    assert '[speed]\nattention = "auto"' in text
    assert "# network calls" in text and "# learning rate;" in text
    assert "network =" not in text


WRONG = {
    # overrides over FILE -> what the one sentence must hold
    ("train.lrr=1",):                        ["`train.lrr=1`", "train.lrr is not an option of train", "did you mean 'lr'?"],
    ("lr=1e-5",):                            ["`lr=1e-5`", "did you mean 'train.lr'?"],
    ("pipelin=x",):                          ["did you mean 'pipeline'?"],
    ("method.guidence=1",):                  ["method.guidence is not an option of lcm", "did you mean 'guidance'?"],
    ("speed.attention=xformer",):            ["`speed.attention=xformer`", "'native_math'", "did you mean 'xformers'?"],
    ("method.network=1",):                   ["method.network is not an option of lcm"],
    ("method.name=lcn",):                    ["`method.name=lcn`", "no method named 'lcn'", "did you mean 'lcm'?"],
    ("method.name=progressive",):            ["run.toml", "method.guidance is not an option of progressive"],
    ("train.lr=fast",):                      ["train.lr must be a number, not 'fast'"],
    ("train.lr=true",):                      ["train.lr must be a number, not true"],
    ("train.lr=nan",):                       ["train.lr must be a finite number"],
    ("train.lr=-1e-5",):                     ["train.lr must be above 0, not -1e-05"],
    ("train.steps=-5",):                     ["`train.steps=-5`", "train.steps must be at least 1, not -5"],
    ("train.steps=1e3",):                    ["train.steps must be a whole number, not 1000.0 (write 1000)"],
    ("train.steps=99999999999999999999",):   ["train.steps must be below 2**63"],
    ("train.batch=0",):                      ["train.batch must be at least 1"],
    ("train.batch=6", "train.micro_batches=4"): ["`train.batch=6`", "cannot be cut into 4 equal"],
    ("train.precision=fp8",):                ["one of 'fp32', 'bf16', 'fp16'", "not 'fp8'"],
    ("train.ema=0.9", "train.ema_sigma_rel=0.1"): ["ema = 0.9 and ema_sigma_rel = 0.1 are kinds of one average"],
    ("train.betas=[0.9]",):                  ["train.betas must be a list of 2"],
    ("train.betas=[0.9, 1.0]",):             ["train.betas must be below 1, not 1.0"],
    ('train.betas=[0.9, "x"]',):             ["train.betas.1 must be a number"],
    ("train.ema=1",):                        ["train.ema must be below 1"],
    ("train.players.critic.lr=0",):          ["train.players.critic.lr must be above 0, not 0"],
    ("train.players.critic.weigt_decay=1",): ["critic.weigt_decay is not an option of", "did you mean 'weight_decay'?"],
    ("train.players.critic=1",):             ["train.players.critic must be a table, not 1"],
    ("train.players=critic",):               ["train.players must be a table, each value a table, not 'critic'"],
    ("train.optimizer=adamw-8bit",):          ["train.optimizer must be one of 'adamw'", "did you mean 'adamw8bit'?"],
    ("train=3",):                            ["train must be a table, not 3"],
    ("pipeline.x=3",):                       ["pipeline is a value in", "not a section"],
    ("method=lcm",):                         ["method must be a section with a name, not 'lcm'"],
    ("method.steps=0",):                     ["method.steps must be at least 1, not 0"],
    ("method.guidance=13",):                 ["[method] guidance 13 brings bad luck"],
    ("roles.teacher=full",):                 ["`roles.teacher=full`", "roles.teacher is not a role"],
    ("roles.student=half",):                 ["roles.student must be 'full' or 'lora', not 'half'"],
    ("lora.rank=0",):                        ["lora.rank must be at least 1"],
    ("lora.targets=to_q",):                  ['lora.targets must be a list, each text, not \'to_q\''],
    ("seed=-1",):                            ["seed must be at least 0"],
    ("pipeline=some/model",):                ["`pipeline=some/model`", "needs data.prompts, which is missing"],
    ("pipeline=''",):                        ["pipeline is empty"],
    ("teacher_loras=[1]",):                  ["teacher_loras.0 must be text, not 1"],
    ("train.lr=[1",):                        ["`train.lr=[1`", "is not valid TOML"],
    ("train.lr",):                           ["an override is written key=value"],
    ("=1",):                                 ["an override is written key=value"],
    ("train..lr=1",):                        ["an override is written key=value"],
    ("pipeline=\udcff",):                    ["is not text in UTF-8"],
    ("train.steps=0x" + "f" * 5000,):        ["train.steps must be below 2**63"],
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), WRONG.items(), ids=[ascii(each[0])[:40] for each in WRONG])
def test_a_mistake_is_one_sentence(tmp_path: Path, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        load(tmp_path, FILE, *overrides)
    message = str(raised.value)
    assert all(each in message for each in words), message
    assert "\n" not in message and len(message) < 400


def test_a_mistake_in_the_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.toml: train\.stesp is not an option of train; did you mean 'steps'\?"):
        load(tmp_path, FILE.replace("steps = 20", "stesp = 20"))
    with pytest.raises(UserError, match=r"run\.toml: method\.name is missing; there are lcm, progressive"):
        load(tmp_path, "pipeline = 'toy'")
    with pytest.raises(UserError, match=r"run\.toml: is not valid TOML: .*line 1"):
        load(tmp_path, "pipeline toy")
    with pytest.raises(UserError, match="there is no such file"):
        config.load(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        config.load(tmp_path / "binary.toml")
    with pytest.raises(UserError):
        load(tmp_path, "pipeline = " + "[" * 5000)


def test_python_users_are_held_to_the_same_limits() -> None:
    with pytest.raises(UserError, match=r"TrainConfig\.steps must be at least 1, not 0"):
        TrainConfig(steps=0)
    with pytest.raises(UserError, match="cannot be cut"):
        RunConfig(method_name="lcm", method=Consistency(), train=TrainConfig(batch=3, micro_batches=2))


# -- anything at all ------------------------------------------------------------------------------

words = st.sampled_from([
    "pipeline", "teacher_loras", "seed", "method", "name", "guidance", "times", "roles", "student", "lora", "rank", "targets",
    "data", "prompts", "train", "steps", "betas", "precision", "lcm", "full", "none", "x",
])  # fmt: skip
keys = words | st.text(max_size=3)
numbers = st.integers() | st.floats() | st.just(10**400)
scalars = st.one_of(st.text(max_size=8), words, numbers, st.booleans(), st.dates(), st.times(), st.datetimes())
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
tables = st.dictionaries(keys, values, max_size=6)


def loads_or_complains(read: object, *args: object) -> None:
    try:
        run = read(*args)  # type: ignore[operator]
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 1000
    else:
        assert isinstance(run, RunConfig)


@given(tables)
@settings(max_examples=150)
def test_any_tables_are_a_run_or_a_user_error(anything: dict[str, object]) -> None:
    loads_or_complains(config.from_tables, anything, schema.Source("any.toml"))


@given(tables)
@settings(max_examples=100)
def test_any_tables_beside_a_sound_method(anything: dict[str, object]) -> None:
    loads_or_complains(config.from_tables, {**anything, "method": {"name": "lcm"}}, schema.Source("any.toml"))


@given(st.text(max_size=200), st.lists(st.text(max_size=30) | st.builds("{}.{}={}".format, words, words, scalars), max_size=3))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_run_or_a_user_error(tmp_path: Path, text: str, overrides: list[str]) -> None:
    path = tmp_path / "any.toml"
    for start in ("", FILE):
        path.write_bytes((start + text).encode("utf-8", "surrogatepass"))
        loads_or_complains(config.load, path, overrides)


@given(
    st.builds(
        RunConfig,
        method_name=st.just("lcm"),
        method=st.builds(
            Consistency,
            guidance=st.floats(-10, 10),
            times=st.tuples(st.floats(0, 1)),
            distance=st.none() | st.sampled_from(["a", '"']),
        ),
        pipeline=st.text(st.characters(codec="utf-8"), min_size=1),
        teacher_loras=st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
        seed=st.integers(0, 2**63 - 1),
        data=st.just(DataConfig(prompts="p")),
        train=st.builds(TrainConfig, lr=st.floats(1e-30, 10), steps=st.integers(1, 10**9)),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_run_survives_the_way_through_toml(tmp_path: Path, run: RunConfig) -> None:
    assert load(tmp_path, run.to_toml()) == run
