"""Lists the checkpoints of a root: what there is, what leads to it, and whether it may be resumed from.

Names, sizes and the small files beside the tensors are read; neither torch nor a tensor is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shardwise.disk.guarded import MANIFEST_NAME
from shardwise.disk.names import exists, is_directory, is_there, names_in, real_path, status, walk
from shardwise.disk.storage import Storage, current, storage_errors, using
from shardwise.engine.verify import check_files
from shardwise.errors import CheckpointNotFoundError, ManifestError, MisuseError, StorageError
from shardwise.format.manifest import read_file_records
from shardwise.lifecycle import LATEST, CheckpointInfo, Writer, parse_checkpoint_name, pointers, writer_of
from shardwise.lifecycle import list_checkpoints as checkpoints_by_name
from shardwise.lifecycle.names import is_temporary, leftover_of
from shardwise.lifecycle.resolve import publication_begun
from shardwise.ops.targets import nothing_at

__all__ = ["ListedCheckpoint", "State", "list_checkpoints"]

#: ``published``: it may be resumed from. ``damaged``: published, and its manifest or a file's size is not what it was.
#: ``being written``: a live process of this machine saves it. ``claimed``: a process of another machine had begun to;
#: from here nobody can tell whether it is alive. ``interrupted``: what a save left that nobody goes on with.
#: ``being deleted``: what a deletion has begun with.
State = Literal["published", "damaged", "being written", "claimed", "interrupted", "being deleted"]


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """A checkpoint of a root, or what there is of one.

    Attributes:
        name: ``epoch_E_step_S``, which is the name that an unfinished one would get.
        path: Its directory.
        epoch: E.
        step: S.
        state: See `State`; by names, the manifest's list of files and the sizes of these, no digest.
        verifiable: It has a manifest. A published one without (another tool's) cannot be checked.
        saved_at: When its manifest was written, or its directory changed last, in seconds since 1970; ``None`` where
            the storage does not say.
        nbytes: Bytes of its files, by the manifest where there is one.
        metrics: Finite numbers of its ``losses.json``.
        pointers: Names that lead to it: ``LATEST``, ``LOWEST_VAL``, others.
        problems: What is wrong with it, one sentence each.
        writer: Of an unfinished one: the process that has claimed it.
    """

    name: str
    path: Path
    epoch: int
    step: int
    state: State
    verifiable: bool = False
    saved_at: float | None = None
    nbytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    pointers: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    writer: Writer | None = None


def real_root(given: Path) -> Path:
    """Where a root is when every link in it is followed; what cannot be one is refused."""
    place = real_path(given)
    if not exists(place):
        raise nothing_at(given)
    if not is_directory(place):
        raise MisuseError(
            "this is no directory of checkpoints", path=given, hint="`shardwise inspect` shows what is in a file."
        )
    if is_there(place / MANIFEST_NAME):
        shown = "" if leftover_of(place.name) else "`shardwise inspect` shows it; "
        raise MisuseError(
            "this is a checkpoint and no directory of checkpoints",
            path=place,
            hint=f"{shown}`shardwise ls {place.parent}` lists those beside it.",
        )
    return place


def list_checkpoints(root: str | os.PathLike[str], *, storage: Storage | None = None) -> tuple[ListedCheckpoint, ...]:
    """List the checkpoints of a root, what is being written and what was left, by epoch and step.

    Args:
        root: The directory of the checkpoints.
        storage: Where it is; the mounted file systems by default.

    Returns:
        Empty for a directory without checkpoints.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        MisuseError: It is a checkpoint itself, or no directory.
        StorageError: It cannot be read.
    """
    given = Path(root).absolute()
    with using(storage or current()), storage_errors(given):
        place = real_root(given)
        leading = pointers(place)
        begun = publication_begun(place)
        if begun is not None:
            leading[LATEST] = begun
        found = [_published(info, leading) for info in checkpoints_by_name(place)]
        for entry in names_in(place):
            name = leftover_of(entry)
            numbers = None if name is None else parse_checkpoint_name(name)
            if name is not None and numbers is not None and is_directory(place / entry, follows=False):
                found.append(_unfinished(place, entry, name, numbers))
    return tuple(sorted(found, key=lambda each: (each.epoch, each.step, each.path.name)))


def _published(info: CheckpointInfo, leading: Mapping[str, str]) -> ListedCheckpoint:
    named = tuple(sorted(pointer for pointer, target in leading.items() if target == info.name))
    state: State = "published"
    nbytes, problems = _compared(info.path) if info.verifiable else (_bytes_below(info.path), [])
    if not info.complete:
        state, problems = "interrupted", ["it has neither a manifest nor a model, and nothing resumes from it"]
    elif problems:
        state = "damaged"
    return ListedCheckpoint(
        info.name,
        info.path,
        info.epoch,
        info.step,
        state,
        info.verifiable,
        _changed_at(info.path / MANIFEST_NAME if info.verifiable else info.path),
        nbytes,
        dict(info.metrics),
        named,
        tuple(problems),
    )


def _compared(directory: Path) -> tuple[int, list[str]]:
    """Bytes by the manifest, and what differs from it in existence, kind and size."""
    try:
        records = read_file_records(directory / MANIFEST_NAME)
    except ManifestError as error:
        return _bytes_below(directory), [error.message]
    return sum(record.size for record in records), [damage.describe() for damage in check_files(directory, records, {})]


def _unfinished(root: Path, entry: str, name: str, numbers: tuple[int, int]) -> ListedCheckpoint:
    path = root / entry
    writer = writer_of(root, name)
    state: State = "interrupted" if is_temporary(entry) else "being deleted"
    if is_temporary(entry) and writer is not None and writer.alive is not False:
        state = "being written" if writer.alive else "claimed"
    return ListedCheckpoint(name, path, *numbers, state, False, _changed_at(path), _bytes_below(path), writer=writer)


def _bytes_below(directory: Path) -> int:
    """Bytes of the files below a directory; of one that is written or deleted meanwhile, those seen."""
    total = 0
    with suppress(CheckpointNotFoundError, StorageError):  # a directory went while it was looked at
        for where, names in walk(directory):
            found = (status(where / name) for name in names)
            total += sum(each.size for each in found if each is not None)
    return total


def _changed_at(path: Path) -> float | None:
    found = status(path)
    return None if found is None else found.changed
