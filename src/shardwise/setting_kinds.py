"""Checks the type of a setting's value, given to the constructor or read from YAML.

A value of the wrong type must not pass because it happens to be truthy or iterable: ``is_async="false"`` would save in
the background, and a prefix given as text would be taken as a list of letters.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from shardwise.errors import ConfigError, UnknownSettingError

#: Settings in which "~/" is the home directory: no shell has seen a YAML file, and a directory called "~" is no place.
_PLACES = frozenset(
    {"checkpoint_dir", "model_cache_dir", "model_repo_id", "original_model_root_dir", "staging_dir", "trace"}
)


class _Field(Protocol):
    name: str
    type: object


_Class = TypeVar("_Class", bound=type)


def unknown_key(key: object, known: Iterable[str]) -> UnknownSettingError:
    """The error for a key that no setting has; it names the nearest that one has."""
    if key == "restore_from":
        return UnknownSettingError(
            "'restore_from' is not a setting of the engine",
            hint="Take it out of the block and pass it to Checkpointer.restore(restore_from=...).",
        )
    near = difflib.get_close_matches(str(key).lower(), list(known), n=1, cutoff=0.0)[0]
    return UnknownSettingError(f"Unknown key {key!r} in the checkpoint block", hint=f"Did you mean {near!r}?")


def names_unknown_keys(cls: _Class) -> _Class:
    """Let a dataclass answer a keyword that it does not have with `unknown_key`: blocks are passed as ``**block``."""
    plain: Callable[..., None] = vars(cls)["__init__"]
    known: Mapping[str, object] = vars(cls)["__dataclass_fields__"]

    @functools.wraps(plain)
    def init(self: object, *args: object, **kwargs: object) -> None:
        for key in kwargs:
            if key not in known:
                raise unknown_key(key, known)
        plain(self, *args, **kwargs)

    type.__setattr__(cls, "__init__", init)
    return cls


def checked(field: _Field, value: object) -> object:
    """The value, if it is of its field's kind; a path that is to be text becomes text, any list of texts a list.

    ``~/`` is the home directory where a setting names a place. Numbers and modes are checked elsewhere. A value of
    another kind is a `ConfigError`.
    """
    kind = str(field.type)
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("list[str]"):
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            texts = list(value)
            if all(isinstance(text, str) for text in texts):
                return texts
        raise wrong_kind(field.name, value, "a list of texts")
    if kind.startswith("bool |") and "str" in kind:
        return value
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise wrong_kind(field.name, value, "true or false")
        return value
    if kind.startswith("str"):
        if not isinstance(value, str | os.PathLike):
            raise wrong_kind(field.name, value, "text")
        path = value if "Path" in kind else os.fspath(value)
        if "\0" in str(path):
            raise wrong_kind(field.name, value, "text without a zero byte")
        if field.name in _PLACES and str(path).startswith("~/"):
            return path.expanduser() if isinstance(path, Path) else os.path.expanduser(path)
        return path
    return value


def wrong_kind(key: str, value: object, wanted: str) -> ConfigError:
    """The error for a value of another kind than its setting takes."""
    return ConfigError(f"{key} is {value!r}, a {type(value).__name__}", hint=f"Write {wanted}.")


def number_in_text(key: str, kind: str, value: object) -> object:
    """A number that YAML may have read as text (``1e9``), by the annotation of its field; `ConfigError` for others."""
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("float"):
        return _float(key, value)
    return _int(key, value) if kind.startswith("int") else value


def _float(key: str, value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong_kind(key, value, "a number") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise wrong_kind(key, value, "a number")


def _int(key: str, value: object) -> int:
    if isinstance(value, str):
        # Underscores group digits in YAML 1.1 and in Python alike; int() keeps what float() would round.
        try:
            return int(value)
        except ValueError:
            pass
    number = _float(key, value)
    if isinstance(number, int):
        return number
    if not number.is_integer():
        raise wrong_kind(key, value, "a whole number")
    return int(number)
