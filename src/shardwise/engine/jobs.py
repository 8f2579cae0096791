"""A save as a value: steps that write, and one commit at the end; run at once, or in the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwise.comm import Group
from shardwise.engine.records import ComponentRecord

Step = Callable[[Group], ComponentRecord]
Commit = Callable[[Group, ComponentRecord], None]


def local_step(what: str, write: Callable[[], ComponentRecord], *, main_only: bool = False) -> Step:
    """A step without messages between ranks, of every rank or of rank 0; a failure in it is raised on all ranks."""

    def run(group: Group) -> ComponentRecord:
        return group.attempt(lambda: write() if group.is_main or not main_only else ComponentRecord(), what)

    return run


def below(prefix: str, steps: Sequence[Step], component: str = "") -> list[Step]:
    """The steps with the paths of their records put below ``prefix``; see `ComponentRecord.below`."""

    def moved(step: Step) -> Step:
        return lambda group: step(group).below(prefix, component)

    return [moved(step) for step in steps]


@dataclass(frozen=True)
class SaveJob:
    """The rest of a save once the state is captured. Every rank has one, with the same steps.

    Each step writes a component and returns a record of it; ``commit`` makes the result visible, given the records of
    all; ``abandon`` removes what was written, after a failure, and must not raise.
    """

    what: str
    steps: tuple[Step, ...]
    commit: Commit
    abandon: Callable[[Group], None]

    def run(self, group: Group) -> None:
        """Run the save; nothing becomes visible if it fails on any rank, which is raised on all. All ranks call."""
        record = ComponentRecord()
        try:
            for step in self.steps:
                record = record + step(group)
            self.commit(group, record)
        except BaseException:
            self.abandon(group)
            raise
