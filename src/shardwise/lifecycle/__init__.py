"""Names, publication, pointers, retention, resolving, preemption: policies and local files, no tensors, no collectives.

What touches a root raises ``StorageError`` where the file system refuses.

A save, on the coordinating rank::

    make_root(root)
    mine = claim(root, name)                    # nobody else writes or removes it, as long as this process lives
    temp = reserve(root, name, start)           # every rank writes below it, lineage and manifest come last
    with publishing(root):
        put_in_place(temp, root / name, start)  # the commit point
        settle(temp, root / name)               # durable
        set_pointer(root, LATEST, name)
        if best := best_checkpoint(list_checkpoints(root), policy):
            set_pointer(root, BEST, best)
        prune(root, policy)
    mine.release()
"""

from __future__ import annotations

from shardwise.lifecycle.names import (
    BEST,
    LATEST,
    LINEAGE_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    checkpoint_name,
    doomed_name,
    parse_checkpoint_name,
    temporary_name,
)
from shardwise.lifecycle.ownership import Writer, claim, claimed_by, publishing, writer_of
from shardwise.lifecycle.pointers import pointers, read_pointer, set_pointer
from shardwise.lifecycle.preemption import PreemptionGuard
from shardwise.lifecycle.publish import put_in_place, remove_leftovers, reserve, settle
from shardwise.lifecycle.resolve import CheckpointInfo, Start, list_checkpoints, next_lineage, resolve
from shardwise.lifecycle.retention import Retention, best_checkpoint, prunable, prune

__all__ = [
    "BEST",
    "LATEST",
    "LINEAGE_NAME",
    "MANIFEST_NAME",
    "METRICS_NAME",
    "CheckpointInfo",
    "PreemptionGuard",
    "Retention",
    "Start",
    "Writer",
    "best_checkpoint",
    "checkpoint_name",
    "claim",
    "claimed_by",
    "doomed_name",
    "list_checkpoints",
    "next_lineage",
    "parse_checkpoint_name",
    "pointers",
    "prunable",
    "prune",
    "publishing",
    "put_in_place",
    "read_pointer",
    "remove_leftovers",
    "reserve",
    "resolve",
    "set_pointer",
    "settle",
    "temporary_name",
    "writer_of",
]
