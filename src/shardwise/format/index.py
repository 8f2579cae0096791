"""The weight index of a Hugging Face directory: which file holds which tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from shardwise.disk.guarded import read_whole, why_not_relative
from shardwise.errors import MisuseError, WeightIndexError
from shardwise.format import strict_json as strict
from shardwise.format.strict_json import JsonValue

#: Largest index that is read, in bytes.
MAX_INDEX_BYTES = 64 * 2**20

_MAX_DEPTH = 16
_DAMAGED = "The index is damaged or forged: fetch or save it again."


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """A validated ``*.safetensors.index.json``.

    ``weight_map`` has for each tensor the name of the file in the index's own directory; ``metadata`` is that object as
    it stands, with ``total_size`` (bytes) and ``total_parameters`` where the index says them.
    """

    weight_map: Mapping[str, str]
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def encode_index(weight_map: Mapping[str, str], total_size: int, *, total_parameters: int | None = None) -> bytes:
    """Return an index as transformers writes it: sorted keys, two spaces of indent, a newline at the end.

    A file's name that is not a plain one is a `MisuseError`.
    """
    for name, file in weight_map.items():
        reason = _why_not_plain(file)
        if reason is not None:
            raise MisuseError(
                f"the file name {file!r} {reason}", tensor=name, hint="Use a plain name in the index's own directory."
            )
    metadata = {"total_size": total_size}
    if total_parameters is not None:
        metadata["total_parameters"] = total_parameters
    text = json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2, sort_keys=True)
    return text.encode("ascii") + b"\n"


def read_index(path: str | os.PathLike[str]) -> WeightIndex:
    """Read a weight index; `WeightIndexError` also for what is no regular file, or too large. See `parse_index`."""
    return parse_index(read_whole(path, MAX_INDEX_BYTES, WeightIndexError), os.fspath(path))


def parse_index(data: bytes, path: str) -> WeightIndex:
    """Validate a weight index in memory; `WeightIndexError` if malformed, or naming a file outside its directory."""

    def fail(reason: str, tensor: str | None = None) -> NoReturn:
        raise WeightIndexError(f"the index {path!r} {reason}", path=path, tensor=tensor, hint=_DAMAGED)

    table = strict.as_object(strict.loads(data, fail=fail), "it", fail)
    if "weight_map" not in table:
        fail("lacks weight_map")
    weight_map: dict[str, str] = {}
    for name, value in strict.as_object(table["weight_map"], "weight_map", fail).items():
        if len(name) > strict.MAX_NAME:
            fail(f"has a tensor name of {len(name)} characters, starting with {name[:80]!r}")
        file = strict.as_text(value, f"weight_map[{name[:200]!r}]", fail)
        reason = _why_not_plain(file)
        if reason is not None:
            fail(f"names the file {file[:200]!r}, which {reason}", name)
        weight_map[name] = file
    # Diffusers and other tools leave the metadata out or set it to null.
    found = table.get("metadata")
    metadata = {} if found is None else strict.as_object(found, "metadata", fail)
    strict.check_depth(found, _MAX_DEPTH, "metadata", fail)
    for key in ("total_size", "total_parameters"):
        value = metadata.get(key)
        # Older exports computed the size in floating point; the hub still holds many of them.
        if isinstance(value, float) and value.is_integer() and abs(value) <= strict.MAX_INT:
            value = int(value)
        if value is not None:
            strict.as_count(value, key, fail)
    return WeightIndex(weight_map, metadata)


def _why_not_plain(file: str) -> str | None:
    return "is not a plain name" if "/" in file else why_not_relative(file)
