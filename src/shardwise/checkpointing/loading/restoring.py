"""Restores all or nothing, as far as possible: steps that may be refused come first and can be undone.

1. Everything is opened, matched and compared on all ranks; nothing is changed.
2. Small states are loaded: options of optimizers, schedulers, extra state. Their own code may refuse them. If it does
   on any rank, all ranks restore their previous state.
3. Bytes are read into model and optimizer. Should that fail, the error says that the state is partly overwritten.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from shardwise.errors import ShardwiseError

_LOG = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """A scheduler, or anything with DCP's two methods of a state."""

    def state_dict(self) -> dict[str, object]:
        """The state, as plain containers."""

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Load a state."""


class Undos:
    """The changes made so far, and how to undo them."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], None]]] = []

    def add(self, what: str, undo: Callable[[], None]) -> None:
        """Remember how to undo a change of ``what``; call before the change, or directly after it."""
        self._steps.append((what, undo))

    def load(self, what: str, target: Stateful, state: dict[str, object]) -> None:
        """Load ``state`` into ``target``, which may refuse it, and remember its previous state."""
        self.add(what, _back(target))
        target.load_state_dict(state)

    def run(self) -> None:
        """Undo all changes, the last first. Never raises; a change that cannot be undone is logged."""
        while self._steps:
            what, undo = self._steps.pop()
            try:
                undo()
            except Exception as error:  # noqa: BLE001 - on the way out of the failure that led here
                _LOG.error("%s could not be put back as it was and may be partly overwritten: %s", what, error)


def _back(target: Stateful) -> Callable[[], None]:
    try:
        had = copy.deepcopy(target.state_dict())
    except Exception as error:  # noqa: BLE001 - it matters only if the state is refused, and is logged then
        failure = error

        def refuse() -> None:
            raise failure

        return refuse
    return lambda: target.load_state_dict(had)


@contextlib.contextmanager
def undone_on_failure() -> Iterator[Undos]:
    """Undo the changes made in the context if it fails."""
    undos = Undos()
    try:
        yield undos
    except BaseException:
        undos.run()
        raise


@contextlib.contextmanager
def overwriting(what: str) -> Iterator[None]:
    """Read bytes into ``what``: an error in the context says that it is partly overwritten."""
    try:
        yield
    except ShardwiseError as error:
        error.message = f"{error.message}; {what} is now partly overwritten"
        advice = "Do not train on: restore again, from this checkpoint or another, or start the process afresh."
        error.hint = f"{error.hint} {advice}" if error.hint else advice
        raise
