"""Reading byte ranges into place.

Where a range is contiguous in the file and in a CPU parameter of the same dtype, the file system copies straight into
the parameter's memory. So do the rows of a column shard, many at a time: small gaps between them are read too and
dropped. Other memory (strided within a row, another device, another dtype) is filled through a small buffer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.disk.storage import ReadsRows, Storage, located, locating
from shardwise.dtypes import torch_dtype
from shardwise.errors import IntegrityError, ShardwiseError
from shardwise.geometry import Box
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.reads import AnyRead, PackedRead, Read, SourceTensor, plan_reads
from shardwise.plan.views import refine_range
from shardwise.sources.packed_items import load_item
from shardwise.sources.tensor_bytes import as_bytes, blocks, is_as_stored

#: Bytes of the buffer of each reading thread.
BUFFER_BYTES = 4 * 2**20
#: Gaps up to this are read too: copying them from the page cache takes as long as another request.
SMALL_GAP_BYTES = 16 * 1024


#: Bytes of a block of `tensor_blocks`.
STREAM_BYTES = 8 * 2**20


@dataclass
class ReadCounts:
    """The counts of a load: bytes requested, bytes read with the gaps between rows, and bytes got from replicas."""

    wanted: int = 0
    read: int = 0
    passed: int = 0


class _Buffers(threading.local):
    """One buffer for each thread, made when first needed."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def get(self, nbytes: int) -> torch.Tensor:
        if self.memory.numel() < nbytes:
            self.memory = torch.empty(nbytes, dtype=torch.uint8)
        return self.memory[:nbytes]


@dataclass(frozen=True, slots=True, eq=False)
class _Woven:
    """Rows of several destinations, each row of one between two of the others: a packed placement along columns."""

    reads: tuple[Read, ...]


