"""Questions whose answers all ranks know, asked again only when some rank's own answers are others than last time."""

from __future__ import annotations

from shardwise.comm import Group


class Answers:
    """Remembers this rank's answers to yes-or-no questions, and for each whether any rank's is yes.

    Each save calls `begin` on every rank, then `look` where the ranks leave together, then `settle`.

    Args:
        group: The ranks that are asked.
        what: What is asked, for messages.
    """

    def __init__(self, group: Group, what: str) -> None:
        self._group = group
        self._what = what
        self._own: tuple[bool, ...] | None = None
        self._any: tuple[bool, ...] | None = None
        self._before: tuple[bool, ...] | None = None

    def begin(self) -> None:
        """Take nothing for agreed on until it is again. All ranks call, before anything that can fail on one."""
        self._before, self._any = self._any, None

    def look(self, own: tuple[bool, ...]) -> bool:
        """Take in this rank's answers; returns whether the ranks have to be asked. Local."""
        changed, self._own = own != self._own, own
        return changed or self._before is None

    def settle(self, news: bool) -> tuple[bool, ...]:
        """For each question, whether any rank's answer is yes. All ranks call, with whether any of them has to ask."""
        if news or self._before is None:
            _, counts = self._group.fold([], [int(answer) for answer in self._own or ()], self._what)
            self._any = tuple(map(bool, counts))
        else:
            self._any = self._before
        return self._any
