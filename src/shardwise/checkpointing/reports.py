"""Reports of saves and loads to the user: a line in the log, the records, the callbacks, and traces.

Traces are in the format of Chrome's tracing, which Perfetto opens: a JSON array of events, see
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A process there is a rank here. Times
are of the clock on the wall, so that the files of several ranks can be put together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.comm import Group
from shardwise.disk.storage import LOCAL
from shardwise.timing import Callback, CallRecord, Recording, Span, recording

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


#: The record of a call, of the seconds that it kept the loop waiting; and the ranks that made it.
_Over = tuple[Callable[[float], CallRecord], Group]


class Call:
    """A save or a load from its beginning until it has returned and is over, whichever comes last."""

    def __init__(self, reports: Reports, name: str) -> None:
        self.recording = Recording(reports.shows_progress)
        self._reports, self._name = reports, name
        self._begin, self._clock = time.time(), time.perf_counter()
        self._lock = threading.Lock()
        self._stall: float | None = None
        self._over: _Over | None = None

    def returned(self) -> None:
        """The training loop goes on."""
        self._done(stall=time.perf_counter() - self._clock)

    def over(
        self,
        group: Group,
        path: Path,
        epoch: int | None = None,
        step: int | None = None,
        total_bytes: int | None = None,
        pruned: tuple[str, ...] = (),
    ) -> None:
        """All is durable and published, or read, by the ranks of ``group``. A call that fails is never over."""
        end, measured = time.perf_counter() - self._clock, self.recording

        def record(stall: float) -> CallRecord:
            return CallRecord(
                call=self._name,
                rank=group.global_rank,
                path=path,
                epoch=epoch,
                step=step,
                begin=self._begin,
                seconds=end,
                stall=min(stall, end),
                nbytes=measured.nbytes,
                total_bytes=total_bytes,
                phases=measured.phases(),
                pruned=pruned,
                spans=measured.spans,
            )

        self._done(over=(record, group))

    def _done(self, stall: float | None = None, over: _Over | None = None) -> None:
        with self._lock:
            self._stall = self._stall if stall is None else stall
            self._over = over or self._over
            if self._stall is None or self._over is None:
                return
            (record, group), waited = self._over, self._stall
            self._over = None  # which knows this call
        self._reports.take(record(waited), group)


class Reports:
    """What one checkpointer tells its user: lines if ``shown``, bars unless training goes on beside a call."""

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


@dataclass(frozen=True, slots=True)
class RestoreRecord:
    """The checkpoint that was resumed.

    Attributes:
        epoch: Epoch of the checkpoint; ``None`` where its directory is not called ``epoch_E_step_S``.
        step: Step of the checkpoint; ``None`` in the same case.
        path: Its directory.
        metrics: The metrics it was saved with.
        unrestored: Names of states in the checkpoint that the run did not load, the same on every rank: ``optimizer``,
            ``scheduler``, ``rng`` and extra state that `restore` was not given, and per-rank states (random number
            generators, entries of ``extra_state``) that differed between ranks and were saved on another number of
            ranks.
        fresh: Parameters of this rank's optimizers that the saved one did not update, and that start without state
            (``allow_new_parameters``).
    """

    epoch: int | None
    step: int | None
    path: Path
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    unrestored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


_END = b"\n]\n"


class TraceFile:
    """Appends each call's events to a file of this rank's, process's and time's own, which is valid JSON after each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path: Path | None = None
        self._size = 0

    def __call__(self, record: CallRecord) -> None:
        """Append the events of a call that is over; `StorageError` if the file system refuses. Local."""
        made = events(record)
        if self._path is None:
            LOCAL.make_directory(self._directory)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            self._path = self._directory / f"rank-{record.rank}-{stamp}-{os.getpid()}.json"
            made = [_named("process_name", record.rank, f"rank {record.rank}"), *made]
            LOCAL.create(self._path, 0, b"")
        text = b",\n".join(json.dumps(event).encode() for event in made)
        start = max(0, self._size - len(_END))
        content = (b",\n" if start else b"[\n") + text + _END
        handle = LOCAL.open(self._path, writable=True)
        try:
            LOCAL.write(handle, content, start)
        finally:
            LOCAL.close(handle)
        self._size = start + len(content)


Event = dict[str, object]


def events(record: CallRecord) -> list[Event]:
    """The events of a call: itself, its spans, the names of its threads."""
    whole = Span(record.call, int(record.begin * 1e9), int((record.begin + record.seconds) * 1e9), "calls")
    about = {"path": str(record.path), "step": record.step, "bytes": record.nbytes, "stall_seconds": record.stall}
    threads = list(dict.fromkeys(["calls", *(span.thread for span in record.spans)]))
    made: list[Event] = [_named("thread_name", record.rank, name, _number(name)) for name in threads]
    made.append(_event(whole, record.rank, {**about, "phases": dict(record.phases)}))
    shares = ({} if span.busy is None else {"busy_seconds": span.busy} for span in record.spans)
    return made + [_event(span, record.rank, share) for span, share in zip(record.spans, shares, strict=True)]


def _number(thread: str) -> int:
    """A thread's number, the same for the same name in every call."""
    known = {"calls": 0, "MainThread": 1, "shardwise-save": 2}
    tail = thread.rpartition("_")[2]
    return known.get(thread, 10 + int(tail) if tail.isdecimal() else 9)


def _named(what: str, rank: int, name: str, thread: int = 0) -> Event:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}}


def _event(span: Span, rank: int, args: Mapping[str, object]) -> Event:
    return {
        "ph": "X",
        "cat": "shardwise",
        "name": span.name,
        "pid": rank,
        "tid": _number(span.thread),
        "ts": span.begin / 1e3,
        "dur": (span.end - span.begin) / 1e3,
        "args": dict(args),
    }
