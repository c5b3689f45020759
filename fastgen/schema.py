"""Dataclasses as the schema of a TOML file: typed values from tables and overrides, and back.

A dataclass's fields are the keys, their annotations the types, their defaults the defaults. Every mistake becomes one
`UserError` that names the file (or the override it came from), the key, and what would be right. TOML has no null: where a
field may be None, the word "none" says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from fastgen.errors import UserError

__all__ = ["Checked", "Source", "build", "default", "dump", "nearest", "printable", "read", "setting", "settings", "shown"]

T = TypeVar("T")
Keys = tuple[str, ...]

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
LIMITS = {  # key of a field's metadata -> (does a number keep it?, words)
    "at_least": (lambda number, limit: number >= limit, "at least"),
    "above":    (lambda number, limit: number > limit,  "above"),
    "at_most":  (lambda number, limit: number <= limit, "at most"),
    "below":    (lambda number, limit: number < limit,  "below"),
}


# -- declaring ------------------------------------------------------------------------------------


def setting(default: Any, help: str, **limits: float) -> Any:
    """A dataclass field with one line of help and limits (`at_least`, `above`, `at_most`, `below`) on its number or numbers."""
    unknown = set(limits) - set(LIMITS)
    if unknown:
        raise TypeError(f"unknown limits {sorted(unknown)}")
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of dataclasses that hold their fields to the declared limits, whoever constructs them."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(typing.cast(Any, self)):
            problem = out_of_range(each, getattr(self, each.name))
            if problem:
                raise UserError(f"{type(self).__name__}.{each.name} {problem}")


def settings(cls: type) -> dict[str, tuple[Field[Any], Any]]:
    """The fields of dataclass `cls` that a file can set, by name: public, given to `__init__`, of a type TOML can hold."""
    hints = typing.get_type_hints(cls)
    return {
        each.name: (each, hints[each.name])
        for each in dataclasses.fields(cls)
        if each.init and not each.name.startswith("_") and expected(hints[each.name])
    }


def default(each: Field[Any]) -> Any:
    """The default of a dataclass field; `MISSING` when it has none."""
    return each.default_factory() if each.default_factory is not MISSING else each.default


def out_of_range(each: Field[Any], value: Any) -> str | None:
    numbers = value if isinstance(value, list | tuple) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        for key, (keeps, words) in LIMITS.items():
            limit = each.metadata.get(key)
            if limit is not None and not keeps(number, limit):
                return f"must be {words} {limit}, not {shown(number)}"
    return None


# -- telling what is wrong ------------------------------------------------------------------------


def shown(value: object, limit: int = 60) -> str:
    """A value in an error message: its repr, on one line, cut to `limit` characters, for any value whatever."""
    try:
        text = "true" if value is True else "false" if value is False else repr(value)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits; tables nested a thousand deep
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str, limit: int = 100) -> str:
    """`text` on one line and safe to print: what is not printable is escaped, as in a string literal."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def nearest(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the option nearest to `word`, or the options when few, or nothing."""
    options = list(options)
    close = difflib.get_close_matches(word[:100], options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join(options)}" if 0 < len(options) <= 16 else ""


@dataclasses.dataclass
class Source:
    """Where each value came from: the file, or the override given on the command line."""

    name: str
    places: dict[Keys, str] = field(default_factory=dict)

    def of(self, keys: Keys) -> str:
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return self.name

    def wrong(self, keys: Keys, problem: str, cause: BaseException | None = None) -> NoReturn:
        """Raise `UserError`: `problem` says what is wrong with the value at `keys`."""
        raise UserError(f"{self.of(keys)}: {printable('.'.join(keys))} {problem}") from cause


# -- reading --------------------------------------------------------------------------------------


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Source]:
    """The tables of a TOML file with dotted overrides (`train.lr=1e-5`) laid over them; the last one wins."""
    try:
        tables = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a text file in UTF-8") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: is not valid TOML: {shown_error(error)}") from error
    source = Source(str(path))
    for override in overrides:
        lay_over(tables, override, source)
    return tables, source


def shown_error(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0], 200)


