"""Finds the entry of a configuration that cannot be written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from shardwise.errors import MisuseError, ShardwiseError
from shardwise.stateful_wrappers.wrapping import original_class

if TYPE_CHECKING:
    import torch.nn as nn

_DEEPEST = 20


@contextlib.contextmanager
def naming_entries(model: nn.Module, config: object) -> Iterator[None]:
    """Turn an error in writing a configuration into one that names the entry.

    Raises:
        MisuseError: A property raises, or a value is none that JSON has.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ShardwiseError) and not isinstance(error, MisuseError):
            raise
        entry = _in_properties(config) or _in_value(_entries(config), "", 0)
        where = f"its entry {entry}" if entry else f"{type(error).__name__}: {error}"
        raise MisuseError(
            f"the config of {original_class(model).__name__} cannot be written as JSON: {where}",
            hint="Keep only numbers, strings, lists and dicts in model.config, and let its properties return them.",
        ) from error


def _in_properties(config: object) -> str:
    """The first property that raises when it is read, and its error; empty if none does."""
    for cls in type(config).__mro__:
        for name, member in vars(cls).items():
            if not isinstance(member, property) or name.startswith("__"):
                continue
            try:
                getattr(config, name)
            except NotImplementedError:
                continue  # an abstract one, which is never read
            except Exception as error:  # noqa: BLE001 - its error goes into the message
                return f"{name}, a property that raises {type(error).__name__}: {error}"
    return ""


def _entries(config: object) -> object:
    return config if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))


def is_config(value: object) -> bool:
    """Whether a value is a configuration object with entries of its own."""
    return hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, type)


def _in_value(value: object, path: str, depth: int) -> str:
    """Path and kind of the first entry that JSON cannot express; empty if all can be."""
    if depth > _DEEPEST:
        return f"{path}, which is nested without an end"
    if isinstance(value, Mapping):
        for key, below in value.items():
            where = f"{path}.{key}" if path else str(key)
            if not isinstance(key, (str, int, float, bool, type(None))):
                return f"{where}, whose key is a {type(key).__name__}"
            found = _in_value(below, where, depth + 1)
            if found:
                return found
        return ""
    if isinstance(value, (list, tuple)):
        return next(filter(None, (_in_value(v, f"{path}[{n}]", depth + 1) for n, v in enumerate(value))), "")
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return ""  # its name is written
    if is_config(value):
        below = _in_properties(value)
        return f"{path}.{below}" if below else _in_value(_entries(value), path, depth + 1)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return f"{path}, a {type(value).__name__}"
    return ""
