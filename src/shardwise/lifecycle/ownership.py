"""Ownership of an unfinished save: a lock file beside it, held as long as the saving process lives.

What an interrupted save left and what another checkpointer is writing have the same kind of name. The lock
distinguishes them: the process that writes ``.saving-NAME`` holds a lock on ``.owner-NAME``, which the system releases
when the process ends in any way, on this machine or, where the file system passes locks on (NFS, Lustre with
``flock``), on another. The file says which host and process it is, for people. It is gone once the save is over, and
never part of a checkpoint.

A storage whose files are not this machine's has no locks: there, nobody is kept from a name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.guarded import read_small_file
from shardwise.disk.processes import process_exists
from shardwise.disk.storage import LOCAL, local_path, storage_errors, using
from shardwise.errors import CheckpointBusyError, ShardwiseError, StorageError
from shardwise.lifecycle.names import OWNER

_LIMIT = 4096
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
#: How long one waits for another process that is publishing in the same root: some renames, and deletions.
_PUBLISHING_SECONDS = 600.0
_LOOK_SECONDS = 0.05


class Claim:
    """The right to write an unfinished save, until it is released or the process ends.

    ``path`` is the file that is locked, ``handle`` the same, open; ``None`` where a storage has no locks. The file
    names ``owner``: host, process and token.
    """

    def __init__(self, path: Path, handle: int | None, owner: tuple[str, int, str] = ("", 0, "")) -> None:
        self.path, self._named = path, owner
        self._handle: int | None = handle
        _claims.add(self)

    def release(self, *, keeps_file: bool = False) -> None:
        """Remove the file and the lock. Safe to call twice.

        A file that another process has taken, as one on another machine may where locks are not passed on, stays.
        """
        handle, self._handle = self._handle, None
        if handle is None:
            return
        # Before the lock goes: whoever locks a file that has lost its name sees that and begins again.
        with contextlib.suppress(OSError, ShardwiseError):
            if not keeps_file and _owner(self.path) == self._named:
                os.unlink(self.path)
        os.close(handle)


_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    for claim in list(_claims):  # in a forked child: the lock is the parent's, and ends with it
        claim.release(keeps_file=True)


os.register_at_fork(after_in_child=_leave_to_the_parent)


def claim(root: Path, name: str, token: str = "") -> Claim:
    """Claim the unfinished save of ``name`` in ``root``; one rank calls, before it makes or removes anything of it.

    ``token`` identifies this run, for other ranks that check whether they see the same directory. Where a process that
    is alive has the claim, that is a `CheckpointBusyError`, which names its host and number.
    """
    path = root / (OWNER + name)
    place = local_path(path)
    if place is None:
        return Claim(path, None)
    owner = (socket.gethostname(), os.getpid(), token)
    while True:
        try:
            handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise StorageError.from_os(error, path=root) from error  # nobody has given the lock file its name
        try:
            with storage_errors(path):
                if not _locked(handle, place, name):
                    os.close(handle)
                    continue
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{owner[0]} {owner[1]} {token}\n".encode(), 0)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        return Claim(place, handle, owner)


def claimed_by(root: Path, name: str) -> str | None:
    """The token of the process that has claimed ``name``; ``None`` where there is no claim to be seen. Any rank."""
    path = local_path(root / (OWNER + name))
    return None if path is None else _owner(path)[2]


@dataclass(frozen=True, slots=True)
class Writer:
    """The process that has claimed an unfinished save; whether it is ``alive`` is not known of another machine's."""

    host: str
    pid: int
    alive: bool | None


def writer_of(root: Path, name: str) -> Writer | None:
    """Who has claimed ``name``, by its claim's text; ``None`` where there is none to be read. Any rank.

    The lock is not tried: whoever tries it holds it for a moment, and a save that begins then would be refused.
    """
    path = local_path(root / (OWNER + name))
    host, pid, _ = ("", 0, None) if path is None else _owner(path)
    if not host:
        return None
    return Writer(host, pid, process_exists(pid) if host == socket.gethostname() else None)


@contextlib.contextmanager
def publishing(root: Path) -> Iterator[None]:
    """Keep others from publishing in the same root meanwhile; one rank calls. It waits for them for some minutes."""
    deadline = time.monotonic() + _PUBLISHING_SECONDS
    while True:
        try:
            mine = claim(root, "publication")
            break
        except CheckpointBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)
    try:
        yield
    finally:
        mine.release()


def _locked(handle: int, path: Path, name: str) -> bool:
    """Lock the file; false where it has lost its name meanwhile."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        host, pid, _ = _owner(path)
        # Without locks the file itself is the claim, of a process that can be looked for on this machine only.
        is_free = error.errno in _NO_LOCKS and (not host or (host == socket.gethostname() and not process_exists(pid)))
        if is_free:
            return True
        if error.errno not in _NO_LOCKS and error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise CheckpointBusyError(
            f"{name} is being saved by process {pid or '?'} on {host or 'an unknown host'}",
            path=path,
            hint="Give each run a checkpoint_dir of its own, or wait until that process has saved or ended. If it no "
            "longer exists, remove this file.",
        ) from error
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> tuple[str, int, str | None]:
    with using(LOCAL):
        data = read_small_file(path, _LIMIT)
    parts = [] if data is None else data.decode(errors="replace").split()
    if len(parts) < 2 or not parts[1].isdecimal():
        return "", 0, None
    return parts[0], int(parts[1]), parts[2] if len(parts) > 2 else ""
