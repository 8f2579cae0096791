"""Publishes written bytes as a checkpoint: manifest, one rename, pointers, retention."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

import yaml

from shardwise.checkpointing.arguments import check_claim, check_files_visible
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import walk
from shardwise.disk.sequential import digest_file, sync_file, write_file
from shardwise.disk.storage import Storage
from shardwise.engine.records import ComponentRecord, merged, write_manifest
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.format.manifest import AliasRecord, FileRecord, TensorRecord
from shardwise.lifecycle.names import (
    BEST,
    LATEST,
    LINEAGE_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    parse_checkpoint_name,
    temporary_name,
)
from shardwise.lifecycle.ownership import Claim, claim, publishing
from shardwise.lifecycle.pointers import set_pointer
from shardwise.lifecycle.publish import abandon, make_root, put_in_place, settle
from shardwise.lifecycle.resolve import Lineage, Start, list_checkpoints, next_lineage
from shardwise.lifecycle.retention import Retention, best_checkpoint, lacks_metric, prune
from shardwise.settings import Settings
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)
CONFIG_NAME = "config.yaml"


#: Local work with which the writing of a component ends.
Closing = Sequence[Callable[[Group], None]]


def _sound(aliases: Sequence[AliasRecord], tensors: Sequence[TensorRecord]) -> tuple[AliasRecord, ...]:
    """The aliases, without names under which another stage has a tensor."""
    if not aliases:
        return ()
    saved = {(tensor.component, tensor.spec.name) for tensor in tensors}
    return tuple(alias for alias in sorted(aliases) if (alias.component, alias.name) not in saved)


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


def write_run_files(storage: Storage, directory: Path, config: Settings, metrics: Mapping[str, float]) -> None:
    """Write ``config.yaml`` and ``losses.json``. One rank calls."""
    plain = {field.name: _plain(getattr(config, field.name)) for field in fields(config)}
    write_file(storage, directory / CONFIG_NAME, yaml.safe_dump({"checkpoint": plain}, sort_keys=False).encode())
    finite = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    write_file(storage, directory / METRICS_NAME, (json.dumps(finite, indent=2) + "\n").encode())


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


@dataclass(slots=True)
class RunLine:
    """The checkpoint that a run continues from: the one that was restored or saved last. Rank 0 knows it.

    Only a restored run may have left checkpoints behind, which it may replace.
    """

    start: Start | None = None
    restored: bool = False

    @property
    def left_from(self) -> Start | None:
        """The start, where checkpoints that do not come from it may be ones that the run left behind."""
        return self.start if self.restored else None


class Unfinished:
    """A directory that is written under a temporary name, with a claim on the name that it gets in the end.

    ``info`` goes into its manifest. Rank 0 knows the ``total_bytes`` of its files after the commit.
    """

    def __init__(self, session: Session, place: Path, info: Mapping[str, JsonValue]) -> None:
        self.place, self.temp = place, place.with_name(temporary_name(place.name))
        self.total_bytes: int | None = None
        self._session, self._info = session, info
        self._claim: Claim | None = None
        self._is_reserved = False

    def _claim_name(self) -> None:
        """Make the directory around the place and claim its name, unless another process saves it. Rank 0 calls."""
        if not self._session.is_remote:
            make_root(self.place.parent)
            self._claim = claim(self.place.parent, self.place.name, self._session.first_exchange.token)

    def _gather(self, group: Group, record: ComponentRecord, closing: Closing) -> Callable[[], ComponentRecord]:
        """Gather to rank 0 the files, tensors and aliases that each rank wrote. All ranks call.

        ``closing`` is local work to be done first. Returns a function for rank 0 that merges the records and checks
        that rank 0 sees every file. A rank that writes elsewhere than rank 0 is a `StorageError`.
        """
        is_remote, met = self._session.is_remote, self._session.first_exchange

        def close() -> JsonValue:
            for work in closing:
                work(group)
            if not (group.is_main or is_remote):
                check_claim(self.place.parent, self.place.name, met.token, group, met.locations)
            return None if group.is_main else record.encoded()

        rows = group.collect(close, "gathering records")

        def union() -> ComponentRecord:
            records = [record, *map(ComponentRecord.decoded, rows[1:])]
            whole = merged(records)
            if not is_remote:
                check_files_visible(self.temp, records, met.locations)
            return replace(whole, aliases=_sound(whole.aliases, whole.tensors))

        return union

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

    def abandon(self, group: Group) -> None:
        """Remove what was written, so that a failed save does not fill the disk. Never raises."""
        if not group.is_main:
            return
        try:
            if self._is_reserved:
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
    ) -> None:
        super().__init__(session, final, info)
        self._metrics, self._line = metrics, line
        #: The names of the checkpoints that were removed; known on rank 0 after `commit`.
        self.pruned: tuple[str, ...] = ()

    def reserved(self, make_room: Callable[[], None]) -> Callable[[], None]:
        """A function that claims the name and makes the directory with ``make_room``, which can then be abandoned."""

        def reserve() -> None:
            self._claim_name()
            make_room()
            self._is_reserved = True

        return reserve

    @phase("publish")
    def commit(self, group: Group, record: ComponentRecord, closing: Closing = ()) -> None:
        """Publish. All ranks of ``group`` call; every rank's files are durable."""
        session = self._session
        union = self._gather(group, record, closing)
        with group.together(f"publishing {self.place}"):
            if group.is_main:
                write_run_files(session.storage, self.temp, session.config, self._metrics)
                found = union()
                with nullcontext() if session.is_remote else publishing(session.root):
                    # The line names other checkpoints; they must not change until this one is published.
                    lineage = self._write_lineage()
                    self._write_manifest(found)
                    put_in_place(self.temp, self.place, self._line.left_from)
                    # Whatever fails from here on, the checkpoint is there: the run goes on from it, and nothing is
                    # abandoned (what it replaced may be all that a power failure leaves).
                    self._line.start, self._is_reserved = Start(self.place, lineage), False
                    settle(self.temp, self.place)
                    self._point()
                self._release()

    def _write_lineage(self) -> Lineage:
        numbers = parse_checkpoint_name(self.place.name)
        assert numbers is not None
        root = self._session.root
        lineage = next_lineage(root, list_checkpoints(root), self.place.name, *numbers, self._line.start)
        write_file(self._session.storage, self.temp / LINEAGE_NAME, lineage.encode())
        return lineage

    def _point(self) -> None:
        session = self._session
        set_pointer(session.root, LATEST, self.place.name)
        policy = Retention.from_config(session.config)
        # This checkpoint is published. A save that failed now would be repeated, and find its name taken.
        try:
            self._tidy(policy)
        except (OSError, ShardwiseError) as error:
            _LOG.warning(
                "%s is published, but finding the best checkpoint or deleting old ones failed; the next save tries "
                "again: %s",
                self.place,
                ShardwiseError.wrap(error),
            )

    def _tidy(self, policy: Retention) -> None:
        """Set the pointer to the best checkpoint, and delete what is not to be kept."""
        session = self._session
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
