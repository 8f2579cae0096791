"""A question whose answer all ranks know, asked again only when some rank's own answer is another than last time."""

from __future__ import annotations

from shardwise.comm import Group


class Answer:
    """Remembers this rank's answer to a yes-or-no question, and whether any rank's is yes.

    Each save calls `begin` on every rank, then `look` where the ranks leave together, then `settle`.

    Args:
        group: The ranks that are asked.
        what: What is asked, for messages.
    """

    def __init__(self, group: Group, what: str) -> None:
        self._group = group
        self._what = what
        self._own: bool | None = None
        self._any: bool | None = None
        self._before: bool | None = None

    def begin(self) -> None:
        """Take nothing for agreed on until it is again. All ranks call, before anything that can fail on one."""
        self._before, self._any = self._any, None

    def look(self, own: bool) -> bool:
        """Take in this rank's answer; returns whether the ranks have to be asked. Local."""
        changed, self._own = own != self._own, own
        return changed or self._before is None

    def settle(self, news: bool) -> bool:
        """Whether any rank's answer is yes. All ranks call, with whether any of them has to ask."""
        if news or self._before is None:
            self._any = self._group.any(bool(self._own), self._what)
        else:
            self._any = self._before
        return self._any
