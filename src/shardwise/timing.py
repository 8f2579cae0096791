"""The phases of a save or a load: spans of time, and the record that users get of a call that is over.

A call's `Recording` is in a context variable, so that what runs below needs no argument for it and two checkpointers
never share one. A thread that is started with a copy of the context records into the same call; `Shares` is for pools
of threads, which have no context. Without a recording nothing is measured.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time that one thread spent on one thing.

    Attributes:
        name: The phase.
        begin: Nanoseconds since the epoch.
        end: Likewise.
        thread: The thread's name.
        is_share: It is one thread's share of a phase that another thread waited for, from its first piece to its last.
        busy: Seconds of it in which the thread had work, where that is known.
    """

    name: str
    begin: int
    end: int
    thread: str
    is_share: bool = False
    busy: float | None = None


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A save or a load that is over, as this rank saw it.

    Attributes:
        call: The method: ``save``, ``restore``, ``save_model``, ``load_base_model``, ...
        rank: This process's global rank.
        path: The directory that was written or read.
        epoch: Epoch of the checkpoint, where it has one.
        step: Step of the checkpoint, where it has one.
        begin: When the call began, in seconds since the epoch.
        seconds: From the call until all was durable and published, or read.
        stall: Seconds of these in which the call kept the training loop waiting: all of them, but in asynchronous mode.
        nbytes: Bytes of tensors that this rank wrote or read.
        total_bytes: Of a save: bytes of all files, known on rank 0. Of `restore`: bytes that all ranks read.
        phases: Phase -> seconds in which this rank's calling or saving thread was in it, other phases inside of it not
            counted. ``digest`` is among them: the work of all threads on it, which is also part of ``write``.
        pruned: Names of the checkpoints that retention removed, known on rank 0.
        spans: The same in detail, by the time at which they ended.
    """

    call: str
    rank: int
    path: Path
    epoch: int | None
    step: int | None
    begin: float
    seconds: float
    stall: float
    nbytes: int
    total_bytes: int | None
    phases: Mapping[str, float] = field(hash=False)
    pruned: tuple[str, ...] = ()
    spans: tuple[Span, ...] = field(default=(), repr=False)

    @property
    def gb_per_second(self) -> float:
        """Rate of all ranks together where their bytes are known, else of this one, in 10^9 bytes per second."""
        known = self.nbytes if self.total_bytes is None else self.total_bytes
        return known / 1e9 / max(self.seconds, 1e-9)

    def scalars(self) -> dict[str, float]:
        """The figures by names such as ``checkpoint/save/seconds``, for W&B, TensorBoard and their like."""
        top = f"checkpoint/{self.call}"
        figures = {
            f"{top}/seconds": self.seconds,
            f"{top}/stall": self.stall,
            f"{top}/gb": (self.nbytes if self.total_bytes is None else self.total_bytes) / 1e9,
            f"{top}/gb_per_second": self.gb_per_second,
        }
        return figures | {f"{top}/phases/{name}": seconds for name, seconds in self.phases.items()}


Callback = Callable[[CallRecord], object]


class Recording:
    """What is measured of one call, whose long work may show a bar (``shows_progress``). Threads may share it."""

    def __init__(self, shows_progress: bool = False) -> None:
        self.shows_progress = shows_progress
        self.nbytes = 0
        self._wall = time.time_ns() - time.perf_counter_ns()
        self._spans: list[Span] = []
        # One number for each thread, so that none waits for another's.
        self._tallies: dict[str, dict[int, int]] = {}

    def add(self, name: str, begin: int, end: int, thread: str = "", busy: int | None = None) -> None:
        """Take in a span of this thread, or another's share, in nanoseconds of `time.perf_counter_ns`."""
        own, share = thread or threading.current_thread().name, None if busy is None else busy / 1e9
        self._spans.append(Span(name, begin + self._wall, end + self._wall, own, busy is not None, share))

    def tally(self, name: str) -> dict[int, int]:
        """The nanoseconds that each thread spent on ``name``, to be added to."""
        return self._tallies.setdefault(name, {})

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans so far."""
        return tuple(self._spans)

    def phases(self) -> dict[str, float]:
        """Seconds of each phase, what it contains of others left out."""
        found = own_seconds(self._spans)
        for name, threads in self._tallies.items():
            found[name] = found.get(name, 0.0) + sum(threads.values()) / 1e9
        return found


def own_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of each name, without those of spans inside; shares of other threads do not count."""
    found: dict[str, int] = {}
    around: dict[str, list[Span]] = {}
    for span in sorted((each for each in spans if not each.is_share), key=lambda each: (each.begin, -each.end)):
        stack = around.setdefault(span.thread, [])
        while stack and stack[-1].end <= span.begin:
            stack.pop()
        length = span.end - span.begin
        if stack:
            found[stack[-1].name] -= length
        found[span.name] = found.get(span.name, 0) + length
        stack.append(span)
    return {name: length / 1e9 for name, length in found.items()}


_current: ContextVar[Recording | None] = ContextVar("shardwise_recording", default=None)


def current() -> Recording | None:
    """The recording of the call that this is part of."""
    return _current.get()


@contextlib.contextmanager
def recording(into: Recording) -> Iterator[None]:
    """Record what happens inside into ``into``."""
    token = _current.set(into)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Record the time that is spent inside, also where an error ends it. Not for each tensor: a span is kept."""
    into = _current.get()
    if into is None:
        yield
        return
    begin = time.perf_counter_ns()
    try:
        yield
    finally:
        into.add(name, begin, time.perf_counter_ns())


def count_bytes(nbytes: int) -> None:
    """Add bytes that this rank wrote or read. The call's own thread calls."""
    into = _current.get()
    if into is not None:
        into.nbytes += nbytes


def timed(name: str, function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose calls by any thread add up to one figure and make no spans."""
    into = _current.get()
    if into is None:
        return function
    spent, clock, own = into.tally(name), time.perf_counter_ns, threading.get_ident

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        begin = clock()
        try:
            return function(*args, **kwargs)
        finally:
            thread = own()
            spent[thread] = spent.get(thread, 0) + clock() - begin

    return call


class Shares:
    """The shares of a pool's threads in a phase: one span for each thread, however many pieces it works on."""

    def __init__(self, name: str) -> None:
        self._name, self._into = name, _current.get()
        self._threads: dict[int, list[int]] = {}
        self._names: dict[int, str] = {}

    def of(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function``, whose calls count as their thread's share."""
        if self._into is None:
            return function
        clock, own, threads = time.perf_counter_ns, threading.get_ident, self._threads

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                end, thread = clock(), own()
                known = threads.get(thread)
                if known is None:
                    self._names[thread] = threading.current_thread().name
                    threads[thread] = [begin, end, end - begin]
                else:
                    known[1] = end
                    known[2] += end - begin

        return call

    @contextlib.contextmanager
    def closing(self) -> Iterator[Self]:
        """Make the spans at the end, when the threads have ended."""
        try:
            yield self
        finally:
            if self._into is not None:
                for thread, (begin, end, busy) in self._threads.items():
                    self._into.add(self._name, begin, end, self._names[thread], busy)
