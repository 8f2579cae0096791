"""A host's loader as `DataOrder.batches` has to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import cast


class Pass:
    """One pass over a loader: its batches, their number, and what the order is drawn from, but no position of its own.

    Args:
        loader: The loader.
        begin: Begins the pass.
        order: What has the generators of the order, by the names under which a ``DataLoader`` has it.
    """

    def __init__(self, loader: object, begin: Callable[[], Iterator[object]], **order: object) -> None:
        self._loader, self._begin = loader, begin
        vars(self).update(order)

    def __iter__(self) -> Iterator[object]:
        return self._begin()

    def __len__(self) -> int:
        return len(cast(Sized, self._loader))


def length(loader: object) -> int | None:
    """The number of a loader's batches, where it is known."""
    try:
        return len(cast(Sized, loader))
    except TypeError:
        return None
