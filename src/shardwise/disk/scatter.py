"""Reading a range of a file whole; and many rows, with gaps between them, in one call of the system.

``preadv(2)`` takes a list of places: rows go straight to where they belong, and the gaps all go to one small scratch
that stays in the core's cache. Python's own ``os.preadv`` wants an object for each place, which costs more than reading
a row of a few kilobytes does; here the list is an array.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Places in one call, if the system does not say.
_FEWEST_PLACES = 16  # what POSIX promises (_XOPEN_IOV_MAX)


def read_all(handle: int, into: memoryview, offset: int) -> int:
    """Read until the buffer is full or the file ends; returns how many bytes there were. Raises ``OSError``."""
    done = 0
    while done < len(into):
        got = os.preadv(handle, [into[done:] if done else into], offset + done)
        if got == 0:
            break
        done += got
    return done


def read_rows(handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int) -> int:
    """Read ``rows`` rows of ``width`` bytes, ``period`` bytes apart in the file, the first at ``offset``.

    They go to places ``pitch`` bytes apart in ``into``, between which nothing is touched; what is between rows in the
    file is read too and dropped. Returns how many rows were read whole, fewer only at the end of the file.
    """
    import numpy as np  # which offline work does without

    needed = (rows - 1) * pitch + width if rows else 0
    if into.nbytes < needed or min(width, pitch - width, period - width) < 0:
        raise ValueError(f"{rows} rows of {width} bytes do not fit {into.nbytes} bytes at a pitch of {pitch}")
    if not rows or not width:
        return rows
    memory = np.frombuffer(into, dtype=np.uint8)
    if not memory.flags.writeable:
        raise ValueError("the memory to read into is read-only")
    gap = np.empty(period - width, dtype=np.uint8)
    done = 0
    while done < rows:
        some = min(rows - done, max(1, _most_places() // 2))
        places = _places(memory.ctypes.data + done * pitch, some, width, pitch, gap)
        got = _preadv(handle, places, offset + done * period)
        whole = (got + gap.nbytes) // period
        if not whole:  # one call gave only a part of a row, as network file systems may
            row = into[done * pitch :][:width]
            if read_all(handle, row, offset + done * period) < len(row):
                break
            whole = 1
        done += whole
    return done


def _places(start: int, rows: int, width: int, pitch: int, gap: NDArray[np.uint8]) -> NDArray[np.uintp]:
    """An array of ``struct iovec``: row, gap, row, gap, ..., row."""
    import numpy as np

    places = np.empty((rows, 2, 2), dtype=np.uintp)
    places[:, 0, 0] = start + np.arange(rows, dtype=np.uintp) * np.uintp(pitch)
    places[:, 0, 1] = width
    places[:, 1, 0] = gap.ctypes.data
    places[:, 1, 1] = gap.nbytes
    return places.reshape(-1, 2)[:-1]


def _preadv(handle: int, places: NDArray[np.uintp], offset: int) -> int:
    while True:
        got = _system_call()(handle, places.ctypes.data, len(places), offset)
        if got >= 0:
            return got
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


@cache
def _most_places() -> int:
    try:
        return max(_FEWEST_PLACES, os.sysconf("SC_IOV_MAX"))
    except (OSError, ValueError):
        return _FEWEST_PLACES


@cache
def _system_call() -> Callable[[int, int, int, int], int]:
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "preadv64", libc.preadv)  # glibc's name for 64-bit offsets whatever the platform's own
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    call.restype = ctypes.c_ssize_t
    return cast(Callable[[int, int, int, int], int], call)
