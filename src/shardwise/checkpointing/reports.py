"""Reports of saves and loads to the user: a line in the log, a record, the callbacks."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.checkpointing.trace_file import TraceFile
from shardwise.comm import Group
from shardwise.timing import Callback, CallRecord, Recording, recording

_LOG = logging.getLogger(__name__)

#: The logger above all of the library's.
ROOT = "shardwise"
_FORMAT = "%(asctime)s %(levelname)s shardwise: %(message)s"


class DefaultHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error for as long as the program has set up no handler of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write, unless the root logger has a handler by now, which writes the same."""
        if not logging.getLogger().handlers:
            super().emit(record)


def show_log() -> None:
    """Show messages from INFO on, on standard error, where nothing says what is to be done with them."""
    logger, root = logging.getLogger(ROOT), logging.getLogger()
    if logger.handlers or root.handlers:
        return
    handler = DefaultHandler()
    handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call has done.

    Attributes:
        group: The ranks that made it.
        path: What was written or read.
        total_bytes: Bytes of all ranks, where they are known.
        pruned: The checkpoints that were removed.
    """

    group: Group
    path: Path
    epoch: int | None = None
    step: int | None = None
    total_bytes: int | None = None
    pruned: tuple[str, ...] = ()


class Call:
    """A save or a load from its beginning until it has returned and is over, whichever comes last."""

    def __init__(self, reports: Reports, name: str) -> None:
        self.recording = Recording(reports.shows_progress)
        self._reports, self._name = reports, name
        self._begin, self._clock = time.time(), time.perf_counter()
        self._lock = threading.Lock()
        self._stall: float | None = None
        self._over: tuple[Outcome, float] | None = None

    def returned(self) -> None:
        """The training loop goes on."""
        self._done(None)

    def over(self, outcome: Outcome) -> None:
        """All is durable and published, or read. A call that fails is never over."""
        self._done(outcome)

    def _done(self, outcome: Outcome | None) -> None:
        seconds = time.perf_counter() - self._clock
        with self._lock:
            if outcome is None:
                self._stall = seconds
            else:
                self._over = outcome, seconds
            if self._stall is None or self._over is None:
                return
            (found, end), stall = self._over, self._stall
        record = CallRecord(
            call=self._name,
            rank=found.group.global_rank,
            path=found.path,
            epoch=found.epoch,
            step=found.step,
            begin=self._begin,
            seconds=end,
            stall=min(stall, end),
            nbytes=self.recording.nbytes,
            total_bytes=found.total_bytes,
            phases=self.recording.phases(),
            pruned=found.pruned,
            spans=self.recording.spans,
        )
        self._reports.take(record, found.group)


class Reports:
    """What one checkpointer tells its user.

    Args:
        shown: Whether a line is logged for each save and load, and long ones may show a bar.
        callbacks: Called with the record of each save and load, on every rank.
        trace_dir: Where traces are written.
        shows_progress: Whether calls may show a bar: not while training goes on beside them.

    Attributes:
        last_save: Of the last save that is over.
        last_restore: Of the last load that is over.
    """

    def __init__(
        self, shown: bool, callbacks: Sequence[Callback], trace_dir: Path | None, shows_progress: bool
    ) -> None:
        self.shows_progress = shown and shows_progress
        self._shown = shown
        self._callbacks: list[Callback] = [*callbacks, *([] if trace_dir is None else [TraceFile(trace_dir)])]
        self.last_save: CallRecord | None = None
        self.last_restore: CallRecord | None = None
        if shown:
            show_log()

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[Call]:
        """Record one call of the checkpointer, and what it leaves to other threads."""
        made = Call(self, name)
        with recording(made.recording):
            try:
                yield made
            finally:
                made.returned()

    def take(self, record: CallRecord, group: Group) -> None:
        """Tell of a call that is over. Never raises: what was saved is published, and what was read is in place."""
        if record.call.startswith("save"):
            self.last_save = record
        else:
            self.last_restore = record
        if self._shown and group.is_main:
            _LOG.info("%s", summary(record))
        for callback in self._callbacks:
            try:
                callback(record)
            except Exception:  # noqa: BLE001 - a save that is published has not failed; logged with its traceback
                _LOG.exception("%s of %s is done; what it was to be reported to failed", record.call, record.path)


def summary(record: CallRecord) -> str:
    """One line about a call that is over."""
    verb = "saved" if record.call.startswith("save") else "loaded" if "load" in record.call else "restored"
    what = f"step {record.step}" if record.step is not None else record.call.partition("_")[2].replace("_", " ")
    known = record.nbytes if record.total_bytes is None else record.total_bytes
    whose = "" if record.total_bytes is not None else " on rank 0"
    rate = size_text(int(record.gb_per_second * 1e9))
    text = f"{verb} {what}: {size_text(known)}{whose} in {record.seconds:.2f} s ({rate}/s)"
    if record.seconds - record.stall > 0.005:
        text += f", training waited {record.stall:.2f} s"
    text += f", {'to' if verb == 'saved' else 'from'} {record.path}"
    return text + (f"; removed {', '.join(record.pruned)}" if record.pruned else "")


def size_text(nbytes: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"
