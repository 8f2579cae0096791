"""Names, publication, pointers, retention, resolving, preemption: policies and local files, no tensors, no collectives.

A save, on the coordinating rank::

    temp = reserve(root, name, origin)          # every rank writes below it, lineage and manifest come last
    publish(temp, root / name, origin)          # the commit point
    set_pointer(root, LATEST, name)
    if best := best_checkpoint(list_checkpoints(root), policy):
        set_pointer(root, BEST, best)
    prune(root, policy)
"""

from __future__ import annotations

from shardwise.lifecycle.filesystem import LOCAL, FileSystem, LocalFileSystem
from shardwise.lifecycle.lineage import Lineage, next_lineage
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
from shardwise.lifecycle.pointers import pointers, read_pointer, set_pointer
from shardwise.lifecycle.preemption import PreemptionGuard
from shardwise.lifecycle.publish import abandon, publish, remove_leftovers, reserve
from shardwise.lifecycle.resolve import CheckpointInfo, ResolvedCheckpoint, list_checkpoints, resolve
from shardwise.lifecycle.retention import Retention, best_checkpoint, lacks_metric, prune, select_doomed

__all__ = [
    "BEST",
    "LATEST",
    "LINEAGE_NAME",
    "LOCAL",
    "MANIFEST_NAME",
    "METRICS_NAME",
    "CheckpointInfo",
    "FileSystem",
    "Lineage",
    "LocalFileSystem",
    "PreemptionGuard",
    "ResolvedCheckpoint",
    "Retention",
    "abandon",
    "best_checkpoint",
    "checkpoint_name",
    "doomed_name",
    "lacks_metric",
    "list_checkpoints",
    "next_lineage",
    "parse_checkpoint_name",
    "pointers",
    "prune",
    "publish",
    "read_pointer",
    "remove_leftovers",
    "reserve",
    "resolve",
    "select_doomed",
    "set_pointer",
    "temporary_name",
]
