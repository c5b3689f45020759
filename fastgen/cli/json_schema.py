"""The JSON schema (draft 2020-12) of a config file, made of the same dataclasses that read one; for editors to check against.

It says of every key what `fastgen.schema` says: type, limits, default and help; of `[method]` which keys go with which name.
What depends on several keys together (a batch that cannot be cut into its micro-batches) only the command can tell.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field
from typing import Any, Literal

from fastgen import config, schema

__all__ = ["run_schema", "value_schema"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
LIMITS = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}
SCALARS: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
}


def run_schema() -> dict[str, Any]:
    """The schema of a whole run, every method that is installed included."""
    from fastgen.methods import find, names  # the registry imports torch

    hints = typing.get_type_hints(config.RunConfig, localns={"Method": object})
    fields = {each.name: each for each in dataclasses.fields(config.RunConfig)}
    properties = {key: setting_schema(fields[key], hints[key]) for key in config.SCALARS}
    methods = [method_schema(name, find(name)) for name in names()]
    roles = {role: {"enum": ["full", "lora"]} for role in config.ROLES}
    properties["method"] = {"description": "the method and its options", "oneOf": methods}
    properties["roles"] = {
        "type": "object", "description": fields["roles"].metadata["help"], "properties": roles, "additionalProperties": False,
    }  # fmt: skip
    properties |= {key: value_schema(cls) for key, cls in config.SECTIONS.items()}
    for role in config.ROLES:
        rank = {"type": "integer", "minimum": 1, "maximum": 4096}
        properties["lora"]["properties"]["ranks"].setdefault("properties", {})[role] = rank
    properties["lora"]["properties"]["ranks"]["additionalProperties"] = False
    return {
        "$schema": DRAFT,
        "title": "a fastgen run",
        "type": "object",
        "properties": properties,
        "required": ["method"],
        "additionalProperties": False,
    }


def method_schema(name: str, cls: type) -> dict[str, Any]:
    """A method's section: its name and its options."""
    about = table_schema(cls)
    about["properties"] = {"name": {"const": name}, **about["properties"]}
    about["required"] = ["name", *about.get("required", [])]
    return {"title": name, **about}


def table_schema(cls: type) -> dict[str, Any]:
    """A table whose keys are the settings of a dataclass."""
    known = schema.settings(cls)
    missing = [key for key, (each, _) in known.items() if schema.default(each) is MISSING]
    return {
        "type": "object",
        "properties": {key: setting_schema(each, hint) for key, (each, hint) in known.items()},
        **({"required": missing} if missing else {}),
        "additionalProperties": False,
    }


def setting_schema(each: Field[Any], hint: Any) -> dict[str, Any]:
    """One setting: its type with its limits, its help and its default."""
    about = value_schema(hint, each.metadata)
    if each.metadata.get("help"):
        about["description"] = each.metadata["help"]
    usual = schema.default(each)
    if usual is not MISSING:
        about["default"] = plain(usual)
    return about


def value_schema(hint: Any, limits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a value of type `hint` may be, its number or numbers within `limits`."""
    origin, args, limits = typing.get_origin(hint), typing.get_args(hint), limits or {}
    if schema.optional(hint):
        return {"anyOf": [value_schema(schema.optional(hint), limits), {"const": "none"}]}
    if hint in (int, float):
        return SCALARS[hint] | {LIMITS[key]: limit for key, limit in limits.items() if key in LIMITS}
    if hint in SCALARS:
        return dict(SCALARS[hint])
    if origin is Literal:
        return {"enum": list(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": value_schema(args[1])}
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return {"type": "array", "items": value_schema(args[0], limits)}
    if origin is tuple:
        several = {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "prefixItems": [value_schema(each, limits) for each in args], **several}
    return table_schema(hint)


def plain(value: Any) -> Any:
    """A default as it stands in a file."""
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: plain(getattr(value, key)) for key in schema.settings(type(value))}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {key: plain(each) for key, each in value.items()} if isinstance(value, dict) else value
