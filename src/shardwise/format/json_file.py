"""JSON files of other tools: configurations and notes, as Python reads JSON, with or without a byte order mark.

Files whose form is ours are parsed by `shardwise.format.strict_json`.
"""

from __future__ import annotations

import json
import os
from typing import cast

from shardwise.disk.guarded import read_whole
from shardwise.errors import FormatError, ShardwiseError
from shardwise.format.strict_json import JsonValue

#: No configuration comes near this.
MAX_JSON_BYTES = 2**28


def parse_json(data: bytes, path: str | os.PathLike[str], error: type[ShardwiseError] = FormatError) -> JsonValue:
    """The value that the content of a file is; an ``error`` where it is not JSON."""
    try:
        return cast(JsonValue, json.loads(data))
    except (ValueError, RecursionError) as cause:
        raise error(f"not JSON: {cause}", path=path, hint="Restore the file.") from cause


def read_json(path: str | os.PathLike[str], error: type[ShardwiseError] = FormatError) -> JsonValue:
    """Read a JSON file; an ``error`` where it is no regular file, too large, or not JSON."""
    return parse_json(read_whole(path, MAX_JSON_BYTES, error), path, error)


def read_json_object(path: str | os.PathLike[str]) -> dict[str, JsonValue]:
    """As `read_json`, of a file that has to be an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise FormatError("not a JSON object", path=path, hint="Restore the file from the model's source.")
    return found
