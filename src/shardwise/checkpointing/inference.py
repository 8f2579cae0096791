"""Runs the checkpointer's calls on its storage, outside ``torch.inference_mode``, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, runtime_checkable

import torch

from shardwise.disk.storage import Storage, current, using


@runtime_checkable
class HasStorage(Protocol):
    """Something whose calls have a storage."""

    @property
    def storage(self) -> Storage:
        """What they look at names in, and read from and write to."""
        ...


P = ParamSpec("P")
T = TypeVar("T")


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


def public_call(function: Callable[P, T]) -> Callable[P, T]:
    """Let a method use its object's storage, and run as outside of ``torch.inference_mode`` and without the collector.

    Every tensor that is made inside of that mode refuses for good to be changed in place outside of it: staging memory
    that the next save fills, an optimizer's state that the next step updates, a parameter that was given its memory.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        owner = args[0] if args else None
        with using(owner.storage if isinstance(owner, HasStorage) else current()), without_collector():
            if not torch.is_inference_mode_enabled():
                return function(*args, **kwargs)
            with torch.inference_mode(False):
                return function(*args, **kwargs)

    return call
