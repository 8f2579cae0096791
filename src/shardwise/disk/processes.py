"""Other processes of this machine: whether one exists, and a directory that is none of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardwise.disk.storage import storage_errors

_LOG = logging.getLogger(__name__)
_PREFIX = ".shardwise-"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def private_directory(parent: Path) -> Iterator[Path]:
    """Make a new directory below ``parent``, and remove it with all that is in it, whatever happens.

    What a killed process has left is removed by the next one on the same machine: an owner holds a lock as long as it
    lives.
    """
    handle: int | None = None
    path: Path | None = None
    try:
        with storage_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(parent)
            path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{_run()}-", dir=parent))
            handle = _locked(path)
        yield path
    except BaseException:
        if path is not None:
            try:
                shutil.rmtree(path)
            except OSError as error:  # must not hide the error that made the directory useless
                _LOG.warning("could not remove %s: %s", path, error)
        raise
    else:
        with storage_errors(path):
            shutil.rmtree(path)
    finally:
        if handle is not None:
            os.close(handle)


def _run() -> str:
    """A name that shows people which run a directory belongs to; it does not have to be unique."""
    name = os.environ.get("TORCHELASTIC_RUN_ID") or f"pid{os.getpid()}"
    return re.sub(r"[^A-Za-z0-9]+", "_", name)[:32]


def _owner() -> str:
    """Name of the file that is locked; that of another machine, whose locks cannot be seen here, is another."""
    with contextlib.suppress(OSError):
        return f"owner-{_BOOT_ID.read_text(encoding='ascii').strip()}"
    return f"owner-{os.uname().nodename}"


def _locked(directory: Path) -> int | None:
    """Lock a file in ``directory`` for as long as it is open; ``None`` where the file system has no locks."""
    made, name = directory / "owner.new", directory / _owner()
    handle = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    # Under this name it is locked from the first moment on, so that nobody takes its owner for dead.
    made.rename(name)
    return handle


def _remove_abandoned(parent: Path) -> None:
    """Remove directories of processes that have ended; skip those that cannot be read or removed."""
    name = _owner()
    for path in parent.glob(f"{_PREFIX}*/{name}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent)
            finally:
                os.close(handle)


def process_exists(pid: int) -> bool:
    """Whether there is a process with this number, of whatever user; one that nobody has waited for counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
