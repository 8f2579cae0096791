"""Fewer passes of Python's garbage collector where hundreds of thousands of records are made that all stay."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

#: New objects between two passes; Python's own 700 made passes over records half of the time of 40,000 tensors.
_NEW_OBJECTS = 200_000

_lock = threading.Lock()
_inside = 0
_before = gc.get_threshold()


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """Let the collector run rarely inside of the ``with`` block, which may be nested and entered by several threads."""
    global _inside, _before
    with _lock:
        _inside += 1
        if _inside == 1:
            _before = gc.get_threshold()
            if _before[0]:
                gc.set_threshold(max(_NEW_OBJECTS, _before[0]), *_before[1:])
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_before)
