"""Runs saves in the background, one at a time, on a separate process group, also while the process ends.

A training script may return from its last line, raise, or call ``sys.exit`` without `Checkpointer.finalize`. The
interpreter then waits for the thread that writes; but executors take no more work from a certain moment on, and no
caller is left to raise a failure to. So the saves that no caller has waited for yet are remembered, and

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
from contextvars import copy_context
from dataclasses import dataclass, field

from shardwise.comm import Group
from shardwise.engine.records import ComponentRecord, SaveJob, Step, local_step
from shardwise.engine.staging import DeviceStreams, Stager
from shardwise.errors import SaveInterruptedError, ShardwiseError
from shardwise.timing import phase
from shardwise.upstream.python import before_threads_end

_LOG = logging.getLogger(__name__)

#: Exit code of a process that has lost a save.
LOST_EXIT_CODE = 1


@dataclass(eq=False)
class PendingSave:
    """A save in the background, until a caller has waited for it."""

    what: str
    thread: threading.Thread = field(default_factory=threading.Thread)
    failure: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether it is still being written on this rank."""
        return self.thread.is_alive()


_pending: set[PendingSave] = set()


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
        save.thread.join()


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


def waiting_for_copies(stager: Stager) -> Step:
    """The first step of a save from staged copies: it returns when every rank's copies are complete."""

    def wait() -> ComponentRecord:
        stager.wait()
        return ComponentRecord()

    return local_step("staging the state", wait)


class Background:
    """A thread that runs saves, and the buffers that they are written from.

    Only that thread uses ``group``, which is closed with it, so that no collective of the training mixes with a save's.
    """

    def __init__(self, group: Group, streams: DeviceStreams | None = None) -> None:
        self.stager = Stager(streams)
        self._group = group
        self._save: PendingSave | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is still being written on this rank."""
        return self._save is not None and self._save.is_running

    @property
    def is_broken(self) -> bool:
        """Whether its ranks cannot communicate any more, so that it cannot run another save."""
        return self._group.is_broken

    def submit(self, job: SaveJob) -> None:
        """Start a save; the previous one must have been waited for. All ranks call.

        The thread publishes as soon as every rank is durable; it waits for no later call, and the process does not end
        before it has.
        """
        save = PendingSave(job.what)
        save.thread = threading.Thread(
            target=copy_context().run, args=(self._run, job, save), name="shardwise-save", daemon=False
        )
        # From here on, before the thread runs, the staged memory belongs to the job.
        self.stager.lend()
        _register_exit_hooks()
        _pending.add(save)
        try:
            save.thread.start()
        except BaseException:
            _pending.discard(save)
            self.stager.take_back()
            raise
        self._save = save

    def _run(self, job: SaveJob, save: PendingSave) -> None:
        try:
            job.run(self._group)
        except BaseException as error:  # noqa: BLE001 - raised at the next call of the library
            _LOG.error("%s failed: %s", job.what, error)
            save.failure = error
        finally:
            self.stager.take_back()

    def wait(self) -> None:
        """Return when the last save is durable and published.

        Raises `ShardwiseError`: what failed in it; the same type on every rank. Raised once.
        """
        failure = self.outcome()
        self.acknowledge()
        if failure is not None:
            raise failure

    @phase("wait")
    def outcome(self) -> ShardwiseError | None:
        """Wait for the last save; what failed in it, until `acknowledge` is called."""
        save = self._save
        if save is None:
            return None
        save.thread.join()
        failure = save.failure
        if failure is None or isinstance(failure, ShardwiseError):
            return failure
        made = SaveInterruptedError(
            f"{save.what} failed in the background: {type(failure).__name__}: {failure}",
            hint="What was published before is untouched; save again.",
        )
        made.__cause__ = failure
        return made

    def acknowledge(self) -> None:
        """Forget the last save, which has ended: the caller of the library knows its outcome."""
        if self._save is not None:
            _pending.discard(self._save)
            self._save = None

    def close(self) -> None:
        """Release thread, group and buffers; the last save must have been waited for."""
        if self._save is not None:
            self._save.thread.join()
        self.stager.clear()
        self._group.close()
