"""Writes tensors with all cores; of an export beside its directory, which is renamed into place.

Every tensor's place is known beforehand, so that several are written at a time: each by one thread, block by block, at
its offset.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from shardwise.disk.crc import crc32c
from shardwise.disk.names import exists, is_there, walk
from shardwise.disk.sequential import opened, write_file
from shardwise.disk.storage import current, located, storage_errors
from shardwise.engine.records import ComponentRecord, layout_record, write_manifest
from shardwise.engine.writer import FileSet
from shardwise.errors import CheckpointExistsError, IncompleteTensorError, ShardwiseError
from shardwise.format.manifest import AliasRecord, FileRecord, TensorRecord
from shardwise.format.strict_json import JsonValue
from shardwise.lifecycle import temporary_name
from shardwise.lifecycle.ownership import claim
from shardwise.ops.targets import refuse_inside
from shardwise.ops.verify import Counted, Progress
from shardwise.plan.layout import FileLayout, Layout

#: A tensor's name, and its bytes as they are in the file.
Piece = tuple[str, Iterable[memoryview]]
#: Tensors that one thread makes and writes, one after the other; called when the thread has come to them.
Batch = Callable[[], Iterator[Piece]]

#: Each has a few blocks in memory.
_MOST_THREADS = 8
#: Smaller tensors are written several at a time by one thread.
_BATCH_BYTES = 8 * 2**20


def batches_of(layout: Layout, blocks: Callable[[str], Iterable[memoryview]], names: Iterable[str]) -> list[Batch]:
    """Tensors that are made independently of each other, in the order of the files; any thread gets ``blocks``."""
    wanted = set(names)
    found: list[list[str]] = []
    for file in layout.files:
        size = _BATCH_BYTES + 1  # no batch has tensors of two files
        for spec, _, _ in file.entries:
            if spec.name in wanted:
                size += spec.nbytes
                if size > _BATCH_BYTES:
                    found.append([])
                    size = spec.nbytes
                found[-1].append(spec.name)
    return [_batch(own, blocks) for own in found]


def _batch(names: Sequence[str], blocks: Callable[[str], Iterable[memoryview]]) -> Batch:
    return lambda: ((name, blocks(name)) for name in names)


def publish(
    layout: Layout,
    batches: Sequence[Batch],
    target: Path,
    progress: Progress | None,
    *,
    plain: Callable[[Sequence[TensorRecord]], Mapping[str, bytes]],
    aliases: Mapping[str, str],
    notes: Mapping[str, JsonValue],
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Write an export beside ``target`` and rename it into place; a failure leaves no files.

    What a process that was killed has written of the same export is not written again. Nothing is believed of it: each
    block is read and compared with the one that belongs there.

    ``plain`` gives the files beside the tensors (relative path -> content) once the records of these are known;
    ``aliases`` are other names of tensors, ``notes`` what the manifest says of where it comes from. ``settle`` checks
    what was read, before anything says that all is written.
    """
    with written_aside(target, resumes=True) as aside:
        kept = _kept(layout, aside)
        files_ahead = [file for number, file in enumerate(layout.files) if number not in kept]
        current().check_space(aside, sum(file.size for file in files_ahead))
        advance = Counted(layout.tensor_bytes, progress).add
        crcs = TensorWriter(layout, aside, advance, kept).write(batches)
        settle()
        record = layout_record(layout, crcs)
        names = tuple(AliasRecord("model", name, own) for name, own in aliases.items())
        record += ComponentRecord(write_plain(plain(record.tensors), aside), aliases=names)
        write_manifest(current(), aside, record, dict(notes))


def _kept(layout: Layout, aside: Path) -> frozenset[int]:
    """Numbers of the files that an interrupted run began, with this very header; all else is removed."""
    files = {file.name: number for number, file in enumerate(layout.files)}
    kept = set()
    for name, kind in current().entries(aside):
        number = files.get(name)
        if kind == "file" and number is not None and _begins_with(aside / name, layout.files[number]):
            kept.add(number)
        else:
            current().remove_tree(aside / name)
    return frozenset(kept)


def _begins_with(path: Path, file: FileLayout) -> bool:
    with opened(current(), path) as handle:
        return current().status_of(handle).size == file.size and _has(handle, file.header, 0)


def _has(handle: int, data: bytes | memoryview, offset: int) -> bool:
    """Whether a file has these bytes at an offset."""
    there = bytearray(len(data))
    return current().read(handle, memoryview(there), offset) == len(data) and there.startswith(data)