class Reader:
    """Executes reads from a list of files, ``threads`` at once. One object for one load; `close` releases the files.

    ``observe`` is called with every byte range read, ``(file, offset, length)``, for counting.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[Path],
        threads: int = 1,
        observe: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self._storage = storage
        self._reads_rows = storage if isinstance(storage, ReadsRows) else None
        self._files = files
        self._threads = threads
        self._observe = observe
        self._handles: dict[int, int] = {}
        self._buffers = _Buffers()
        self._lock = threading.Lock()
        self.counts = ReadCounts()

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            file, handle = self._handles.popitem()
            with locating(self._files[file]):
                self._storage.close(handle)

    def execute(self, reads: Sequence[AnyRead]) -> None:
        """Carry out all reads, in file order on each thread.

        Raises:
            IntegrityError: A file ends before a range that its header promises.
        """
        ordered = list(_woven(sorted(reads, key=_position)))
        for read in ordered:
            self._handle(_file(read))
        if self._threads <= 1 or len(ordered) <= 1:
            for read in ordered:
                self._one(read)
            return
        pieces = [piece for read in ordered for piece in _split(read)]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="shardwise-read") as pool:
            futures = [pool.submit(self._one, piece) for piece in pieces]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _handle(self, file: int) -> int:
        if file not in self._handles:
            self._handles[file] = self._storage.open(self._files[file], writable=False)
        return self._handles[file]

    def _one(self, read: AnyRead | _Woven) -> None:
        try:
            if isinstance(read, PackedRead):
                self._packed(read)
            elif isinstance(read, _Woven):
                self._together(read)
            elif read.dest.numel():
                self._rows(read)
        except ShardwiseError as error:
            name = read.reads[0].spec.name if isinstance(read, _Woven) else read.spec.name
            raise located(error, self._files[_file(read)], name) from None

    def _together(self, woven: _Woven) -> None:
        """Read rows of several destinations once, with what lies between, and give each its own."""
        first, last = woven.reads[0], woven.reads[-1]
        dtype = torch_dtype(first.spec.dtype)
        with self._lock:
            self.counts.wanted += sum(read.rows * read.width for read in woven.reads)
        step = BUFFER_BYTES // first.period
        for start in range(0, first.rows, step):
            rows = min(step, first.rows - start)
            buffer = self._buffers.get(rows * first.period)
            span = (rows - 1) * first.period + last.offset + last.width - first.offset
            self._fill(first, as_bytes(buffer[:span]), first.offset + start * first.period)
            lines = buffer.view(dtype).view(rows, -1)
            for read in woven.reads:
                at = (read.offset - first.offset) // dtype.itemsize
                target = read.dest.detach()[start : start + rows]
                target.copy_(lines[:, at : at + read.width // dtype.itemsize].reshape(target.shape))

    def _rows(self, read: Read) -> None:
        with self._lock:
            self.counts.wanted += read.rows * read.width
        dest = read.dest.detach()
        dtype = torch_dtype(read.spec.dtype)
        whole = read.rows == 1 or read.period == read.width
        if whole and dest.is_contiguous() and dest.dtype == dtype and dest.device.type == "cpu" and is_as_stored(dest):
            self._fill(read, as_bytes(dest), read.offset)
        elif whole:
            offset = read.offset
            for block in blocks(dest, BUFFER_BYTES // dtype.itemsize):
                buffer = self._buffers.get(block.numel() * dtype.itemsize)
                self._fill(read, as_bytes(buffer), offset)
                block.copy_(buffer.view(dtype).view(block.shape))
                offset += buffer.numel()
        elif _has_whole_rows(dest) and dest.dtype == dtype:
            self._fill_rows(read, _spanning(dest), dest.stride(0) * dtype.itemsize, 0, read.rows)
        elif read.width > BUFFER_BYTES:
            for row in range(read.rows):
                self._rows(Read(read.file, read.offset + row * read.period, 1, read.width, read.width,
                                dest[row : row + 1], read.spec))  # fmt: skip
        else:
            step = BUFFER_BYTES // read.width
            for first in range(0, read.rows, step):
                target = dest[first : first + step]
                buffer = self._buffers.get(len(target) * read.width)
                self._fill_rows(read, as_bytes(buffer), read.width, first, len(target))
                target.copy_(buffer.view(dtype).view(target.shape))

    def _fill_rows(self, read: Read, into: memoryview, pitch: int, first: int, rows: int) -> None:
        """Fill memory with ``rows`` rows from row ``first`` on, ``pitch`` bytes apart."""
        offset = read.offset + first * read.period
        if self._reads_rows is None or read.period - read.width > SMALL_GAP_BYTES:
            for row in range(rows):
                self._fill(read, into[row * pitch : row * pitch + read.width], offset + row * read.period)
            return
        span = (rows - 1) * read.period + read.width
        self._count(read, offset, span)
        handle = self._handles[read.file]
        got = self._reads_rows.read_rows(handle, into, rows, read.width, pitch, read.period, offset)
        if got != rows:
            raise _ends_early(f"within row {first + got} of the {read.rows} rows to be read")

    def _count(self, read: Read, offset: int, nbytes: int) -> None:
        if self._observe is not None:
            self._observe(read.file, offset, nbytes)
        with self._lock:
            self.counts.read += nbytes

    def _fill(self, read: Read, into: memoryview, offset: int) -> None:
        got = self._storage.read(self._handles[read.file], into, offset)
        self._count(read, offset, len(into))
        if got != len(into):
            raise _ends_early(f"{len(into) - got} bytes before the end of this tensor")

    def _packed(self, read: PackedRead) -> None:
        raw = bytearray(read.chunk.packed)
        with self._lock:
            self.counts.wanted += read.dest.numel() * read.spec.itemsize
            self.counts.read += len(raw)
        got = self._storage.read(self._handles[read.chunk.file], memoryview(raw), read.chunk.offset)
        if got != len(raw):
            raise IntegrityError("the file ends within this item", hint="Restore the file.")
        region = load_item(raw, read.chunk.box.sizes, torch_dtype(read.spec.dtype)).reshape(read.shape)
        for dim, (low, size) in enumerate(zip(read.region.offsets, read.region.sizes, strict=True)):
            region = region.narrow(dim, low, size)
        read.dest.detach().copy_(region)


def _position(read: AnyRead) -> tuple[int, int]:
    return (read.chunk.file, read.chunk.offset) if isinstance(read, PackedRead) else (read.file, read.offset)


def _file(read: AnyRead | _Woven) -> int:
    if isinstance(read, _Woven):
        return read.reads[0].file
    return read.chunk.file if isinstance(read, PackedRead) else read.file


def _woven(ordered: Sequence[AnyRead]) -> Iterator[AnyRead | _Woven]:
    """Put reads together whose rows would be read along with each other's: no byte is read twice."""
    group: list[Read] = []
    for read in (*ordered, None):
        if isinstance(read, Read) and group and _between(group, read):
            group.append(read)
            continue
        if group:
            yield _Woven(tuple(group)) if len(group) > 1 else group[0]
            group = []
        if isinstance(read, Read) and read.rows > 1 and 0 < read.period - read.width <= SMALL_GAP_BYTES:
            group = [read]
        elif read is not None:
            yield read


