"""Storage for asynchronous saves that a test holds up."""

from __future__ import annotations

import threading
from pathlib import Path

from shardwise.disk.storage import Buffer, LocalStorage


class Waits(LocalStorage):
    """Makes the background wait before it writes, until ``go_on`` is set; the training thread is let through."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def _wait(self) -> None:
        if threading.current_thread().name == "shardwise-save":
            assert self.go_on.wait(60)

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        self._wait()
        super().make_directory(path, new=new)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._wait()
        super().create(path, size, head)

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self._wait()
        super().write(handle, data, offset)
