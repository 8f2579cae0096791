"""Publishes written bytes as a checkpoint: manifest, one rename, pointers, retention."""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

import yaml

from shardwise.checkpointing.arguments import SHARE_THE_ROOT
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_there, status, walk
from shardwise.disk.sequential import digest_file, sync_file, write_file
from shardwise.engine.records import ComponentRecord, merged, write_manifest
from shardwise.errors import MisuseError, ShardwiseError, StorageError
from shardwise.format.manifest import FileRecord
from shardwise.lifecycle.names import (
    BEST,
    LATEST,
    LINEAGE_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    doomed_name,
    parse_checkpoint_name,
    temporary_name,
)
from shardwise.lifecycle.ownership import Claim, claim, claimed_by, publishing
from shardwise.lifecycle.pointers import set_pointer
from shardwise.lifecycle.publish import abandon, make_root, put_in_place, settle
from shardwise.lifecycle.resolve import Start, list_checkpoints, next_lineage
from shardwise.lifecycle.retention import Retention, best_checkpoint, lacks_metric, prune
from shardwise.settings import Settings
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)
CONFIG_NAME = "config.yaml"


#: Local work with which the writing of a component ends.
Closing = Sequence[Callable[[Group], None]]


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Metrics as plain numbers; `MisuseError` if one is not a number."""
    out: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            out[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the third of tensors with many elements
            raise MisuseError(f"metric {name!r} is {value!r}, which is not a number", hint="Pass a number.") from error
    return out


def warn_of_metrics(metrics: Mapping[str, float], config: Settings) -> None:
    """Warn before a save if ``keep_best`` cannot judge the checkpoint. One rank calls."""
    key = config.best_metric_key
    if config.keep_best is None or math.isfinite(metrics.get(key, math.nan)):
        return
    what = f"is {metrics[key]}" if key in metrics else f"is not among its metrics {sorted(metrics)}"
    _LOG.warning(
        "keep_best goes by the metric %r, which %s: this checkpoint cannot be kept as the best one. Pass it in "
        "metrics, or set best_metric_key to one that is passed.",
        key,
        what,
    )


@dataclass(slots=True)
class RunLine:
    """The checkpoint that a run continues from: the one that was restored or saved last. Rank 0 knows it."""

    start: Start | None = None
    restored: bool = False

    @property
    def left_from(self) -> Start | None:
        """The start, where checkpoints that do not come from it may be ones that the run left behind and replaces."""
        return self.start if self.restored else None


class Unfinished(ABC):
    """A directory that is written under a temporary name, with a claim on the name that it gets in the end.

    Messages call it ``name``; ``info`` goes into its manifest. Rank 0 knows after the commit the ``total_bytes`` of its
    files, and the names of the checkpoints that were removed (``pruned``).
    """

    _committing = "publishing {}"

    def __init__(self, session: Session, place: Path, name: str, info: Mapping[str, JsonValue]) -> None:
        self.place, self.temp, self.name = place, place.with_name(temporary_name(place.name)), name
        self.total_bytes: int | None = None
        self.pruned: tuple[str, ...] = ()
        self._session, self._info = session, info
        self._claim: Claim | None = None
        self._is_reserved = False

    def _claim_name(self) -> None:
        """Make the directory around the place and claim its name, unless another process saves it. Rank 0 calls."""
        if not self._session.is_remote:
            make_root(self.place.parent)
            self._claim = claim(self.place.parent, self.place.name, self._session.first_exchange.token)

    @phase("publish")
    def commit(self, group: Group, record: ComponentRecord, closing: Closing) -> None:
        """Do the local work in ``closing``, and publish what every rank has made durable. All ranks call.

        A time stamp in ``checkpoint_dir`` or node-local disks give every rank another directory, in which all of its
        writing succeeds. This is a `StorageError`, found without another collective: every other rank sees, beside the
        unfinished save, the claim of rank 0 with the run's token, and rank 0 every file that a rank wrote, with its
        size. Rank 0 looks at the claim too: where locks are not passed on between machines, another may have taken it.
        """
        is_remote, met = self._session.is_remote, self._session.first_exchange

        def close() -> JsonValue:
            for work in closing:
                work(group)
            if group.is_main and not self._is_ours():
                raise StorageError(
                    f"another run has begun to save {self.place.name} too, and this save is not published",
                    path=self.place.parent,
                    hint="Give each run a checkpoint_dir of its own.",
                )
            found = met.token if group.is_main or is_remote else claimed_by(self.place.parent, self.place.name)
            if found != met.token:
                seen = "another run is saving there" if found else "rank 0's save is not visible there"
                raise StorageError(
                    f"rank {group.global_rank} writes {self.place.name} into {self.place.parent}, below "
                    f"{met.locations[group.rank]}, and {seen}; rank 0 writes below {met.locations[0]}",
                    path=self.place.parent,
                    hint=SHARE_THE_ROOT,
                )
            return None if group.is_main else record.encoded()

        rows = group.collect(close, "gathering records")
        with group.together(self._committing.format(self.place)):
            if group.is_main:
                self._publish([record, *map(ComponentRecord.decoded, rows[1:])])
                self._release()

    @abstractmethod
    def _publish(self, records: Sequence[ComponentRecord]) -> None:
        """Put the directory in its place, given what each rank wrote. Rank 0 calls."""

    def _union(self, records: Sequence[ComponentRecord]) -> ComponentRecord:
        """All files, tensors and aliases, if rank 0 sees every file. Rank 0 calls."""
        whole = merged(records)
        # A file in several records was written by the last of these ranks; rank 0 would see its own.
        writers = {file.path: (rank, file) for rank, record in enumerate(records) for file in record.files}
        for rank, file in () if self._session.is_remote else writers.values():
            found = status(self.temp / file.path)
            size, locations = None if found is None else found.size, self._session.first_exchange.locations
            if size != file.size:
                sees = "does not see it" if size is None else f"sees {size:,} bytes"
                raise StorageError(
                    f"rank {rank} wrote below {locations[rank]} {file.size:,} bytes of {file.path}, and rank 0, below "
                    f"{locations[0]}, {sees}",
                    path=self.temp / file.path,
                    rank=rank,
                    hint=SHARE_THE_ROOT,
                )
        # Without aliases under which another stage has a tensor.
        saved = {(tensor.component, tensor.spec.name) for tensor in whole.tensors} if whole.aliases else set()
        aliases = tuple(alias for alias in sorted(whole.aliases) if (alias.component, alias.name) not in saved)
        return replace(whole, aliases=aliases)

    def _write_manifest(self, record: ComponentRecord) -> None:
        """Write the manifest of every file that is there; others' are digested and synced. Rank 0 calls."""
        storage, files = self._session.storage, list(record.files)
        known = {file.path for file in record.files} | {MANIFEST_NAME}
        for where, names in walk(self.temp):
            for path in (where / name for name in names):
                relative = path.relative_to(self.temp).as_posix()
                if relative not in known:
                    sync_file(storage, path)  # an addon wrote it without the storage
                    files.append(FileRecord(relative, *digest_file(storage, path), None))
        files.sort(key=lambda file: file.path)
        self.total_bytes = sum(file.size for file in files)
        write_manifest(storage, self.temp, replace(record, files=tuple(files)), self._info)

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def _is_ours(self) -> bool:
        """Whether the claim on the name is still this run's. Rank 0 calls."""
        token = self._session.first_exchange.token
        return self._session.is_remote or claimed_by(self.place.parent, self.place.name) in (token, None)

    def abandon(self, group: Group) -> None:
        """Remove what was written, so that a failed save does not fill the disk. Never raises."""
        if not group.is_main:
            return
        try:
            if self._is_reserved and self._is_ours():
                abandon(self.temp)
        except (OSError, ShardwiseError) as error:
            _LOG.warning("could not remove the unfinished %s: %s", self.temp, error)
        finally:
            self._release()


