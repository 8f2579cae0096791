"""The end of a process with a save in the background: the save is finished, or its loss is logged as an error.

A training script may return from its last line, raise, or call ``sys.exit`` without `Checkpointer.finalize`. The
interpreter then waits for the thread that writes; but executors take no more work from a certain moment on, and no
caller is left to raise a failure to. So this module keeps a list of the saves that no caller has waited for yet, and

1. before executors close, the interpreter waits for them;
2. at the very end, one that has failed is logged as an error, and the process ends with a code other than 0.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - what it registers has to be registered first, to run last
import contextlib
import functools
import logging
import os
import sys
import threading
from dataclasses import dataclass

from shardwise.upstream.python import before_threads_end

_LOG = logging.getLogger(__name__)

#: Exit code of a process that has lost a save.
LOST_EXIT_CODE = 1


@dataclass(eq=False)
class PendingSave:
    """A save in the background, until a caller has waited for it."""

    what: str
    thread: threading.Thread | None = None
    failure: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether it is still being written on this rank."""
        return self.thread is not None and self.thread.is_alive()

    def join(self) -> None:
        """Return when the save has ended, successfully or not."""
        if self.thread is not None:
            self.thread.join()


_pending: set[PendingSave] = set()


def remember(save: PendingSave) -> None:
    """Add a save to the list until `forget` is called, or the process ends."""
    _register_exit_hooks()
    _pending.add(save)


def forget(save: PendingSave) -> None:
    """Remove a save from the list: the caller of the library knows its outcome."""
    _pending.discard(save)


@functools.cache
def _register_exit_hooks() -> None:
    atexit.register(_report_lost)
    os.register_at_fork(after_in_child=_pending.clear)  # a data loader's worker has no thread that writes
    # Hooks of `atexit` run only when every thread has ended, and executors close before.
    before_threads_end(_wait_for_pending)


def _wait_for_pending() -> None:
    for save in list(_pending):
        if save.is_running:
            _LOG.info("waiting for a save before the process ends: %s", save.what)
        save.join()


def _report_lost() -> None:
    lost = [save for save in _pending if save.failure is not None or save.is_running]
    if not lost:
        return
    for save in lost:
        why = "it was not finished" if save.failure is None else f"{save.failure}"
        _LOG.error(
            "LOST: %s, in the background, and the process ends before this was raised: %s. Call finalize() before the "
            "end, or use the checkpointer in a with statement, to have it raised.",
            save.what,
            why,
        )
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    # An exception from here does not change the exit code, and 0 would report success.
    os._exit(LOST_EXIT_CODE)