def _between(group: Sequence[Read], read: Read) -> bool:
    first, last = group[0], group[-1]
    same = (read.file, read.rows, read.period) == (first.file, first.rows, first.period) and read.spec == first.spec
    return (
        same
        and last.offset + last.width <= read.offset
        and read.offset + read.width <= first.offset + first.period <= first.offset + BUFFER_BYTES
    )


def _ends_early(where: str) -> IntegrityError:
    return IntegrityError(
        f"the file ends {where}",
        hint="The file was truncated after it was opened; restore it or choose another checkpoint.",
    )


def _has_whole_rows(dest: torch.Tensor) -> bool:
    """Whether each row is consecutive in CPU memory, and the rows stand one behind the other."""
    if dest.device.type != "cpu" or not is_as_stored(dest):
        return False
    return dest[0].is_contiguous() and dest.stride(0) >= dest[0].numel()


def _spanning(rows: torch.Tensor) -> memoryview:
    """The memory from the first to the last byte of rows that are each contiguous, with what lies between them."""
    elements = (len(rows) - 1) * rows.stride(0) + rows[0].numel()
    return as_bytes(rows.as_strided((elements,), (1,)))


def _split(read: AnyRead | _Woven) -> Iterator[AnyRead | _Woven]:
    """Cut a large contiguous read, so that several threads can share it."""
    if isinstance(read, Read) and read.rows == 1:
        yield from cut_read(read, 16 * BUFFER_BYTES)
    else:
        yield read


def cut_read(read: Read, most: int) -> Iterator[Read]:
    """Reads of at most ``most`` bytes each that together do what ``read`` does.

    Ranks whose reads have the same sizes get the same pieces, wherever these go in their memory.
    """
    if read.dest.numel() == 0:
        return
    if read.rows * read.width <= most:
        yield read
    elif read.rows == 1:
        offset = read.offset
        for block in blocks(read.dest, max(1, most // read.spec.itemsize)):
            nbytes = block.numel() * read.spec.itemsize
            yield Read(read.file, offset, 1, nbytes, nbytes, block, read.spec)
            offset += nbytes
    else:
        step = max(1, most // read.width)
        for first in range(0, read.rows, step):
            dest = read.dest[first : first + step]
            offset = read.offset + first * read.period
            part = Read(read.file, offset, dest.shape[0], read.period, read.width, dest, read.spec)
            yield from cut_read(part, most) if read.width > most else (part,)


def tensor_blocks(source: SourceTensor, reader: Reader, elements: int | None = None) -> Iterator[memoryview]:
    """A saved tensor's bytes in row-major order, in bounded memory; ``elements`` in each block, by default 8 MiB."""
    spec = source.spec
    dtype = torch_dtype(spec.dtype)
    per_block = elements or max(1, STREAM_BYTES // spec.itemsize)
    total = math.prod(spec.shape)
    for start in range(0, total, per_block):
        count = min(per_block, total - start)
        buffer = torch.empty(count, dtype=dtype)
        fragments, used = [], 0
        for box in refine_range(start, count, spec.shape) if spec.shape else (Box((), ()),):
            fragments.append(Fragment(box, buffer[used : used + box.numel].view(box.sizes)))
            used += box.numel
        wanted = HeldTensor.alone(spec, fragments)
        reader.execute(list(plan_reads(source, wanted)))
        yield as_bytes(buffer)
