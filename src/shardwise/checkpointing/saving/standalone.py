"""Saving one component alone, for loops that publish by themselves: ``weights_path/model``, ``weights_path/optim``.

The component is written beside its place and moved there in one step: a re-save leaves no files of an earlier split,
and an interrupted save leaves the earlier component whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from shardwise.checkpointing.saving.commits import Closing, claimed, complete_record, gather_records
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_there, walk
from shardwise.engine.records import ComponentRecord, write_manifest
from shardwise.errors import ShardwiseError
from shardwise.lifecycle import Claim, doomed_name, temporary_name
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)


class Replacement:
    """Reserve, fill and put in place one component's directory."""

    def __init__(self, session: Session, target: Path, info: Mapping[str, JsonValue]) -> None:
        self._session = session
        #: Where it is put in the end.
        self.place = target
        self._info = info
        self._claim: Claim | None = None
        #: Bytes of all files, known on rank 0 after `commit`.
        self.total_bytes: int | None = None
        self.temp = target.with_name(temporary_name(target.name))

    def reserve(self) -> None:
        """Make the directory to write into, removing what an interrupted save left. Rank 0 calls."""
        session = self._session
        session.storage.make_directory(self.place.parent)
        self._claim = claimed(session, self.place)
        session.storage.remove_tree(self.temp)
        if is_there(self._doomed) and not is_there(self.place):
            # A crash between the two renames of commit(): what stood here is the only copy there is.
            session.storage.rename_new(self._doomed, self.place)
            session.storage.sync_directory(self.place.parent)
        session.storage.remove_tree(self._doomed)
        session.storage.make_directory(self.temp)

    @property
    def _doomed(self) -> Path:
        return self.place.with_name(doomed_name(self.place.name))

    @phase("publish")
    def commit(self, group: Group, record: ComponentRecord, closing: Closing = ()) -> None:
        """Write the component's manifest and rename it into place. All ranks call."""
        union = gather_records(self._session, group, self.temp, record, closing)
        with group.together(f"putting {self.place} in place"):
            if group.is_main:
                storage = self._session.storage
                found = complete_record(storage, self.temp, union())
                self.total_bytes = sum(file.size for file in found.files)
                write_manifest(storage, self.temp, found, self._info)
                for where, _ in walk(self.temp):
                    storage.sync_directory(where)
                if not is_there(self.place):
                    storage.rename(self.temp, self.place)
                elif not storage.exchange(self.temp, self.place):
                    # In two steps where there is no better way; reserve() sees to a crash between them.
                    storage.rename(self.place, self._doomed)
                    storage.rename(self.temp, self.place)
                storage.sync_directory(self.place.parent)
                storage.remove_tree(self.temp)
                storage.remove_tree(self._doomed)
                self._release()

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def abandon(self, group: Group) -> None:
        """Remove what was written, after a failure. Never raises."""
        if not group.is_main or (self._claim is None and not self._session.is_remote):
            return  # nothing was written, and what stands there may be another process's
        try:
            self._session.storage.remove_tree(self.temp)
        except (OSError, ShardwiseError) as error:
            _LOG.warning("could not remove the unfinished %s: %s", self.temp, error)
        finally:
            self._release()
