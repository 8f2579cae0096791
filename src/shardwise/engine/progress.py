"""Progress of a long read or write: a bar on a terminal, a line in the log for debugging now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from shardwise.timing import current

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG = logging.getLogger(__name__)

#: A bar is shown of what takes longer than this, in seconds.
BAR_SECONDS = 1.0
#: Seconds between lines in the log.
LOG_SECONDS = 10.0


class Progress:
    """Counts bytes and shows or logs the progress. Threads may share it."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        call = current()
        self._what, self._total, self._shown = what, total, shown
        self._done = 0
        self._started = self._logged = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm[NoReturn] | None = None
        shows_bar = shown and call is not None and call.shows_progress
        if shows_bar and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=BAR_SECONDS, leave=False)

    def add(self, nbytes: int) -> None:
        """Count bytes that have been read or written."""
        if not self._shown:
            return
        with self._lock:
            self._done += nbytes
            if self._bar is not None:
                self._bar.update(nbytes)
            elif time.monotonic() - self._logged >= LOG_SECONDS:
                self._logged = time.monotonic()
                share = 100 * self._done / max(self._total, self._done, 1)
                rate = self._done / 1e9 / (self._logged - self._started)
                _LOG.debug("%s: %.0f%% of %.2f GB, %.2f GB/s", self._what, share, self._total / 1e9, rate)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar off the terminal."""
        self._shown = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None
