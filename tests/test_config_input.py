"""Whatever is written into a config file or on the command line: a run, or one sentence. And what editors are told of it."""

from __future__ import annotations

import json
import random
import string
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastgen.methods
from fastgen import config, schema
from fastgen.cli import main
from fastgen.cli.json_schema import run_schema
from fastgen.config import RunConfig
from fastgen.errors import UserError
from fastgen.methods import find, names

ROOT = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in ROOT.rglob("*.toml") if not path.name.startswith("teacher"))
loose = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """The schema of what comes with the package, whatever plugins are installed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastgen.methods, "_plugins", dict)
        return run_schema()


@pytest.fixture(scope="module")
def validator(known: dict[str, Any]) -> Any:
    """The schema as something to hold a config against."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(known)
    return jsonschema.Draft202012Validator(known)


def outcome(read: Callable[[], RunConfig]) -> RunConfig | str:
    """A run, or the sentence that says why there is none: one line that can be printed, and no novel."""
    try:
        return read()
    except UserError as error:
        sentence = str(error)
    assert sentence.strip() and len(sentence) < 700 and sentence.isprintable(), sentence
    return sentence


# -- what anyone may write --------------------------------------------------------------------------

numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, 2**63, 10**30, float("inf")])
texts = st.text(max_size=6) | st.sampled_from(["none", "toy", "full", "lora", "lcm", "", "\n", "\x1b[2J", "{}", "a.b", "🎨"])
values = st.recursive(
    numbers | texts | st.booleans() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def known_keys(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A method, and a key that a run of it has, at any depth."""
    name = draw(st.sampled_from(names()))
    sections = {"method": find(name), **config.SECTIONS}
    section = draw(st.sampled_from(["", "roles", *sections]))
    if section in ("", "roles"):
        return name, (draw(st.sampled_from(config.SCALARS)),) if not section else ("roles", draw(st.sampled_from(config.ROLES)))
    keys = (section, draw(st.sampled_from(sorted(schema.settings(sections[section])) or ["name"])))
    if keys == ("train", "players") and draw(st.booleans()):
        return name, (*keys, "critic", draw(st.sampled_from([each.name for each in fields(config.PlayerConfig)])))
    return name, keys


@given(known_keys(), values)
@loose
def test_any_value_of_any_key_of_any_method(place: tuple[str, tuple[str, ...]], value: Any) -> None:
    name, keys = place
    tables: dict[str, Any] = {"method": {"name": name}}
    table = tables
    for part in keys[:-1]:
        table = table.setdefault(part, {})
    table[keys[-1]] = value
    found = outcome(lambda: config.from_tables(tables, schema.Source("any.toml")))
    if isinstance(found, str):
        assert found.startswith("any.toml: "), "the file is named"
        assert ".".join(keys) in found or keys[-1] in found, "and the key"


@given(st.sampled_from(RECIPES), st.randoms(use_true_random=False), st.integers(1, 4))
@loose
def test_a_recipe_with_a_slip_of_the_pen(tmp_path: Path, recipe: Path, chance: random.Random, slips: int) -> None:
    text = bytearray(recipe.read_bytes())
    for _ in range(slips):
        place = chance.randrange(len(text))
        how = chance.randrange(3)
        text[place : place + (how != 0)] = b"" if how == 1 else bytes([chance.choice(string.printable.encode() + b"\xc3\0")])
    path = tmp_path / "slip.toml"
    path.write_bytes(text)
    found = outcome(lambda: config.load(path))
    assert isinstance(found, RunConfig) or found.startswith(str(path))


@given(st.binary(max_size=80), st.sampled_from(RECIPES), st.integers(0, 10**6))
@loose
def test_any_bytes_in_a_file(tmp_path: Path, noise: bytes, recipe: Path, place: int) -> None:
    whole, path = recipe.read_bytes(), tmp_path / "bytes.toml"
    for text in (noise, whole[: place % len(whole)] + noise + whole[place % len(whole) :]):
        path.write_bytes(text)
        found = outcome(lambda: config.load(path))
        assert isinstance(found, RunConfig) or found.startswith(str(path))


arguments = st.text(st.characters(exclude_characters="\0"), max_size=30)  # what a shell can pass; lone surrogates are raw bytes


@given(st.lists(arguments | st.builds("{}={}".format, arguments, arguments), max_size=3))
@loose
def test_any_override(overrides: list[str]) -> None:
    found = outcome(lambda: config.load(RECIPES[0], overrides))
    assert isinstance(found, RunConfig) or found.startswith((f"{RECIPES[0]}: ", "`"))


@given(known_keys(), arguments | values.map(repr))
@loose
def test_any_text_laid_over_any_key(place: tuple[str, tuple[str, ...]], text: str) -> None:
    name, keys = place
    recipe = ROOT / "toy" / "quickstart.toml"
    own = tomllib.loads(recipe.read_text(encoding="utf-8"))["method"]["name"]
    assume(name == own or keys[0] != "method")
    override = f"{'.'.join(keys)}={text}"
    found = outcome(lambda: config.load(recipe, [override]))
    assert isinstance(found, RunConfig) or "`" in found, "the override is quoted"


@given(st.lists(arguments, max_size=3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_command_line_says_one_line(capsys: pytest.CaptureFixture[str], overrides: list[str]) -> None:
    assume(not any(each.startswith("-") for each in overrides))
    capsys.readouterr()
    status = main(["distill", str(ROOT / "toy" / "quickstart.toml"), *overrides, "--print-config", "--quiet"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "") if not overrides else status in (0, 2)
    if status == 2:
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


# -- there and back ---------------------------------------------------------------------------------


def of_type(hint: Any, limits: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, within the limits of its setting."""
    origin, args = get_origin(hint), get_args(hint)
    if schema.optional(hint):
        return st.none() | of_type(schema.optional(hint), limits)
    if hint is bool:
        return st.booleans()
    low, high = limits.get("at_least", limits.get("above")), limits.get("at_most", limits.get("below"))
    if hint is int:
        return st.integers(low, 2**63 - 1 if high is None else int(high))
    if hint is float:
        edges = {"exclude_min": "above" in limits, "exclude_max": "below" in limits}
        return st.floats(low, 1e30 if high is None else high, **edges, allow_nan=False)
    if hint is str:
        return st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda text: text != "none")
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(of_type(args[0], limits), max_size=3)
    return st.tuples(*[of_type(each, limits) for each in args]) if origin is tuple else st.just({})


@st.composite
def sections(draw: st.DrawFn, cls: Any) -> Any:
    """A dataclass with any of its settings at any value that it takes."""
    known = schema.settings(cls)
    chosen = draw(st.sets(st.sampled_from(sorted(known)), max_size=6))
    values = {key: draw(of_type(known[key][1], known[key][0].metadata)) for key in sorted(chosen)}
    if cls is config.TrainConfig and draw(st.booleans()):
        values["players"] = {"critic": draw(sections(config.PlayerConfig))}
    try:
        return cls(**values)
    except UserError:
        assume(False)


@given(st.data())
@loose
def test_every_run_reads_back_from_what_is_printed(tmp_path: Path, validator: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names()))
    parts = {key: data.draw(sections(cls)) for key, cls in config.SECTIONS.items()}
    roles = {"student": data.draw(st.sampled_from(["full", "lora"]))}
    try:
        run = RunConfig(name, find(name)(), seed=data.draw(st.integers(0, 2**63 - 1)), roles=roles, **parts)
    except UserError:
        assume(False)
    path = tmp_path / "run.toml"
    for text in (run.to_toml(), run.to_toml(help=True)):
        path.write_text(text, encoding="utf-8")
        assert config.load(path) == run
    validator.validate(tomllib.loads(text))


