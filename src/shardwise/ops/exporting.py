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
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.crc import crc32c
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage, located, locating
from shardwise.engine.records import ComponentRecord, layout_record, write_manifest
from shardwise.engine.writer import FileSet
from shardwise.errors import IncompleteTensorError, ShardwiseError
from shardwise.format.manifest import AliasRecord, FileRecord, TensorRecord
from shardwise.format.strict_json import JsonValue
from shardwise.ops.aside import written_aside
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


@dataclass(frozen=True, slots=True)
class Export:
    """An export whose bytes are not written yet.

    Attributes:
        batches: The layout's tensors, each once.
        plain: Relative path -> content of the files beside them, once the tensors' records are known.
        settle: What is checked when all tensors are written, before anything says that they are.
        aliases: Other names of tensors.
        notes: What its manifest says of where it comes from.
    """

    layout: Layout
    batches: Sequence[Batch]
    plain: Callable[[Sequence[TensorRecord]], Mapping[str, bytes]]
    settle: Callable[[], None]
    aliases: tuple[AliasRecord, ...]
    notes: Mapping[str, JsonValue]


def publish(export: Export, target: Path, storage: Storage, progress: Progress | None) -> None:
    """Write an export beside ``target`` and rename it into place; a failure leaves no files.

    What a process that was killed has written of the same export is not written again. Nothing is believed of it: each
    block is read and compared with the one that belongs there.
    """
    with written_aside(target, storage, resumes=True) as aside:
        _write(export, aside, _kept(export.layout, aside, storage), storage, progress)


def _kept(layout: Layout, aside: Path, storage: Storage) -> frozenset[int]:
    """Numbers of the files that an interrupted run began, with this very header; all else is removed."""
    files = {file.name: number for number, file in enumerate(layout.files)}
    kept = set()
    for name, kind in storage.entries(aside):
        number = files.get(name)
        if kind == "file" and number is not None and _begins_with(aside / name, layout.files[number], storage):
            kept.add(number)
        else:
            storage.remove_tree(aside / name)
    return frozenset(kept)


def _begins_with(path: Path, file: FileLayout, storage: Storage) -> bool:
    handle = storage.open(path, writable=False)
    with locating(path):
        try:
            return storage.status_of(handle).size == file.size and _has(storage, handle, file.header, 0)
        finally:
            storage.close(handle)


def _has(storage: Storage, handle: int, data: bytes | memoryview, offset: int) -> bool:
    """Whether a file has these bytes at an offset."""
    there = bytearray(len(data))
    return storage.read(handle, memoryview(there), offset) == len(data) and there.startswith(data)


def _write(export: Export, aside: Path, kept: frozenset[int], storage: Storage, progress: Progress | None) -> None:
    """Write all files into the existing directory, the manifest last."""
    files_ahead = [file for number, file in enumerate(export.layout.files) if number not in kept]
    storage.check_space(aside, sum(file.size for file in files_ahead))
    advance = Counted(export.layout.tensor_bytes, progress).add
    crcs = TensorWriter(export.layout, aside, storage, advance, kept).write(export.batches)
    export.settle()
    record = layout_record(export.layout, crcs)
    record += ComponentRecord(write_plain(export.plain(record.tensors), aside, storage), aliases=export.aliases)
    write_manifest(storage, aside, record, dict(export.notes))


def write_plain(contents: Mapping[str, bytes], directory: Path, storage: Storage) -> tuple[FileRecord, ...]:
    """Write small files, by their paths in a directory, durably."""
    for name, content in contents.items():
        storage.make_directory((directory / name).parent)
        write_file(storage, directory / name, content)
    return tuple(FileRecord.plain(name, content) for name, content in contents.items())


class TensorWriter:
    """Writes the tensor files of a layout into an existing directory.

    ``advance`` is called with the bytes of each tensor that was written, by one thread at a time. Of the files whose
    numbers are in ``kept``, only what they do not have yet is written.
    """

    def __init__(
        self,
        layout: Layout,
        directory: Path,
        storage: Storage,
        advance: Callable[[int], None],
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self._layout, self._kept, self._storage, self._advance = layout, kept, storage, advance
        self._paths = [directory / file.name for file in layout.files]
        self._files = FileSet(storage, self._paths)
        self._entries = {entry.spec.name: entry for file in layout.files for entry in file.entries}
        self._crcs: dict[str, int] = {}
        self._lock, self._failed = threading.Lock(), threading.Event()

    def write(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Write all tensors, durably; returns the CRC-32C of each. Errors name the file and the tensor."""
        try:
            for number, file in enumerate(self._layout.files):
                if number not in self._kept:
                    self._storage.create(self._paths[number], file.size, file.header)
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
                if file not in self._kept or not _has(self._storage, handle, block, at):
                    self._storage.write(handle, block, at)
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
