"""A host's loader as `DataOrder.batches` has to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import cast

from shardwise.checkpointing.run_state.generators import RandomState


class Pass:
    """One pass over a loader: its batches, their number, and what the order is drawn from, but no position of its own.

    ``begin`` begins the pass; ``order`` has the generators of the order, by a ``DataLoader``'s names of them.
    """

    def __init__(self, loader: object, begin: Callable[[], Iterator[object]], **order: object) -> None:
        self._loader, self._begin = loader, begin
        vars(self).update(order)

    def __iter__(self) -> Iterator[object]:
        return self._begin()

    def __len__(self) -> int:
        return len(cast(Sized, self._loader))


def first_then(batches: Iterable[object], generators: dict[str, object]) -> Iterator[object]:
    """The batches; once the first is there, the process's generators are set, since making an iterator draws."""
    for number, batch in enumerate(batches):
        if number == 0:
            RandomState().load_state_dict(generators)
        yield batch


def length(loader: object) -> int | None:
    """The number of a loader's batches, where it is known."""
    try:
        return len(cast(Sized, loader))
    except TypeError:
        return None