def test_the_resolved_run_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES[0]
    assert main(["distill", str(recipe), "train.lr=3e-6", "--seed", "5", "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(text, encoding="utf-8")
    again = config.load(tmp_path / "again.toml")
    assert again == config.load(recipe, ["train.lr=3e-6", "seed=5"]) and again.to_toml() == text
    assert main(["distill", str(recipe), "--print-config", "--json", "--output", str(tmp_path / "run.json")]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["method"]["name"] == config.load(recipe).method_name
    assert main(["distill", str(recipe)]) == 2
    assert "--output is missing; it must be the folder of the run" in capsys.readouterr().err


# -- what editors are told --------------------------------------------------------------------------


def test_the_schema_beside_the_recipes_is_the_code_s(known: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    written = (ROOT / "schema.json").read_text(encoding="utf-8")
    assert json.loads(written) == known, "`fastgen distill --json-schema > configs/schema.json` writes it anew"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastgen.methods, "_plugins", dict)
        assert main(["distill", "--json-schema"]) == 0
    assert capsys.readouterr().out == written


def test_every_recipe_is_what_its_schema_says(validator: Any) -> None:
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        told = text.splitlines()[0].removeprefix("#:schema ")
        assert (recipe.parent / told).resolve() == ROOT / "schema.json", f"{recipe}: its first line names the schema"
        assert not [each.message for each in validator.iter_errors(tomllib.loads(text))], recipe


@given(known_keys(), values)
@loose
def test_schema_and_parser_agree_on_each_value(validator: Any, place: tuple[str, tuple[str, ...]], value: Any) -> None:
    name, keys = place
    assume(not (isinstance(value, float) and value.is_integer()))  # 1.0 is an integer to JSON
    tables: dict[str, Any] = {"method": {"name": name}}
    table = tables
    for part in keys[:-1]:
        table = table.setdefault(part, {})
    table[keys[-1]] = value
    found = outcome(lambda: config.from_tables(tables, schema.Source("any.toml")))
    errors = list(validator.iter_errors(tables))
    if isinstance(found, RunConfig):
        assert not errors
    elif "any.toml: " + ".".join(keys) + " must be " in found and "finite" not in found and "2**63" not in found:
        assert errors, found


def test_the_keys_of_a_run_are_the_fields_of_its_class() -> None:
    hints = get_type_hints(RunConfig, localns={"Method": object})
    assert set(config.ROOT_KEYS) == set(hints) - {"method_name"}
