"""Rebuilding the nested dictionaries and lists that DCP flattened to one table of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from shardwise.errors import FormatError
from shardwise.sources.dcp_model import DcpPath


def nested(found: Mapping[DcpPath, object]) -> object:
    """The value that DCP flattened: path -> part. Dictionaries of consecutive numbers are lists.

    Raises:
        FormatError: A part stands below another.
    """
    root: dict[str | int, object] = {}
    for path, value in found.items():
        if not path:
            return value
        at = root
        for part in path[:-1]:
            inner = at.setdefault(part, {})
            if not isinstance(inner, dict):
                raise FormatError(f"the metadata have {'.'.join(map(str, path))} below a value")
            at = cast("dict[str | int, object]", inner)
        at[path[-1]] = value
    return _with_lists(root)


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(each) for key, each in value.items()}
    if made and all(type(key) is int for key in made) and sorted(made) == list(range(len(made))):
        return [made[number] for number in range(len(made))]
    return made
