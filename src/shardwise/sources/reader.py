"""Reading saved tensors: byte ranges into place, or whole tensors once, with the digests of what is read.

Where a range is contiguous in the file and in a CPU parameter of the same dtype, the file system copies straight into
the parameter's memory. So do the rows of a column shard, many at a time: small gaps between them are read too and
dropped. Other memory (strided within a row, another device, another dtype) is filled through a small buffer.

In row-major order of a whole tensor the elements of each of its pieces come in the piece's own order. So a tensor that
lies in many pieces is put together block by block while each piece is read straight through, and its digest is that of
what was used, not of a second reading.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from shardwise.disk.crc import combine, crc32c
from shardwise.disk.storage import ReadsRows, Storage, located, locating
from shardwise.dtypes import torch_dtype
from shardwise.errors import FormatError, IntegrityError, ShardwiseError
from shardwise.geometry import Box
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.reads import AnyRead, PackedRead, Read, SourceChunk, SourceTensor, plan_reads
from shardwise.plan.views import refine_range
from shardwise.sources.packed_items import PackedItems, load_item
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


class _OpenFiles:
    """A list of files, each opened when it is first read, on any thread; `close` releases them."""

    def __init__(self, storage: Storage, files: Sequence[Path]) -> None:
        self.files = files
        self._storage = storage
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            file, handle = self._handles.popitem()
            with locating(self.files[file]):
                self._storage.close(handle)

    def _handle(self, file: int) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = self._storage.open(self.files[file], writable=False)
            return self._handles[file]


class Reader(_OpenFiles):
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
        super().__init__(storage, files)
        self._reads_rows = storage if isinstance(storage, ReadsRows) else None
        self._threads = threads
        self._observe = observe
        self._buffers = _Buffers()
        self.counts = ReadCounts()

    def execute(self, reads: Sequence[AnyRead]) -> None:
        """Carry out all reads, in file order on each thread; `IntegrityError` where a file ends before a range does."""
        ordered = list(_woven(sorted(reads, key=_position)))
        for read in ordered:
            self._handle(_file(read))
        if self._threads <= 1 or len(ordered) <= 1:
            for read in ordered:
                self._one(read)
            return
        pieces: list[AnyRead | _Woven] = []
        for read in ordered:  # large contiguous reads are cut, so that several threads can share them
            if isinstance(read, Read) and read.rows == 1:
                pieces += cut_read(read, 16 * BUFFER_BYTES)
            else:
                pieces.append(read)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="shardwise-read") as pool:
            futures = [pool.submit(self._one, piece) for piece in pieces]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

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
            raise located(error, self.files[_file(read)], name) from None

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


# --- whole tensors, with digests -------------------------------------------------------------------------------------


_HINT = "Restore the file from a copy, or take another checkpoint; `shardwise verify` lists all that is damaged."


class RecordedDigest(NamedTuple):
    """The digest of a run of bytes of a file, as recorded when it was written."""

    offset: int
    nbytes: int
    crc32c: int
    tensor: str | None


class _Piece(NamedTuple):
    offset: int
    nbytes: int
    crc32c: int


@dataclass
class DigestLedger:
    """The digests recorded of files (of each its runs of bytes, by offset), and of the bytes that were read."""

    recorded: Mapping[Path, Sequence[RecordedDigest]]
    _pieces: dict[Path, list[_Piece]] = field(default_factory=dict)
    _compared: dict[Path, set[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, path: Path, offset: int, nbytes: int, crc: int) -> None:
        """Record a run of bytes that was read; compare it where the same run has a recorded digest. Any thread."""
        runs = self.recorded.get(path)
        if not runs or not nbytes:
            return
        at = bisect_left(runs, offset, key=lambda run: run.offset)
        if at < len(runs) and (runs[at].offset, runs[at].nbytes) == (offset, nbytes):
            _compare(path, runs[at], crc)
            with self._lock:
                self._compared.setdefault(path, set()).add(at)
        else:
            with self._lock:
                self._pieces.setdefault(path, []).append(_Piece(offset, nbytes, crc))

    def content(self, path: Path, content: bytes) -> None:
        """Compare a file that was read as a whole."""
        self.take(path, 0, len(content), crc32c(content))

    def headers(self, paths: Iterable[Path], storage: Storage) -> None:
        """Read and compare the headers of tensor files: the first recorded run of each."""
        for path in paths:
            runs = self.recorded.get(path)
            if runs and runs[0].offset == 0 and runs[0].tensor is None and len(runs) > 1:
                self.take(path, 0, runs[0].nbytes, _digest(path, 0, runs[0].nbytes, 0, storage))

    def settle(self, storage: Storage) -> None:
        """Compare runs that were read in other pieces; bytes that were not read before are read now."""
        for path, pieces in self._pieces.items():
            pieces.sort()
            done = self._compared.get(path, set())
            for number, run in enumerate(self.recorded[path]):
                first = bisect_left(pieces, (run.offset,))
                last = bisect_left(pieces, (run.offset + run.nbytes,))
                inside = [p for p in pieces[first:last] if p.offset + p.nbytes <= run.offset + run.nbytes]
                if number not in done and inside:
                    _compare(path, run, _folded(path, run, inside, storage))


def _folded(path: Path, run: RecordedDigest, pieces: Sequence[_Piece], storage: Storage) -> int:
    position, crc = run.offset, 0
    for piece in pieces:
        if piece.offset < position:
            continue  # the same bytes again
        crc = _digest(path, position, piece.offset - position, crc, storage)
        crc = combine(crc, piece.crc32c, piece.nbytes)
        position = piece.offset + piece.nbytes
    return _digest(path, position, run.offset + run.nbytes - position, crc, storage)


def _digest(path: Path, offset: int, nbytes: int, crc: int, storage: Storage) -> int:
    if not nbytes:
        return crc
    handle = storage.open(path, writable=False)
    with locating(path):
        try:
            buffer = memoryview(bytearray(min(nbytes, BUFFER_BYTES)))
            while nbytes:
                part = buffer[: min(nbytes, len(buffer))]
                _read(storage, handle, part, offset, path, None)
                crc = crc32c(part, crc)
                offset, nbytes = offset + len(part), nbytes - len(part)
        finally:
            storage.close(handle)
    return crc


def _compare(path: Path, run: RecordedDigest, crc: int) -> None:
    if crc != run.crc32c:
        raise IntegrityError(
            f"bytes {run.offset} to {run.offset + run.nbytes} changed since the save (CRC-32C {crc:08x} instead of "
            f"{run.crc32c:08x})",
            path=path,
            tensor=run.tensor,
            hint=_HINT,
        )


def _read(storage: Storage, handle: int, into: memoryview, offset: int, path: Path, tensor: str | None) -> None:
    with locating(path):
        got = storage.read(handle, into, offset)
    if got != len(into):
        raise IntegrityError(
            f"the file ends {len(into) - got} bytes before the end of what was to be read",
            path=path,
            tensor=tensor,
            hint=_HINT,
        )


class VerifyingReader(_OpenFiles):
    """Reads tensors block by block, on any thread, and records all that is read; `close` releases the files."""

    def __init__(self, storage: Storage, files: Sequence[Path], ledger: DigestLedger) -> None:
        super().__init__(storage, files)
        self.ledger = ledger
        self.items = PackedItems()

    def blocks(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """A tensor's bytes in row-major order; its pieces have to cover each element once.

        A block is valid until the next is asked for. Memory is two blocks; of a piece that is a serialised tensor and
        no plain one (in another order, say), all. `IntegrityError` where bytes differ from what was recorded, or a file
        ends too early.
        """
        spec = tensor.spec
        total, item = math.prod(spec.shape), spec.itemsize
        pieces = [_Stream(self, chunk, tensor) for chunk in tensor.chunks if chunk.box.numel]
        per_block = max(1, BUFFER_BYTES // item)
        memory = torch.empty((min(per_block, total) if len(pieces) > 1 else 0, item), dtype=torch.uint8)
        for start in range(0, total, per_block):
            count = min(per_block, total - start)
            if len(pieces) == 1:
                yield pieces[0].next(count)
                continue
            block = memory[:count]
            boxes = refine_range(start, count, spec.shape)
            for piece in pieces:
                _scatter(piece, boxes, block)
            yield as_bytes(block)
        for piece in pieces:
            piece.finish()

    def fill(self, file: int, into: memoryview, offset: int, tensor: str) -> None:
        """Fill memory with a file's bytes from an offset on."""
        _read(self._storage, self._handle(file), into, offset, self.files[file], tensor)


