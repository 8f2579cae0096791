"""Asked to leave: finish the step, save on all ranks together, exit.

A signal reaches ranks at different moments, or only one of them. The guard notes it and nothing else; the ranks agree
at a step boundary, through whatever the caller passes to `PreemptionGuard.should_save`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Self

from shardwise.errors import MisuseError

# No handler catches the first two. The others do not end the process by default: a second one could not leave at once.
_UNFIT = {"SIGKILL", "SIGSTOP", "SIGCHLD", "SIGCLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGTSTP", "SIGTTIN", "SIGTTOU"}

# The guards in use, outermost first: what a forked child has to undo.
_in_use: list[PreemptionGuard] = []


def _leave_to_the_default() -> None:
    """In a forked child: the signals end it, also while it is in C code, where Python runs no handler."""
    handlers = [guard._handle for guard in _in_use]
    for guard in _in_use:
        guard._disown(handlers)
    _in_use.clear()


os.register_at_fork(after_in_child=_leave_to_the_default)


class PreemptionGuard:
    """Turns the first signal into a request, and the second into an immediate exit.

    Used as a context manager, in the main thread, around the training loop.

    After the first signal the signal's default action is in force, so that the second ends the process even while the
    main thread waits in a collective. Publication is one rename, so nothing is half-published then. The previous
    handlers are back when the context is left. A process forked meanwhile (a data loader's worker) is not guarded: the
    signals' default actions are in force there, so that it ends when it is asked to.

    Args:
        signals: What counts as a request.
        repeat_window_seconds: Signals within this time after the first belong to it. Some launchers forward a signal
            that the scheduler also sends to every process; where yours does, a second or two avoids an exit without a
            save. With 0 any second signal leaves at once.
        clock: Monotonic seconds.

    Raises:
        MisuseError: A signal cannot be caught, or does not end a process by default.

    Examples:
        >>> import os, signal
        >>> with PreemptionGuard() as guard:
        ...     for step in range(1, 100):
        ...         if step == 3:
        ...             os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does
        ...         if checkpointer.asked_to_stop(guard):
        ...             path = checkpointer.save(step=step, model=model)
        ...             break
        >>> path.name
        'epoch_0_step_3'
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        *,
        repeat_window_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signals = tuple(signal.Signals(number) for number in signals)
        for number in self._signals:
            if number.name in _UNFIT:
                raise MisuseError(
                    f"{number.name} cannot ask for a save", hint="Use SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2."
                )
        self._window = repeat_window_seconds
        self._clock = clock
        self._first_at: float | None = None
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        """Install the handlers.

        Raises:
            MisuseError: Not in the main thread (Python delivers signals there only), or entered twice.
        """
        if threading.current_thread() is not threading.main_thread():
            raise MisuseError(
                "Signals can be handled in the main thread only", hint="Enter the PreemptionGuard in the main thread."
            )
        if self._previous:
            raise MisuseError("The PreemptionGuard is already in use", hint="Make one guard for each loop.")
        self._first_at = None
        self._owner = os.getpid()
        _in_use.append(self)
        try:
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._handle)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if self in _in_use:
            _in_use.remove(self)

    @property
    def requested_locally(self) -> bool:
        """Whether this process has been asked; other ranks may not have been."""
        return self._first_at is not None

    def should_save(self, any_rank: Callable[[bool], bool] | None = None) -> bool:
        """Whether to save now and leave; every rank calls it at the same step boundaries.

        Args:
            any_rank: Returns whether any rank passed ``True``; a collective, called on every call, so that no rank
                waits for one that already knows. ``None`` for a single process.
        """
        mine = self.requested_locally
        return mine if any_rank is None else any_rank(mine)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here: a handler may run in the middle of a logging call.
        now = self._clock()
        if os.getpid() != self._owner:
            # A forked worker that was asked to end before its handlers were restored.
            self._leave(number)
        elif self._first_at is None:
            self._first_at = now
            if self._window > 0:
                return
            for each in self._signals:
                signal.signal(each, signal.SIG_DFL)
        elif now - self._first_at > self._window:
            self._leave(number)

    def _disown(self, handlers: Sequence[Callable[[int, FrameType | None], object]]) -> None:
        """Put the default actions in the place of guards' handlers, also where this one found another's."""
        for number in self._signals:
            # A handler that was installed since is its owner's.
            if signal.getsignal(number) in handlers:
                signal.signal(number, signal.SIG_DFL)
        for number, handler in self._previous.items():
            if handler in handlers:
                self._previous[number] = signal.SIG_DFL

    def _leave(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        # Returns only where the signal is blocked in this thread.
        signal.raise_signal(number)
        os._exit(128 + number)
