"""Runs saves in the background, one at a time, on a separate process group."""

from __future__ import annotations

import logging
import threading
from contextvars import copy_context

from shardwise.comm import Group
from shardwise.engine.device_streams import DeviceStreams
from shardwise.engine.jobs import SaveJob, Step
from shardwise.engine.process_exit import PendingSave, forget, remember
from shardwise.engine.records import ComponentRecord
from shardwise.engine.staging import Stager
from shardwise.errors import SaveInterruptedError, ShardwiseError
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)


def waiting_for_copies(stager: Stager) -> Step:
    """The first step of a save from staged copies: it returns when every rank's copies are complete."""

    def wait(group: Group) -> ComponentRecord:
        with group.together("staging the state"):
            stager.wait()
        return ComponentRecord()

    return wait


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
        before it has (see `shardwise.engine.process_exit`).
        """
        save = PendingSave(job.what)
        save.thread = threading.Thread(
            target=copy_context().run, args=(self._run, job, save), name="shardwise-save", daemon=False
        )
        # From here on, before the thread runs, the staged memory belongs to the job.
        self.stager.lend()
        remember(save)
        try:
            save.thread.start()
        except BaseException:
            forget(save)
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

    def wait_for_staging(self) -> None:
        """Return when the captured memory may be overwritten."""
        self.stager.wait()

    def wait(self) -> None:
        """Return when the last save is durable and published.

        Raises:
            ShardwiseError: What failed in it; the same type on every rank. Raised once.
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
        save.join()
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
            forget(self._save)
            self._save = None

    def close(self) -> None:
        """Release thread, group and buffers; the last save must have been waited for."""
        if self._save is not None:
            self._save.join()
        self.stager.clear()
        self._group.close()
