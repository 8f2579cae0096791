"""Which of the saved schedulers' states belongs to a scheduler that is to be restored.

A scheduler is identified by the parameters of its optimizer, by name. The order in which schedulers are passed only
distinguishes schedulers of one class that steer the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch.optim.lr_scheduler import LRScheduler

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.run_state.schedule_groups import composed
from shardwise.checkpointing.run_state.schedule_records import Attached, SavedSchedule, SavedSchedules, inner_of
from shardwise.errors import CheckpointNotFoundError, MisuseError, StateFormatError
from shardwise.sources.state_files import has_state, read_state
from shardwise.stateful_wrappers.state_trees import equal

SCHEDULER_STATE = "scheduler"
#: An attribute of torch's schedulers that newer releases lack.
_GONE = {"verbose"}
_BUILD = "Build the scheduler that the checkpoint was saved with; or restore without it, and it starts afresh."


@dataclass(frozen=True, slots=True)
class FoundSchedules:
    """The states of this rank's schedulers, not yet loaded.

    Attributes:
        schedules: Each scheduler with its state.
        entries: Everything that was saved, in order; none where an older release saved it.
        used: Numbers of the entries that this rank's schedulers are restored from, with equivalent ones.
        chosen: Keys with different values on ranks of one scheduler, where the lowest rank's value was taken.
    """

    schedules: tuple[tuple[Stateful, dict[str, object]], ...] = ()
    entries: tuple[SavedSchedule, ...] = ()
    used: frozenset[int] = frozenset()
    chosen: tuple[str, ...] = ()

    def check_all_used(self, used: frozenset[int], directory: Path) -> None:
        """Raise `MisuseError` if a saved scheduler was restored on no rank (``used``, of all ranks). Local."""
        left = [entry for number, entry in enumerate(self.entries) if number not in used]
        if left:
            of_rank = [entry for entry in self.entries if left[0].ranks[0] in entry.ranks]
            raise _other_number(
                len(of_rank), len(self.schedules), directory, f"; none is restored from that of {left[0].where}"
            )


def saved_schedules(
    schedulers: Sequence[Stateful],
    own: Sequence[Attached],
    renamed: Callable[[str, frozenset[str]], str],
    kinds: Sequence[str],
    directory: Path,
    rank: int,
    world_size: int,
) -> FoundSchedules:
    """The state of each scheduler. Local; nothing is changed.

    Args:
        schedulers: The schedulers to restore; one at least.
        own: Their descriptions.
        renamed: The name under which a parameter was saved, given its name and those that were saved.
        kinds: The classes of schedulers that an older release saved; the oldest do not say.
        directory: The optimizer's directory.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        CheckpointNotFoundError: None was saved.
        MisuseError: Others were saved, or another number.
        StateFormatError: The state is damaged.
    """
    stem = directory / SCHEDULER_STATE
    path = stem.with_name(f"{SCHEDULER_STATE}.json")
    if not has_state(stem):
        raise CheckpointNotFoundError(
            "the checkpoint was saved without a scheduler",
            path=path,
            hint="Restore without a scheduler, or choose a checkpoint that has one.",
        )
    states = read_state(stem)
    if isinstance(states, list):
        return _by_position(schedulers, states, kinds, path)
    try:
        saved = SavedSchedules.from_state(states)
    except StateFormatError as error:
        error.path = error.path or str(path)
        raise
    every = frozenset(name for entry in saved.entries for name in entry.of.names)
    match = _Match(saved, rank if saved.world_size == world_size else None, len(schedulers), path)
    found, used, chosen = [], set[int](), dict[str, None]()
    for scheduler, each in zip(schedulers, own, strict=True):
        groups = tuple(tuple(renamed(name, every) for name in group) for group in each.groups)
        state, entries, differing = match.find(inner_of(scheduler), replace(each, groups=groups))
        found.append((scheduler, cast(dict[str, object], state)))
        used |= entries
        chosen |= dict.fromkeys(differing)
    return FoundSchedules(tuple(found), saved.entries, frozenset(used), tuple(chosen))


@dataclass(frozen=True, slots=True)
class _Match:
    """Finds the states of schedulers.

    Attributes:
        rank: This rank, where as many ranks restore as saved; ``None`` on another number.
        count: Number of schedulers to be restored on this rank, for messages.
    """

    saved: SavedSchedules
    rank: int | None
    count: int
    path: Path

    def find(self, scheduler: object, own: Attached) -> tuple[object, set[int], list[str]]:
        """A scheduler's state, the numbers of the entries that it restores, and the keys in which ranks differed.

        Raises:
            MisuseError: There is none for it.
        """
        numbered = self._ordered(own, self._of_kind(scheduler, own, self._steering(own)))
        entries = [entry for _, entry in numbered]
        exact = [entry for entry in entries if entry.of.names == own.names or not own.names]
        mine = [entry for entry in exact if self.rank in entry.ranks]
        differing: list[str] = []
        if mine:
            sources = mine[:1]
        else:
            sources = []
            for names in dict.fromkeys(entry.of.names for entry in exact or entries):
                same = [entry for entry in exact or entries if entry.of.names == names]
                sources.append(min(same, key=lambda entry: entry.ranks[0]))
                differing += _differing(same)
        used = {number for number, entry in numbered if any(entry.of.names == each.of.names for each in sources)}
        if isinstance(scheduler, LRScheduler) and own.names:
            state = composed(sources, own.groups, scheduler.state_dict())
        else:
            state = sources[0].state
            for other in sources[1:]:
                if not equal(state, other.state):
                    raise MisuseError(
                        f"the states of {sources[0].where} and of {other.where} differ, and one {own.kind} steers the "
                        "parameters of both now",
                        path=self.path,
                        hint=_BUILD,
                    )
        if isinstance(scheduler, LRScheduler):
            _check_fit(scheduler, state, sources[0].of.kind, self.path)
        return state, used, differing

    def _steering(self, own: Attached) -> list[tuple[int, SavedSchedule]]:
        """The entries that steer any of a scheduler's parameters.

        For a scheduler without parameters: the entries without parameters, or else all entries, to be matched by class
        and order.
        """
        everything = list(enumerate(self.saved.entries))
        names = own.names
        if not names:
            return [each for each in everything if not each[1].of.names] or everything
        found = [each for each in everything if not names.isdisjoint(each[1].of.names)]
        if not found:
            raise MisuseError(
                f"no scheduler in the checkpoint steers {min(names)}, as the {own.kind} to be restored does",
                path=self.path,
                hint="Build schedulers for the optimizers that the checkpoint was saved with.",
            )
        return found

    def _of_kind(
        self, scheduler: object, own: Attached, found: list[tuple[int, SavedSchedule]]
    ) -> list[tuple[int, SavedSchedule]]:
        of_kind = [each for each in found if each[1].of.kind == own.kind]
        if of_kind or not isinstance(scheduler, LRScheduler):
            return of_kind or found
        raise _other_kind(found[0][1].of.kind, own.kind, self.path)

    def _ordered(self, own: Attached, found: list[tuple[int, SavedSchedule]]) -> list[tuple[int, SavedSchedule]]:
        ordered = [each for each in found if each[1].of.order == own.order]
        if ordered:
            return ordered
        first = found[0][1]
        count = sum(1 for entry in self.saved.entries if first.ranks[0] in entry.ranks)
        raise _other_number(count, self.count, self.path, f"; only {own.order} of them as {own.kind} for {first.where}")


def _differing(entries: Sequence[SavedSchedule]) -> list[str]:
    """Keys with different values on replicas."""
    first = entries[0].state
    found: dict[str, None] = {}
    for entry in entries[1:]:
        if not (isinstance(first, Mapping) and isinstance(entry.state, Mapping)):
            found |= {} if equal(first, entry.state) else {"state": None}
            continue
        keys = dict.fromkeys([*first, *entry.state])
        found |= {str(key): None for key in keys if not equal(first.get(key), entry.state.get(key))}
    return list(found)


def _by_position(
    schedulers: Sequence[Stateful], states: list[object], kinds: Sequence[str], path: Path
) -> FoundSchedules:
    """As older releases saved them: rank 0's, in order."""
    if len(states) != len(schedulers):
        raise _other_number(len(states), len(schedulers), path, "")
    for number, (scheduler, state) in enumerate(zip(schedulers, states, strict=True)):
        inner = inner_of(scheduler)
        if isinstance(inner, LRScheduler):
            _check_fit(inner, state, kinds[number] if number < len(kinds) else "", path)
    return FoundSchedules(tuple(zip(schedulers, cast(list[dict[str, object]], states), strict=True)))


