"""Where the elements of tensors serialised by ``torch.save`` lie, so that they are read like any bytes.

DCP writes each piece of a tensor as an archive of its own, whose one storage is kept uncompressed. Loading all of it
takes its size twice in memory, and a pickle for each. Here torch's restricted unpickler reads one of each kind over
tensors without memory, which tells the place. An archive that begins like it, byte for byte up to the elements (which
is shape, dtype and byte order), and is as long, has them at the same place.
"""

from __future__ import annotations

import io
import sys
import threading
import zipfile
from collections.abc import Callable
from typing import IO

import torch

from shardwise.disk.guarded import RangeStream
from shardwise.dtypes import torch_dtype
from shardwise.errors import FormatError
from shardwise.upstream.torch_dispatch import place_in_archive, without_memory

_LONGEST_NOTE = 16

#: Fills memory with the bytes of an archive from an offset on.
Fill = Callable[[memoryview, int], None]


class PackedItems:
    """Finds the elements of archives; remembers the kinds of archives that it has seen. Any thread."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, tuple[int, ...], str], list[bytes]] = {}
        self._lock = threading.Lock()

    def find(self, fill: Fill, nbytes: int, shape: tuple[int, ...], dtype: str) -> int | None:
        """The offset of the elements in an archive of ``nbytes``, in row-major order, if it is such a tensor's.

        ``None`` where it has to be loaded: to see what it is instead, or to bring its elements in order.
        """
        with self._lock:
            known = self._kinds.setdefault((nbytes, shape, dtype), [])
            longest = memoryview(bytearray(max(map(len, known), default=0)))
            if longest:
                fill(longest, 0)
            for head in known:
                if longest[: len(head)] == head:
                    return len(head)
            place = _look(fill, nbytes, shape, torch_dtype(dtype))
            if place is not None:
                own = bytearray(place)
                fill(memoryview(own), 0)
                known.append(bytes(own))
            return place


def _look(fill: Fill, nbytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    def read(into: memoryview, at: int) -> int:
        part = into[: max(0, nbytes - at)]
        if part:
            fill(part, at)
        return len(part)

    try:
        with io.BufferedReader(RangeStream(read, lambda: nbytes)) as archive, without_memory():
            if not in_this_byte_order(archive):
                return None
            archive.seek(0)
            found: object = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - loading it says what is wrong
        return None
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape or found.dtype != dtype:
        return None
    place = place_in_archive(found)
    own = found.numel() * found.element_size()
    alone = found.storage_offset() == 0 and found.untyped_storage().nbytes() == own and found.is_contiguous()
    plain = not (found.is_conj() or found.is_neg())
    return place if place is not None and alone and plain and place + own <= nbytes else None


def load_item(raw: bytes | bytearray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor in an archive; `FormatError` where it has none of this shape and dtype, without file and name."""
    try:
        loaded: object = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(f"this item is not a serialised tensor: {error}", hint="Restore the file.") from error
    if isinstance(loaded, torch.Tensor) and tuple(loaded.shape) == shape and loaded.dtype == dtype:
        return loaded.detach()
    what = f"a {type(loaded).__name__} and no tensor"
    if isinstance(loaded, torch.Tensor):
        what = f"a tensor of {list(loaded.shape)} {loaded.dtype}, where the metadata says {list(shape)} {dtype}"
    raise FormatError(f"this item is {what}", hint="Restore the file.")


def in_this_byte_order(archive: IO[bytes]) -> bool:
    """Whether ``torch.load`` takes an archive's elements as they are: turning ones without memory ends the process.

    `zipfile.BadZipFile` where it is no archive.
    """
    with zipfile.ZipFile(archive) as entries:
        notes = [entry for entry in entries.infolist() if entry.filename.rpartition("/")[2] == "byteorder"]
        sound = len(notes) < 2 and all(entry.file_size < _LONGEST_NOTE for entry in notes)
        return sound and all(entries.read(entry) == sys.byteorder.encode() for entry in notes)
