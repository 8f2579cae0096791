"""Planning without the garbage collector in the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic collector while many small objects are made that are all going to stay.

    Each of its passes visits all of them and frees none, which made planning grow faster than the number of tensors
    (measured: 2.1 s with and 1.6 s without it for 40,000). The collector's former state is restored; a nested use
    changes nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
