"""Gathers small states of all ranks, where each distinct value is sent once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, cast

from shardwise.comm import Group, JsonValue


class DistinctValue(NamedTuple):
    """A value, and the ranks that have it.

    Attributes:
        blob: The value.
        ranks: Ranks in the group that have the value, in order.
    """

    blob: bytes
    ranks: tuple[int, ...]


def gather_distinct(group: Group, blobs: Sequence[bytes]) -> list[list[DistinctValue]]:
    """Gather several values from all ranks, and return the distinct ones of each. All ranks call.

    Many ranks have equal values, so only digests and one copy of each distinct value are sent. Empty ones are left out.

    Args:
        group: The ranks.
        blobs: This rank's values; as many on every rank.

    Returns:
        For each of the values, the distinct ones in the order of the first rank that has each.
    """
    own: JsonValue = [hashlib.blake2b(blob, digest_size=16).hexdigest() if blob else "" for blob in blobs]
    everyone = cast(list[list[str]], group.gather_json(own, "comparing states"))
    found = []
    for number, blob in enumerate(blobs):
        digests = [theirs[number] for theirs in everyone]
        rows = []
        for digest in filter(None, dict.fromkeys(digests)):
            ranks = tuple(rank for rank, theirs in enumerate(digests) if theirs == digest)
            raw = group.broadcast_bytes(blob if group.rank == ranks[0] else b"", ranks[0], "exchanging states")
            rows.append(DistinctValue(raw, ranks))
        found.append(rows)
    return found


def blob_of(packed: dict[str, bytes]) -> bytes:
    """A packed state as one byte string."""
    return b"".join(len(v).to_bytes(8, "little") + k.encode().ljust(16) + v for k, v in sorted(packed.items()))


def unblob(raw: bytes) -> dict[str, bytes]:
    """The packed state that `blob_of` was given."""
    found: dict[str, bytes] = {}
    position = 0
    while position < len(raw):
        size = int.from_bytes(raw[position : position + 8], "little")
        key = raw[position + 8 : position + 24].decode().strip()
        found[key] = raw[position + 24 : position + 24 + size]
        position += 24 + size
    return found