class Publication(Unfinished):
    """The commit of one checkpoint: manifest, rename, pointers, retention, each on rank 0 while the others wait."""

    def __init__(
        self,
        session: Session,
        final: Path,
        info: Mapping[str, JsonValue],
        metrics: Mapping[str, float],
        line: RunLine,
        make_room: Callable[[], None],
    ) -> None:
        super().__init__(session, final, final.name, info)
        self._metrics, self._line, self._make_room = metrics, line, make_room

    def reserve(self) -> None:
        """Claim the name and make the directory, which can then be abandoned. Rank 0 calls."""
        self._claim_name()
        self._make_room()
        self._is_reserved = True

    def _publish(self, records: Sequence[ComponentRecord]) -> None:
        session, settings = self._session, dict[str, object]()
        for field in fields(session.config):
            value = getattr(session.config, field.name)
            plain = value.value if isinstance(value, Enum) else value
            settings[field.name] = str(plain) if isinstance(plain, Path) else plain
        text = yaml.safe_dump({"checkpoint": settings}, sort_keys=False)
        write_file(session.storage, self.temp / CONFIG_NAME, text.encode())
        finite = {name: value if math.isfinite(value) else str(value) for name, value in self._metrics.items()}
        write_file(session.storage, self.temp / METRICS_NAME, (json.dumps(finite, indent=2) + "\n").encode())
        found = self._union(records)
        with nullcontext() if session.is_remote else publishing(session.root):
            # The line names other checkpoints; they must not change until this one is published.
            numbers, root = parse_checkpoint_name(self.place.name), session.root
            assert numbers is not None
            known, start = list_checkpoints(root), self._line.start
            lineage = next_lineage(root, known, self.place.name, *numbers, start)
            write_file(session.storage, self.temp / LINEAGE_NAME, lineage.encode())
            self._write_manifest(found)
            put_in_place(self.temp, self.place, self._line.left_from)
            # Whatever fails from here on, the checkpoint is there: the run goes on from it, and nothing is abandoned
            # (what it replaced may be all that a power failure leaves).
            self._line.start, self._is_reserved = Start(self.place, lineage), False
            settle(self.temp, self.place)
            self._point()

    def _point(self) -> None:
        session = self._session
        set_pointer(session.root, LATEST, self.place.name)
        policy = Retention.from_config(session.config)
        # This checkpoint is published. A save that failed now would be repeated, and find its name taken.
        try:
            checkpoints = list_checkpoints(session.root)
            best = best_checkpoint(checkpoints, policy)
            if best is not None:
                set_pointer(session.root, BEST, best)
            if lacks_metric(checkpoints, policy) and len(checkpoints) > (policy.max_recent or len(checkpoints)):
                _LOG.warning(
                    "no checkpoint in %s has the metric %r, by which keep_best chooses the best: none is deleted",
                    session.root,
                    policy.metric_key,
                )
            with phase("prune"):
                self.pruned = tuple(prune(session.root, policy))
        except (OSError, ShardwiseError) as error:
            _LOG.warning(
                "%s is published, but finding the best checkpoint or deleting old ones failed; the next save tries "
                "again: %s",
                self.place,
                ShardwiseError.wrap(error),
            )


class Replacement(Unfinished):
    """Reserve, fill and put in place one component's directory."""

    _committing = "putting {} in place"

    def reserve(self) -> None:
        """Make the directory to write into, removing what an interrupted save left. Rank 0 calls."""
        session = self._session
        session.storage.make_directory(self.place.parent)
        self._claim_name()
        self._is_reserved = True
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

    def _publish(self, records: Sequence[ComponentRecord]) -> None:
        self._write_manifest(self._union(records))
        for where, _ in walk(self.temp):
            self._session.storage.sync_directory(where)
        self._put_in_place()
        # It is there: nothing is abandoned any more. What it replaced may be all that a power failure leaves.
        self._is_reserved = False
        settle(self.temp, self.place)

    def _put_in_place(self) -> None:
        storage = self._session.storage
        if not is_there(self.place):
            storage.rename(self.temp, self.place)
        elif not storage.exchange(self.temp, self.place):
            # In two steps where there is no better way; reserve() sees to a crash between them.
            storage.rename(self.place, self._doomed)
            try:
                storage.rename(self.temp, self.place)
            except BaseException:
                storage.rename_new(self._doomed, self.place)
                raise
