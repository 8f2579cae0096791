"""A storage that records, refuses and stops, and checkpoints to try things on."""

from __future__ import annotations

import json
from pathlib import Path

from shardwise.disk.storage import Buffer, LocalStorage, Storage, using
from shardwise.lifecycle import LATEST, Start, checkpoint_name, put_in_place, reserve, set_pointer, settle


class Crash(BaseException):
    """The process is gone: nothing may catch this and carry on."""


class FaultyStorage(LocalStorage):
    """The real file system, until change number ``at`` (from 0) of a name raises ``error`` instead of happening."""

    def __init__(self, at: int | None = None, error: BaseException | None = None, links: bool = True) -> None:
        self.calls: list[tuple[str, str]] = []
        self.at = at
        self.error = error or Crash()
        self.links = links

    def _step(self, operation: str, path: Path) -> None:
        self.calls.append((operation, path.name))
        if self.at is not None and len(self.calls) > self.at:
            raise self.error

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        self._step("make_directory", path)
        super().make_directory(path, new=new)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._step("create", path)
        super().create(path, size, head)

    def symlink(self, target: str, path: Path) -> None:
        if not self.links:
            raise PermissionError(1, "Operation not permitted")
        self._step("symlink", path)
        super().symlink(target, path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        self._step("rename_new", target)
        super().rename_new(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        return False

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory", path)
        super().sync_directory(path)

    def remove_tree(self, path: Path) -> None:
        """Stops in the middle: what is deleted first is the manifest's neighbour, so half a tree stays."""
        if path.is_dir() and not path.is_symlink():
            for child in sorted(path.iterdir()):
                self.remove_tree(child)
        self._step("remove_tree", path)
        super().remove_tree(path)


def fill(directory: Path, metrics: dict[str, float] | None = None, payload: bytes = b"weights") -> None:
    """Make ``directory`` look like a finished save; the manifest comes last."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "data.bin").write_bytes(payload)
    if metrics is not None:
        (directory / "losses.json").write_text(json.dumps(metrics))
    (directory / "manifest.json").write_text("{}")


def made(root: Path, epoch: int, step: int, metrics: dict[str, float] | None = None) -> str:
    """A published checkpoint made by hand."""
    name = checkpoint_name(epoch, step)
    fill(root / name, metrics, f"{epoch} {step}".encode())
    return name


def publish(temp: Path, final: Path, start: Start | None = None) -> None:
    """As a commit does."""
    put_in_place(temp, final, start)
    settle(temp, final)


def save(root: Path, epoch: int, step: int, storage: Storage, metrics: dict[str, float] | None = None) -> str:
    """One whole save through the lifecycle, without retention."""
    name = checkpoint_name(epoch, step)
    with using(storage):
        temp = reserve(root, name)
    fill_existing(temp, metrics, f"{epoch} {step}".encode())
    with using(storage):
        publish(temp, root / name)
        set_pointer(root, LATEST, name)
    return name


def fill_existing(temp: Path, metrics: dict[str, float] | None, payload: bytes) -> None:
    (temp / "model").mkdir()
    (temp / "model" / "data.bin").write_bytes(payload)
    if metrics is not None:
        (temp / "losses.json").write_text(json.dumps(metrics))
    (temp / "manifest.json").write_text("{}")


def is_whole(directory: Path) -> bool:
    """Whether nothing of what `save` or `made` wrote is missing."""
    return (directory / "manifest.json").is_file() and (directory / "model" / "data.bin").is_file()
