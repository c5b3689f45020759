"""Distillation methods, one file each. A method's name is its file's; other packages add theirs as entry points.

An installed package registers a method in the group `fastgen.methods`: `my_method = "my_package.my_method:MyMethod"`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from importlib.metadata import EntryPoint, entry_points

from fastgen.errors import UserError
from fastgen.method import Method

GROUP = "fastgen.methods"


def names() -> list[str]:
    """The names of all methods, ours and those of installed packages, in alphabetical order."""
    return sorted({*_ours(), *_plugins()})


def find(name: str) -> type[Method]:
    """The method's class. Raises UserError for a name that does not exist and for a plugin that gives no method."""
    if name in _ours():
        return _defined_in(f"{__name__}.{name}")
    plugins = _plugins()
    if name not in plugins:
        known = names()
        close = difflib.get_close_matches(name[:100], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"there is no method {name[:100]!r}; {hint}")
    try:
        found = plugins[name].load()
    except (ImportError, AttributeError) as problem:
        raise UserError(f"method {name!r} from {plugins[name].value} cannot be imported: {problem}") from problem
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method {name!r} from {plugins[name].value} is not a subclass of fastgen.method.Method")
    return found


def _ours() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _defined_in(module_name: str) -> type[Method]:
    """The one method that a module defines."""
    module = importlib.import_module(module_name)
    defined = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module_name
    ]
    (method,) = defined
    return method
