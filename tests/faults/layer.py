"""A storage that notes every operation of a save, and can stop, refuse or delay one of them.

It writes to a `Tape`, which numbers what changes the disk. A tape can keep a log: one JSON line for each change,
with its bytes, from which `crash_states` rebuilds what a crash at any point would have left.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import StorageError

#: Which operation of the layer is of which kind, for choosing where to inject.
KINDS = ("mkdir", "create", "write", "sync", "sync_dir", "rename", "symlink", "remove", "space")


@dataclass
class Fault:
    """What happens instead of operation number ``at`` (from 0), or of the first of a kind.

    Attributes:
        action: ``kill`` (SIGKILL of this process), ``refuse`` (``code``), ``sleep`` (``seconds``, then carry on).
        at: Number of the operation.
        kind: Sort of operation; any if empty.
        code: Error number for ``refuse``.
        seconds: For ``sleep``.
        every: Happen at every operation from ``at`` on, not once.
    """

    action: str
    at: int = 0
    kind: str = ""
    code: int = 0
    seconds: float = 0.0
    every: bool = False


@dataclass
class Tape:
    """Counts the operations that change the disk, in the order in which this process does them.

    Attributes:
        root: The checkpoint root; logged paths are relative to it.
        fault: What to do at one of them.
        log: File that takes the records.
        count: Operations so far (of the fault's kind, where it names one).
        done: Kind and path of every operation so far.
        struck: The fault has happened.
    """

    root: Path
    fault: Fault | None = None
    log: Path | None = None
    count: int = 0
    done: list[tuple[str, str]] = field(default_factory=list)
    struck: str = ""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self, kind: str, path: Path, action: Callable[[], None], **details: object) -> None:
        """Do one operation, or what the fault says; its record is written once it has been done."""
        with self._lock:
            self._look_around()
            self._maybe_fault(kind, path)
            expanded = _expanded(kind, path) if self.log else []
            action()
            self.done.append((kind, str(path)))
            if self.log is not None:
                for each in expanded or [{"op": kind, "path": self._relative(path), **details}]:
                    self._write({**each, "path": self._relative(Path(str(each["path"])))} if expanded else each)
                self._note(path)

    def _maybe_fault(self, kind: str, path: Path) -> None:
        fault = self.fault
        if fault is None or (fault.kind and fault.kind != kind):
            return
        number, self.count = self.count, self.count + 1
        if number != fault.at and not (fault.every and number > fault.at):
            return
        self.struck = f"{kind} {path.name}"
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "sleep":
            time.sleep(fault.seconds)
        else:
            raise OSError(fault.code, os.strerror(fault.code), str(path))

    # --- the log ----------------------------------------------------------------------------------------------------

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else "/" + path.name

    def _write(self, record: dict[str, object]) -> None:
        assert self.log is not None
        record["at"] = time.monotonic_ns()
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _note(self, path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            info = path.stat()
            self._seen[self._relative(path)] = (info.st_size, info.st_mtime_ns)

    def _look_around(self) -> None:
        """Record files that were written past the layer (an addon's metadata, a tokenizer), since the last look."""
        if self.log is None:
            return
        for top in sorted(self.root.glob(".saving-*")):
            for where, directories, names in os.walk(top):
                for name in sorted(directories):
                    relative = self._relative(Path(where) / name)
                    if relative not in self._seen:
                        self._seen[relative] = (0, 0)
                        self._write({"op": "mkdir", "path": relative})
                for name in sorted(names):
                    path = Path(where) / name
                    info = path.stat()
                    mine = self._seen.get(self._relative(path))
                    if mine != (info.st_size, info.st_mtime_ns) and path.suffix != ".safetensors" and mine is None:
                        self._note(path)
                        self._write({"op": "external", "path": self._relative(path), "data": path.read_bytes().hex()})


def _expanded(kind: str, path: Path) -> list[dict[str, object]]:
    """A removed tree as its single deletions, what is deepest first."""
    if kind != "remove" or path.is_symlink() or not path.is_dir():
        return []
    found: list[dict[str, object]] = []
    for where, directories, names in os.walk(path, topdown=False):
        found += [{"op": "remove", "path": str(Path(where) / name)} for name in sorted([*names, *directories])]
    return [*found, {"op": "remove", "path": str(path)}]


class TapedStorage(LocalStorage):
    """`Storage` on the real file system, through a tape."""

    def __init__(self, tape: Tape, links: bool = True) -> None:
        self.tape = tape
        self.real = LocalStorage()
        self.links = links
        self._paths: dict[int, Path] = {}

    def _run(self, kind: str, path: Path, action: Callable[[], None], **details: object) -> None:
        try:
            self.tape.run(kind, path, action, **details)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.from_os(error) from error

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        missing = [each for each in [path, *path.parents] if not each.exists()]
        for each in reversed(missing):
            self._run("mkdir", each, lambda each=each: self.real.make_directory(each, new=new))  # type: ignore[misc]

    def check_space(self, path: Path, nbytes: int) -> None:
        self._run("space", path, lambda: self.real.check_space(path, nbytes))

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._run("create", path, lambda: self.real.create(path, size, head), size=size, data=bytes(head).hex())

    def open(self, path: Path, *, writable: bool) -> int:
        handle = self.real.open(path, writable=writable)
        self._paths[handle] = path
        return handle

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        text = bytes(data).hex() if self.tape.log else ""
        path = self._paths[handle]
        self._run("write", path, lambda: self.real.write(handle, data, offset), offset=offset, data=text)

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        return self.real.read(handle, into, offset)

    def sync(self, handle: int) -> None:
        self._run("sync", self._paths[handle], lambda: self.real.sync(handle))

    def close(self, handle: int) -> None:
        self._paths.pop(handle)
        self.real.close(handle)

    def sync_directory(self, path: Path) -> None:
        self._run("sync_dir", path, lambda: self.real.sync_directory(path))

    def symlink(self, target: str, path: Path) -> None:
        if not self.links:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        self.tape.run("symlink", path, lambda: self.real.symlink(target, path), target=target)

    def rename(self, source: Path, target: Path) -> None:
        self._rename(source, target, self.real.rename)

    def rename_new(self, source: Path, target: Path) -> None:
        self._rename(source, target, self.real.rename_new)

    def _rename(self, source: Path, target: Path, action: Callable[[Path, Path], None]) -> None:
        self.tape.run("rename", target, lambda: action(source, target), source=self.tape._relative(source))

    def exchange(self, one: Path, other: Path) -> bool:
        return False

    def remove_file(self, path: Path) -> None:
        if os.path.lexists(path):
            self.tape.run("remove", path, lambda: self.real.remove_file(path))

    def remove_tree(self, path: Path) -> None:
        if os.path.lexists(path):
            self.tape.run("remove", path, lambda: self.real.remove_tree(path))
