"""Reading saved tensors once, from their first byte to their last, and digesting what is read on the way.

In row-major order of a whole tensor the elements of each of its pieces come in the piece's own order. So a tensor that
lies in many pieces is put together block by block while each piece is read straight through, and its digest is that of
what was used, not of a second reading.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from shardwise.disk.crc import combine, crc32c
from shardwise.disk.storage import Storage, located, locating
from shardwise.dtypes import torch_dtype
from shardwise.errors import FormatError, IntegrityError
from shardwise.geometry import Box
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.views import refine_range
from shardwise.sources.packed_items import PackedItems, load_item
from shardwise.sources.tensor_bytes import as_bytes

#: Bytes of one block.
BLOCK_BYTES = 4 * 2**20
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
        """Record a run of bytes that was read; compare it where the same run has a recorded digest. Any thread.

        Raises:
            IntegrityError: It has changed since it was written.
        """
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
            buffer = memoryview(bytearray(min(nbytes, BLOCK_BYTES)))
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


class VerifyingReader:
    """Reads tensors block by block, on any thread, and records all that is read; `close` releases the files."""

    def __init__(self, storage: Storage, files: Sequence[Path], ledger: DigestLedger) -> None:
        self._storage = storage
        self.files = files
        self.ledger = ledger
        self._handles: dict[int, int] = {}
        self._opening = threading.Lock()
        self.items = PackedItems()

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            file, handle = self._handles.popitem()
            with locating(self.files[file]):
                self._storage.close(handle)

    def blocks(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """A tensor's bytes in row-major order; its pieces have to cover each element once.

        A block is valid until the next is asked for. Memory is two blocks; of a piece that is a serialised tensor and
        no plain one (in another order, say), all.

        Raises:
            IntegrityError: Bytes differ from what was recorded, or a file ends too early.
            FormatError: A serialised tensor is not what the metadata says.
        """
        spec = tensor.spec
        total, item = math.prod(spec.shape), spec.itemsize
        pieces = [_Stream(self, chunk, tensor) for chunk in tensor.chunks if chunk.box.numel]
        per_block = max(1, BLOCK_BYTES // item)
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
        with self._opening:
            if file not in self._handles:
                self._handles[file] = self._storage.open(self.files[file], writable=False)
        _read(self._storage, self._handles[file], into, offset, self.files[file], tensor)


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