def write_plain(contents: Mapping[str, bytes], directory: Path) -> tuple[FileRecord, ...]:
    """Write small files, by their paths in a directory, durably."""
    for name, content in contents.items():
        current().make_directory((directory / name).parent)
        write_file(current(), directory / name, content)
    return tuple(FileRecord.plain(name, content) for name, content in contents.items())


class TensorWriter:
    """Writes the tensor files of a layout into an existing directory.

    ``advance`` is called with the bytes of each tensor that was written, by one thread at a time. Of the files whose
    numbers are in ``kept``, only what they do not have yet is written.
    """

    def __init__(
        self, layout: Layout, directory: Path, advance: Callable[[int], None], kept: frozenset[int] = frozenset()
    ) -> None:
        self._layout, self._kept, self._advance = layout, kept, advance
        self._paths = [directory / file.name for file in layout.files]
        self._files = FileSet(current(), self._paths)
        self._entries = {entry.spec.name: entry for file in layout.files for entry in file.entries}
        self._crcs: dict[str, int] = {}
        self._lock, self._failed = threading.Lock(), threading.Event()

    def write(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Write all tensors, durably; returns the CRC-32C of each. Errors name the file and the tensor."""
        try:
            for number, file in enumerate(self._layout.files):
                if number not in self._kept:
                    current().create(self._paths[number], file.size, file.header)
                self._files.handle(number)
            threads = min(_MOST_THREADS, os.cpu_count() or 1)
            with ThreadPoolExecutor(threads, thread_name_prefix="shardwise-export") as pool:
                futures = [pool.submit(contextvars.copy_context().run, self._batch, batch) for batch in batches]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self._failed.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            self._files.sync()
        finally:
            self._files.close()
        return self._crcs

    def _batch(self, batch: Batch) -> None:
        for name, blocks in batch():
            self._tensor(name, blocks)

    def _tensor(self, name: str, blocks: Iterable[memoryview]) -> None:
        file, offset = self._layout.places[name]
        handle, crc, nbytes = self._files.handle(file), 0, 0
        try:
            for block in blocks:
                if self._failed.is_set():
                    return
                at = offset + nbytes
                if file not in self._kept or not _has(handle, block, at):
                    current().write(handle, block, at)
                crc = crc32c(block, crc)
                nbytes += len(block)
        except ShardwiseError as error:
            raise located(error, self._paths[file], name) from None
        spec, start, end = self._entries[name]
        if nbytes != end - start:
            raise IncompleteTensorError(
                f"{nbytes} bytes were made of the {end - start} that it has",
                path=self._paths[file],
                tensor=name,
                hint="The source may have changed while it was read: run the command again, and report it if it stays.",
            )
        with self._lock:
            self._crcs[name] = crc
            self._advance(spec.nbytes)


# --- a directory that appears as a whole -----------------------------------------------------------------------------


def refuse_existing(target: Path) -> None:
    """Raise `CheckpointExistsError` where something is at the place already, and see `refuse_inside`."""
    refuse_inside(target)
    if is_there(target):
        raise _existing(target)


def _existing(target: Path) -> CheckpointExistsError:
    return CheckpointExistsError(
        "something is already there, and is never overwritten",
        path=target,
        hint="Use it, delete it, or choose another place.",
    )


@contextmanager
def written_aside(target: Path, *, resumes: bool = False) -> Iterator[Path]:
    """The directory to write into, which becomes ``target`` at the end; a failure leaves nothing.

    Files in it have to be durable by then. It is empty, or with ``resumes`` has what a process that was killed left.
    """
    refuse_existing(target)
    storage = current()
    aside = target.with_name(temporary_name(target.name))
    made, directory = [], target.parent  # the directories that have to be made, the innermost first
    while not exists(directory):
        made.append(directory)
        directory = directory.parent
    try:
        storage.make_directory(target.parent)
        mine = claim(target.parent, target.name)
        try:
            with storage_errors(target):
                there = storage.status(aside, follows=False)
                if not (resumes and there is not None and there.kind == "directory"):
                    storage.remove_tree(aside)
                storage.make_directory(aside)
                yield aside
                for each, _ in walk(aside):
                    storage.sync_directory(each)
                try:
                    storage.rename_new(aside, target)
                except FileExistsError as error:  # it was not there when this began
                    raise _existing(target) from error
                storage.sync_directory(target.parent)
        except BaseException as error:
            with storage_errors(target):
                storage.remove_tree(aside)
            if isinstance(error, ShardwiseError) and error.path is not None and Path(error.path).is_relative_to(aside):
                error.path = str(target / Path(error.path).relative_to(aside))  # what is beside it is gone
            raise
        finally:
            mine.release()
    except BaseException:
        with storage_errors(target):
            for each in made:
                storage.remove_empty(each)
        raise
