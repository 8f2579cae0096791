"""Traces of saves and loads in the format of Chrome's tracing, which Perfetto opens: a JSON array of events.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A process there is a rank
here. Times are of the clock on the wall, so that the files of several ranks can be put together.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from shardwise.disk.storage import LOCAL
from shardwise.timing import CallRecord, Span

_END = b"\n]\n"


class TraceFile:
    """Appends each call's events to this rank's file in ``directory``, which is valid JSON after each.

    The file is called by the rank, and by time and process, so that no run overwrites another's.
    """

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
