"""Saving one component by itself, for loops that publish on their own: ``weights_path/model``, ``weights_path/optim``.

The component is written beside its place and takes it in one step, so that a re-save leaves nothing of an earlier split
behind and an interrupted one leaves the earlier component whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from shardwise.checkpointing.commits import Closing, gather_records, write_manifest
from shardwise.checkpointing.context import Context
from shardwise.comm import Group, JsonValue
from shardwise.engine.records import ComponentRecord
from shardwise.errors import ShardwiseError
from shardwise.format.manifest import KnownManifest
from shardwise.lifecycle import doomed_name, temporary_name

_LOG = logging.getLogger(__name__)


class Replacement:
    """Reserve, fill and put in place one component's directory."""

    def __init__(self, context: Context, target: Path, info: Mapping[str, JsonValue]) -> None:
        self._context = context
        self._target = target
        self._info = info
        self.temp = target.with_name(temporary_name(target.name))

    def reserve(self) -> None:
        """Make the directory to write into, removing what an interrupted save left. Rank 0 calls."""
        context = self._context
        context.storage.make_directory(self._target.parent)
        context.fs.remove_tree(self.temp)
        if os.path.lexists(self._doomed) and not os.path.lexists(self._target):
            # A crash between the two renames of commit(): what stood here is the only copy there is.
            context.fs.rename_new(self._doomed, self._target)
            context.fs.fsync_path(self._target.parent)
        context.fs.remove_tree(self._doomed)
        context.storage.make_directory(self.temp)

    @property
    def _doomed(self) -> Path:
        return self._target.with_name(doomed_name(self._target.name))

    def commit(self, group: Group, record: ComponentRecord, closing: Closing = ()) -> None:
        """Write the component's manifest and rename it into place. All ranks call."""
        union = gather_records(group, record, closing)
        with group.together(f"putting {self._target} in place"):
            if group.is_main:
                fs = self._context.fs
                known = self._context.manifests.setdefault(self._target.name, KnownManifest())
                write_manifest(self._context.storage, self.temp, union(), self._info, known)
                for where, _, _ in os.walk(self.temp, topdown=False):
                    fs.fsync_path(Path(where))
                if not os.path.lexists(self._target):
                    fs.rename(self.temp, self._target)
                elif not fs.exchange(self.temp, self._target):
                    # In two steps where there is no better way; reserve() sees to a crash between them.
                    fs.rename(self._target, self._doomed)
                    fs.rename(self.temp, self._target)
                fs.fsync_path(self._target.parent)
                fs.remove_tree(self.temp)
                fs.remove_tree(self._doomed)

    def abandon(self, group: Group) -> None:
        """Remove what was written, after a failure. Never raises."""
        if not group.is_main:
            return
        try:
            self._context.fs.remove_tree(self.temp)
        except (OSError, ShardwiseError) as error:
            _LOG.warning("could not remove the unfinished %s: %s", self.temp, error)
