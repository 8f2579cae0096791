"""Gathers small states of all ranks, where each distinct value is sent once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, cast

from shardwise.comm import Group, JsonValue


class DistinctValue(NamedTuple):
    """A value as bytes, and the ranks in the group that have it, ascending."""

    blob: bytes
    ranks: tuple[int, ...]


def gather_distinct(group: Group, blobs: Sequence[bytes]) -> list[list[DistinctValue]]:
    """Gather several values from all ranks, and return the distinct ones of each. All ranks call.

    Many ranks have equal values, so only digests and one copy of each distinct value are sent. Empty ones are left out.
    Every rank passes as many values; the distinct ones of each are in the order of the first rank that has them.
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