class _Stream:
    """A piece's elements, from the first to the last."""

    def __init__(self, reader: VerifyingReader, chunk: SourceChunk, tensor: SourceTensor) -> None:
        self.box = chunk.box
        self._reader, self._chunk, self._spec = reader, chunk, tensor.spec
        #: Bytes before the elements, or ``None`` for a tensor serialised by ``torch.save`` that has to be loaded.
        self._start: int | None = 0
        if chunk.packed:
            self._start = reader.items.find(self._fill, chunk.packed, chunk.box.sizes, tensor.spec.dtype)
        self._path = reader.files[chunk.file]
        self._counts = bool(reader.ledger.recorded.get(self._path))
        self._crc, self._at = 0, 0
        self._buffer = memoryview(b"")

    def next(self, count: int) -> memoryview:
        """The bytes of the next ``count`` elements; valid until the next call."""
        nbytes = count * self._spec.itemsize
        if self._start is None:
            if not self._at:
                self._buffer = as_bytes(self._load())
            found = self._buffer[self._at : self._at + nbytes]
        else:
            # One buffer for all blocks: new ones fill a thread's heap before the allocator comes back to the first.
            if len(self._buffer) < nbytes:
                self._buffer = as_bytes(torch.empty(nbytes, dtype=torch.uint8))
            found = self._buffer[:nbytes]
            self._fill(found, self._start + self._at)
            if self._counts:
                self._crc = crc32c(found, self._crc)
        self._at += nbytes
        if self._at == self.box.numel * self._spec.itemsize:
            self._buffer = memoryview(b"")  # the memory is needed for the next piece
        return found

    def finish(self) -> None:
        """End the stream, and compare the bytes that were read."""
        if self._start is not None:
            self._took(self._start, self._at, self._crc)

    def _fill(self, into: memoryview, start: int) -> None:
        self._reader.fill(self._chunk.file, into, self._chunk.offset + start, self._spec.name)

    def _took(self, start: int, nbytes: int, crc: int) -> None:
        self._reader.ledger.take(self._path, self._chunk.offset + start, nbytes, crc)

    def _load(self) -> torch.Tensor:
        raw = bytearray(self._chunk.packed)
        self._fill(memoryview(raw), 0)
        self._took(0, len(raw), crc32c(raw))
        try:
            return load_item(raw, self.box.sizes, torch_dtype(self._spec.dtype)).contiguous()
        except FormatError as error:
            raise located(error, self._path, self._spec.name) from None


def _scatter(piece: _Stream, boxes: Sequence[Box], block: torch.Tensor) -> None:
    """Put what a piece has of a block, given as boxes in order, into the block."""
    common = [box.intersect(piece.box) for box in boxes]
    count = sum(each.numel for each in common if each is not None)
    if not count:
        return
    item = block.shape[1]
    found = torch.frombuffer(piece.next(count), dtype=torch.uint8)
    position, used = 0, 0
    for box, inner in zip(boxes, common, strict=True):
        target = block[position : position + box.numel].view(*box.sizes, item)
        position += box.numel
        if inner is None:
            continue
        for dim, (low, size) in enumerate(zip(inner.relative_to(box).offsets, inner.sizes, strict=True)):
            target = target.narrow(dim, low, size)
        target.copy_(found[used * item : (used + inner.numel) * item].view(*inner.sizes, item))
        used += inner.numel
