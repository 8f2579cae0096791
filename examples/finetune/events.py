"""What workers tell the orchestrator: one JSON object per line, appended to a file that survives their death."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Started:
    """A process exists. Every rank sends it."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is built and has its base weights.

    Attributes:
        world_size: Number of processes.
        parameters: Elements of the whole model.
        parameter_bytes: Bytes of them, as they are trained.
        seconds: From the start of rank 0's process.
    """

    world_size: int
    parameters: int
    parameter_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run goes on from a checkpoint.

    Attributes:
        step: Its step.
        name: Its directory's name.
        saved_by: Number of processes that wrote it.
        seconds: Time to restore.
    """

    step: int
    name: str
    saved_by: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """A training step is done; ``loss`` is the mean over all processes, before the step's update."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Saving:
    """A save begins."""

    step: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is published, and the yardstick has been measured beside it.

    Attributes:
        step: Its step.
        name: Its directory's name.
        seconds: Time of the save, of the slowest process.
        raw_seconds: Time of the raw parallel write, likewise.
        raw_bytes: Bytes of the raw write, over all processes.
    """

    step: int
    name: str
    seconds: float
    raw_seconds: float
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The run has done its steps; ``loss`` is that of the training text after the last update."""

    loss: float


Event: TypeAlias = Started | Ready | Resumed | Stepped | Saving | Saved | Finished

_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Started, Ready, Resumed, Stepped, Saving, Saved, Finished)
}


def encode(event: Event) -> bytes:
    """One line of the file."""
    return (json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n").encode()


def decode(line: bytes) -> Event:
    """The event of one line."""
    fields = json.loads(line)
    return _KINDS[fields.pop("event")](**fields)


def append(path: Path, event: Event) -> None:
    """Add an event; lines of several processes do not mix, since each is one write of a few bytes in append mode."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(handle, encode(event))
    finally:
        os.close(handle)


class Follower:
    """Reads the events that have been added since the last look.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Event]:
        """The new events, in order; a line that is still being written waits for the next call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [decode(line) for line in whole.splitlines()]
