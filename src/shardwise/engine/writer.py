"""Writes runs of bytes at their final offsets, with their digests.

The digest of a tensor does not depend on who wrote which run of it: a run's CRC-32C, shifted by the bytes that follow
it in the tensor, is its contribution, and the exclusive or of all contributions is the CRC-32C of the tensor. So ranks
exchange one number for each tensor, not one for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.disk.crc import crc32c, shift
from shardwise.disk.storage import Storage, located, locating
from shardwise.dtypes import torch_dtype
from shardwise.errors import ShardwiseError
from shardwise.plan.deferred import deferred
from shardwise.plan.schedule import WriteRun
from shardwise.sources.tensor_bytes import BLOCK_BYTES, blocks, byte_blocks, bytes_in_place, cut_bytes
from shardwise.timing import Shares, phase

#: A run larger than this is cut, so that several threads can share it.
_LARGEST_RUN_BYTES = 64 * 2**20

#: Continues a digest: takes a block and the digest of what stands before it.
Digest = Callable[[memoryview, int], int]


@dataclass
class Digests:
    """Contributions to the tensors' digests, by tensor name: ``(exclusive or of shifted CRCs, bytes seen)``.

    ``advance`` is called with the bytes of each run that has been written.
    """

    crcs: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    advance: Callable[[int], object] | None = None

    def add(self, name: str, share: int, nbytes: int) -> None:
        """Take in what ``nbytes`` bytes of a tensor contribute."""
        self.crcs[name] = self.crcs.get(name, 0) ^ share
        self.counts[name] = self.counts.get(name, 0) + nbytes

    def take(self, run: WriteRun, crc: int) -> None:
        """Take in a run that has been written, and its digest."""
        behind = run.spec.nbytes - run.start - run.nbytes
        self.add(run.spec.name, shift(crc, behind), run.nbytes)
        if self.advance is not None:
            self.advance(run.nbytes)


class FileSet:
    """Open files of one export, by index; opened when first needed, synced and closed together."""

    def __init__(self, storage: Storage, paths: Sequence[Path]) -> None:
        self._storage = storage
        self.paths = paths
        self._handles: dict[int, int] = {}

    def handle(self, file: int) -> int:
        """The handle of file ``file``, open for writing."""
        if file not in self._handles:
            self._handles[file] = self._storage.open(self.paths[file], writable=True)
        return self._handles[file]

    @phase("sync")
    def sync(self) -> None:
        """Make durable what was written through this object."""
        for file, handle in self._handles.items():
            with locating(self.paths[file]):
                self._storage.sync(handle)

    def close(self) -> None:
        """Close every handle, even if one fails; the first failure is raised."""
        failure: ShardwiseError | None = None
        while self._handles:
            file, handle = self._handles.popitem()
            try:
                self._storage.close(handle)
            except ShardwiseError as error:
                failure = failure or located(error, self.paths[file])
        if failure is not None:
            raise failure


def write_run(run: WriteRun, files: FileSet, storage: Storage, digest: Digest = crc32c) -> int:
    """Write one run; returns its digest."""
    dtype, offset, crc = torch_dtype(run.spec.dtype), run.offset, 0
    memory = bytes_in_place(run.data, dtype)
    handle = files.handle(run.file)
    try:
        # Writing fetches the block into the core's cache, where the digest then finds it; the other way round was
        # slower (docs/benchmarks.md).
        if memory is not None and 0 < len(memory) <= BLOCK_BYTES:
            storage.write(handle, memory, offset)
            return digest(memory, 0)
        for block in byte_blocks(run.data, dtype) if memory is None else cut_bytes(memory):
            storage.write(handle, block, offset)
            crc = digest(block, crc)
            offset += len(block)
    except ShardwiseError as error:
        raise located(error, files.paths[run.file], run.spec.name) from None
    return crc


def write_all(
    runs: Iterable[WriteRun], files: FileSet, storage: Storage, threads: int, digests: Digests, digest: Digest = crc32c
) -> None:
    """Write runs, in order on each thread, and add their digests.

    Large runs are cut, so that several threads share them; opening and adding digests stay on the calling thread.
    """
    pieces = [piece for run in runs for piece in _pieces(run)]
    for file in dict.fromkeys([piece.file for piece in pieces]):
        files.handle(file)
    made = [piece for piece in pieces if deferred(piece.data) is not None]
    if threads > 1 and made:
        # Tensors that modules make are made in order, on one thread: one module's at a time.
        pieces = [piece for piece in pieces if deferred(piece.data) is None]
        write_all(made, files, storage, 1, digests, digest)
    if threads <= 1 or len(pieces) <= 1:
        for piece in pieces:
            digests.take(piece, write_run(piece, files, storage, digest))
        return
    with Shares("write").closing() as shares, ThreadPoolExecutor(threads, thread_name_prefix="shardwise-write") as pool:
        write = shares.of(write_run)
        futures = [pool.submit(write, piece, files, storage, digest) for piece in pieces]
        try:
            for piece, future in zip(pieces, futures, strict=True):
                digests.take(piece, future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _pieces(run: WriteRun) -> Iterable[WriteRun]:
    if run.nbytes <= _LARGEST_RUN_BYTES:
        yield run
        return
    start = 0
    for block in blocks(run.data, _LARGEST_RUN_BYTES // run.spec.itemsize):
        yield WriteRun(run.file, run.offset + start, run.spec, run.start + start, block)
        start += block.numel() * run.spec.itemsize


def totals(names: Sequence[str], digests: Digests) -> tuple[list[int], list[int]]:
    """The contributions as two lists in the order of ``names``, for folding over ranks."""
    return [digests.crcs.get(n, 0) for n in names], [digests.counts.get(n, 0) for n in names]
