"""Output of the demo: plain lines, flushed at once, each with the time since the start."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Console:
    """Writes lines to a stream.

    Args:
        stream: Where to; standard output when not given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the console was made."""
        return time.monotonic() - self._begun

    def heading(self, text: str) -> None:
        """Begin a part of the story."""
        self.plain(f"\n== {text}")

    def say(self, text: str) -> None:
        """Write a line with the time."""
        self.plain(f"{self.seconds:6.1f} s  {text}")

    def plain(self, text: str) -> None:
        """Write a line as it is."""
        self._stream.write(text + "\n")
        self._stream.flush()


def megabytes(nbytes: float) -> str:
    """``nbytes`` for people: ``807.2 MB`` (10**6 bytes), or in kB below a tenth of that."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"
