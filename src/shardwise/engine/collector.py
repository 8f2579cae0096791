"""Python's garbage collector rests while plans are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Switch Python's cyclic collector off, and on again if it was on.

    A plan consists of some hundred thousand objects that all live until the call returns; the collector would visit
    them again and again and free none. docs/benchmarks.md has figures with and without it (`benchmarks/run.py plan`).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
