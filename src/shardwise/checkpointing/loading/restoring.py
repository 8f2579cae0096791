"""Restoring without halves: what can be refused comes first and is taken back, what is left can only fail at reading.

1. Everything is opened, matched and compared, on all ranks; nothing is changed.
2. Small states are taken in: options of optimizers, schedulers, extra state. Their own code may refuse them. If it does
   on any rank, all ranks put back what they had.
3. Bytes are read into model and optimizer. Should that fail, the error says that the state is partly overwritten.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, MutableMapping
from typing import Protocol

from shardwise.errors import ShardwiseError

_LOG = logging.getLogger(__name__)


class HasState(Protocol):
    """A scheduler, or anything with the two methods of a state."""

    def state_dict(self) -> dict[str, object]:
        """The state, as plain containers."""
        ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take the state in."""
        ...


class Undos:
    """What has been changed, and how it was."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], None]]] = []

    def add(self, what: str, undo: Callable[[], None]) -> None:
        """Remember how to put ``what`` back; call before it is changed, or at once after."""
        self._steps.append((what, undo))

    def load(self, what: str, target: HasState, state: dict[str, object]) -> None:
        """Have ``target`` take ``state`` in, and remember the state that it had.

        Raises:
            Exception: What ``target`` refuses it with.
        """
        self.add(what, _back(target))
        target.load_state_dict(state)

    def refill(self, what: str, target: MutableMapping[object, object], values: dict[object, object]) -> None:
        """Replace what is in ``target``."""
        had = dict(target)

        def undo() -> None:
            target.clear()
            target.update(had)

        self.add(what, undo)
        target.clear()
        target.update(values)

    def run(self) -> None:
        """Put everything back, the last first. Never raises; what cannot be put back is named in the log."""
        while self._steps:
            what, undo = self._steps.pop()
            try:
                undo()
            except Exception as error:  # noqa: BLE001 - on the way out of the failure that led here
                _LOG.error("%s could not be put back as it was and may be partly overwritten: %s", what, error)


def _back(target: HasState) -> Callable[[], None]:
    try:
        had = copy.deepcopy(target.state_dict())
    except Exception as error:  # noqa: BLE001 - it matters only if the state is refused, and is told then
        failure = error

        def refuse() -> None:
            raise failure

        return refuse
    return lambda: target.load_state_dict(had)


@contextlib.contextmanager
def undone_on_failure() -> Iterator[Undos]:
    """Changes that are taken back if what is inside fails; on all ranks, where it fails on all."""
    undos = Undos()
    try:
        yield undos
    except BaseException:
        undos.run()
        raise


@contextlib.contextmanager
def overwriting(what: str) -> Iterator[None]:
    """The reading of bytes into ``what``: an error says that it is neither the old nor the new by then."""
    try:
        yield
    except ShardwiseError as error:
        error.message = f"{error.message}; {what} is now partly overwritten"
        advice = "Do not train on: restore again, from this checkpoint or another, or start the process afresh."
        error.hint = f"{error.hint} {advice}" if error.hint else advice
        raise
