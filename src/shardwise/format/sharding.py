"""Where in their global tensors the tensors of a shard belong: a record among the metadata of a safetensors file.

Source: what torch 2.13's ``HuggingFaceStorageWriter`` writes and its ``HuggingFaceStorageReader`` looks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

from shardwise.errors import HeaderError
from shardwise.format.header import DAMAGED, Header
from shardwise.format.strict_json import MAX_INT, as_counts, as_object, loads

#: Key of ``__metadata__`` that holds the record.
DCP_SHARDING_KEY = "DCP_SHARDING_INFO"


def encode_sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the ``__metadata__`` that makes a shard, whose tensors start there, readable by DCP."""
    record = {name: {"saved_offsets": list(offsets[name])} for name in sorted(offsets)}
    return {DCP_SHARDING_KEY: json.dumps(record), "DCP_VERSION": "1.0", "format": "pt"}


def saved_offsets(header: Header) -> dict[str, tuple[int, ...]] | None:
    """Return where each tensor of a DCP shard starts in its global tensor, or ``None`` where the file has no record.

    A record that is malformed, lacks a tensor or disagrees with one's number of dimensions is a `HeaderError`.
    """
    text = header.metadata.get(DCP_SHARDING_KEY)
    if text is None:
        return None
    tensor: str | None = None

    def fail(reason: str) -> NoReturn:
        raise HeaderError(f"the record {DCP_SHARDING_KEY} {reason}", tensor=tensor, hint=DAMAGED)

    record = as_object(loads(text.encode("utf-8"), fail=fail), "which", fail)
    result: dict[str, tuple[int, ...]] = {}
    for (tensor, shape, _), _, _ in header.entries:
        if tensor not in record:
            fail("lacks the tensor")
        offsets = as_counts(as_object(record[tensor], "its entry", fail).get("saved_offsets"), "saved_offsets", fail)
        if len(offsets) != len(shape):
            fail(f"gives {len(offsets)} offsets for {len(shape)} dimensions")
        if any(offset + size > MAX_INT for offset, size in zip(offsets, shape, strict=True)):
            fail("puts it outside any possible tensor")
        result[tensor] = offsets
    return result