def _other_number(saved: int, wanted: int, path: Path, which: str) -> MisuseError:
    return MisuseError(
        f"{saved} {'scheduler was' if saved == 1 else 'schedulers were'} saved and "
        f"{wanted} {'is' if wanted == 1 else 'are'} to be restored{which}",
        path=path,
        hint="Pass the schedulers that the checkpoint was saved with; or restore without them.",
    )


def _other_kind(saved: str, own: str, path: Path) -> MisuseError:
    return MisuseError(
        f"the checkpoint's scheduler is {saved} and the one to be restored is {own}", path=path, hint=_BUILD
    )


def _check_fit(scheduler: LRScheduler, state: object, kind: str, path: Path) -> None:
    """Compare here what torch's schedulers would load unchecked, attribute by attribute."""
    own = type(scheduler).__name__
    if not isinstance(state, Mapping):
        raise StateFormatError("a scheduler's state is not a dictionary", path=path, hint="Restore the file.")
    if kind and kind.partition("[")[0] != own:
        raise _other_kind(kind, own, path)
    have = scheduler.state_dict()
    mine, saved = ({key for key in each if not key.startswith("_")} - _GONE for each in (have, state))
    if not kind and mine - saved and saved - mine:
        raise MisuseError(
            f"the checkpoint's scheduler is no {own}: it has {sorted(saved - mine)} and lacks {sorted(mine - saved)}",
            path=path,
            hint=_BUILD,
        )
    rates, saved_rates = have.get("base_lrs"), state.get("base_lrs")
    if isinstance(rates, list) and isinstance(saved_rates, list) and len(rates) != len(saved_rates):
        raise MisuseError(
            f"the checkpoint's scheduler has learning rates of {len(saved_rates)} parameter groups and the one to be "
            f"restored of {len(rates)}",
            path=path,
            hint="Build the optimizer with the same parameter groups as when the checkpoint was saved.",
        )
