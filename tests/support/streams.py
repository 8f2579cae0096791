"""An accelerator that is not there: work is queued on streams and executed late, in the worst order that is allowed.

Tensors lie on the CPU. What a loop would give to a GPU, a test gives to `FakeStreams.launch`; nothing of it is executed
before somebody waits for it. Then other streams go before those of copies wherever order does not forbid it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from shardwise.engine.staging import DeviceStreams


class FakeEvent:
    """A point on a stream."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self.reached = False

    def synchronize(self) -> None:
        """Execute what is queued until this point is reached."""
        self._streams.run_until(self)


@dataclass
class FakeStream:
    """A queue of work, of points, and of points of other streams that are waited for."""

    copies: bool = False
    queue: deque[Callable[[], None] | tuple[str, FakeEvent]] = field(default_factory=deque)


class FakeStreams(DeviceStreams):
    """`DeviceStreams` of an accelerator whose memory is the CPU's.

    Args:
        holds_back: Whether `hold_back` does anything; without it tests see what it is good for.
    """

    def __init__(self, holds_back: bool = True) -> None:
        self._holds_back = holds_back
        self._streams: dict[object, FakeStream] = {}
        self._using = threading.local()
        self._lock = threading.RLock()
        #: Waiting threads go on when this is set: a test makes them late by clearing it.
        self.open = threading.Event()
        self.open.set()
        self.devices: set[torch.device] = set()

    # --- what the loop does -----------------------------------------------------------------------------------------

    def launch(self, work: Callable[[], object], device: str | torch.device = "cpu") -> None:
        """Queue work on this thread's current stream of a device."""
        with self._lock:
            self._current(torch.device(device)).queue.append(lambda: (work(), None)[1])

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Another stream is this thread's current one."""
        self._using.name = name
        try:
            yield
        finally:
            del self._using.name

    def finish(self) -> None:
        """Execute everything."""
        with self._lock:
            while self._advance():
                pass

    # --- DeviceStreams ----------------------------------------------------------------------------------------------

    def has_streams(self, device: torch.device) -> bool:
        """All devices are accelerators here."""
        return True

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy in two halves, so that a tensor can be torn."""
        device = source.device
        with self._lock:
            self.devices.add(device)
            side = self._side(device)
            side.queue.append(("wait", self._record(self._current(device))))
            if source.dim() == 0 or len(source) < 2:
                side.queue.append(lambda: (buffer.copy_(source), None)[1])
                return
            half = len(source) // 2
            side.queue.append(lambda: (buffer[:half].copy_(source[:half]), None)[1])
            side.queue.append(lambda: (buffer[half:].copy_(source[half:]), None)[1])

    def mark(self, device: torch.device) -> FakeEvent:
        """A point on the device's stream of copies."""
        with self._lock:
            return self._record(self._side(device))

    def hold_back(self, device: torch.device, event: object) -> None:
        """Queue a wait on the current stream."""
        assert isinstance(event, FakeEvent)
        if self._holds_back:
            with self._lock:
                self._current(device).queue.append(("wait", event))

    def settle(self, device: torch.device) -> None:
        """Execute what the current stream has."""
        with self._lock:
            event = self._record(self._current(device))
        self.run_until(event)

    # --- inside -----------------------------------------------------------------------------------------------------

    def run_until(self, event: FakeEvent) -> None:
        """Execute, one piece of work after the other, until ``event`` is reached."""
        assert self.open.wait(60)
        with self._lock:
            while not event.reached:
                assert self._advance(), "the streams wait for each other"

    def _current(self, device: torch.device) -> FakeStream:
        return self._streams.setdefault((device, getattr(self._using, "name", "default")), FakeStream())

    def _side(self, device: torch.device) -> FakeStream:
        return self._streams.setdefault((device, "copies"), FakeStream(copies=True))

    def _record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent(self)
        stream.queue.append(("record", event))
        return event

    def _advance(self) -> bool:
        """Execute one piece of work: of a stream of copies only where no other stream can go on."""
        streams = sorted(self._streams.values(), key=lambda stream: stream.copies)
        for stream in streams:
            if not stream.queue:
                continue
            first = stream.queue[0]
            if isinstance(first, tuple):
                kind, event = first
                if kind == "wait" and not event.reached:
                    continue
                event.reached = event.reached or kind == "record"
                stream.queue.popleft()
                return True
            stream.queue.popleft()
            first()
            return True
        return False