def lay_over(tables: dict[str, Any], override: str, source: Source) -> None:
    """Set one `key=value` in `tables`; a table (`train={lr=1e-5}`) is merged into the one that is there."""
    place = f"`{printable(override, 60)}`"
    key, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not equals or not all(BARE_KEY.fullmatch(part) for part in keys):
        raise UserError(f"{place}: an override is written key=value, such as train.lr=1e-5")
    table = tables
    for depth, part in enumerate(keys[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"{place}: {'.'.join(keys[: depth + 1])} is a value in {source.name}, not a section")
    value = fragment(text.strip(), place)
    current = table.get(keys[-1])
    if isinstance(value, dict) and isinstance(current, dict):
        current.update(value)
        source.places.update({(*keys, inner): place for inner in value})
    else:
        table[keys[-1]] = value
        source.places[keys] = place


def fragment(text: str, place: str) -> Any:
    """The value of an override: TOML where it is TOML, else the bare word as text."""
    try:
        text.encode("utf-8")
        parsed = tomllib.loads(f"value = {text}")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: is not text in UTF-8") from error
    except (ValueError, RecursionError, OverflowError) as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise UserError(f"{place}: is not valid TOML: {shown_error(error)}") from error
    return text


# -- types ----------------------------------------------------------------------------------------

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def optional(hint: Any) -> Any:
    """X for the hint `X | None`, else None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    rest = [each for each in typing.get_args(hint) if each is not type(None)]
    return rest[0] if len(rest) == 1 and len(typing.get_args(hint)) == 2 else None


def expected(hint: Any) -> str:
    """What a value of type `hint` looks like, in words; empty for types that TOML cannot hold."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return SCALARS[hint]
    if optional(hint):
        return f"{expected(optional(hint))} or \"none\"" if expected(optional(hint)) else ""
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (list, tuple, dict) and not all(expected(each) for each in args if each is not Ellipsis):
        return ""
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each {expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {expected(args[0])}"
    if origin is dict:
        return f"a table, each value {expected(args[1])}"
    return "a table" if dataclasses.is_dataclass(hint) else ""


def convert(hint: Any, value: Any, keys: Keys, source: Source) -> Any:
    """`value` as the type `hint`, or a `UserError`. Whole numbers pass for numbers; nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if optional(hint):
        return None if value == "none" else convert(optional(hint), value, keys, source)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 2**63 else source.wrong(keys, f"must be below 2**63, not {shown(value)}")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return finite(value, keys, source)
    if origin is Literal and any(value == each and type(value) is type(each) for each in args):
        return value
    if origin in (list, tuple) and isinstance(value, list):
        length = len(args) if origin is tuple and args[-1] is not Ellipsis else len(value)
        if len(value) == length:
            of = args if origin is tuple and args[-1] is not Ellipsis else [args[0]] * length
            return origin(convert(h, v, (*keys, str(i)), source) for i, (h, v) in enumerate(zip(of, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: convert(args[1], each, (*keys, key), source) for key, each in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, keys, source)
    hint_at = ""
    if hint is int and isinstance(value, float) and value.is_integer():
        hint_at = f" (write {int(value)})" if abs(value) < 1e15 else ""
    elif origin is Literal and isinstance(value, str):
        hint_at = nearest(value, [each for each in args if isinstance(each, str)]).replace("; there are", "")
        hint_at = hint_at if "did you mean" in hint_at else ""
    source.wrong(keys, f"must be {expected(hint)}, not {shown(value)}{hint_at}")


def finite(value: float, keys: Keys, source: Source) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else source.wrong(keys, f"must be a finite number, not {shown(value)}")


def build(cls: type[T], table: Mapping[str, Any], keys: Keys, source: Source, called: str | None = None) -> T:
    """An instance of dataclass `cls` from a table; `called` is its name in messages, else the section's."""
    known = settings(cls)
    for key in table:
        if key not in known:
            source.wrong((*keys, key), f"is not an option of {called or '.'.join(keys) or 'a run'}{nearest(key, known)}")
    values = {}
    for name, (each, hint) in known.items():
        if name not in table:
            if default(each) is MISSING:
                source.wrong((*keys, name), f"is missing; it must be {expected(hint)}")
            continue
        values[name] = convert(hint, table[name], (*keys, name), source)
        problem = out_of_range(each, values[name])
        if problem:
            source.wrong((*keys, name), problem)
    try:
        return cls(**values)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{source.of(keys)}: [{'.'.join(keys)}] {shown_error(error)}") from error


# -- writing --------------------------------------------------------------------------------------


def toml(value: Any) -> str:
    """One value as TOML on one line."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if dataclasses.is_dataclass(value):
        parts = {name: (getattr(value, name), default(each)) for name, (each, _) in settings(type(value)).items()}
        value = {name: part for name, (part, usual) in parts.items() if not (part is None and usual is None)}
    return "{ " + ", ".join(f"{toml_key(key)} = {toml(each)}" for key, each in value.items()) + " }" if value else "{}"


def toml_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else toml(key)


def dump(values: Mapping[str, Any], helps: Mapping[str, str] | None = None) -> str:
    """Lines `key = value`, one a key, with the help of each key as an aligned comment where there is one."""
    lines = {key: f"{toml_key(key)} = {toml(value)}" for key, value in values.items()}
    width = min(40, max((len(line) for line in lines.values()), default=0))
    helps = helps or {}
    return "".join(f"{line:<{width}}   # {helps[key]}\n" if helps.get(key) else f"{line}\n" for key, line in lines.items())
