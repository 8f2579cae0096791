"""Which of the saved schedulers' states belongs to a scheduler that is to be restored.

A scheduler is identified by the parameters of its optimizer, by name. The order in which schedulers are passed only
distinguishes schedulers of one class that steer the same parameters.

On pipeline stages each rank's scheduler knows the groups of its stage. On another topology a scheduler gets the values
of each of its groups from the saved scheduler that steered these parameters. Values that do not belong to a group have
to be equal in all saved schedulers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.comm import Group
from shardwise.errors import CheckpointNotFoundError, MisuseError, StateFormatError
from shardwise.sources.state_files import has_state, joined, pack_state, read_state, split, unpack_state
from shardwise.stateful_wrappers.names import list_parameters
from shardwise.stateful_wrappers.state_trees import equal
from shardwise.upstream.torch_modules import INNER_SCHEDULERS, LAST_RATES, MILESTONES, inner_schedulers

#: A parameter group is identified by the names of its parameters.
Groups = tuple[tuple[str, ...], ...]
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Attached:
    """A scheduler of this rank: its class, and the parameters that it steers.

    Attributes:
        kind: Its class, with those of the schedulers that it is made of.
        groups: The parameter groups of its optimizer, by the names of the model's parameters in them; none where it
            belongs to no optimizer of the model's.
        order: Which one it is among the rank's schedulers of this kind for these groups.
    """

    kind: str
    groups: Groups
    order: int

    @property
    def names(self) -> frozenset[str]:
        """All parameters."""
        return frozenset(name for group in self.groups for name in group)


@dataclass(frozen=True, slots=True)
class SavedSchedule:
    """A saved state of a scheduler, and the ranks that had it."""

    of: Attached
    ranks: tuple[int, ...]
    state: object

    @property
    def where(self) -> str:
        """For messages: which scheduler this is."""
        names = sorted(self.of.names)
        steers = f" of {names[0]}" + (" and others" if len(names) > 1 else "") if names else ""
        return f"{self.of.kind}{steers} on rank {self.ranks[0]}"


def _as_state(entries: Sequence[SavedSchedule], world_size: int) -> dict[str, object]:
    """What was saved of schedulers, as plain containers; each state, and each list of groups, once."""
    groups = list(dict.fromkeys(entry.of.groups for entry in entries))
    states = {id(entry.state): entry.state for entry in entries}
    numbers = {known: number for number, known in enumerate(states)}
    rows = [
        {
            "kind": entry.of.kind,
            "groups": groups.index(entry.of.groups),
            "order": entry.of.order,
            "ranks": list(entry.ranks),
            "state": numbers[id(entry.state)],
        }
        for entry in entries
    ]
    return {
        "version": _VERSION,
        "world_size": world_size,
        "groups": [[list(group) for group in each] for each in groups],
        "states": list(states.values()),
        "schedulers": rows,
    }


def _parsed(state: object) -> tuple[tuple[SavedSchedule, ...], int]:
    """The saved schedulers and the number of ranks of `_as_state`; `StateFormatError` if it is something else."""
    try:
        fields = cast(dict[str, object], state)
        if fields["version"] != _VERSION:
            raise StateFormatError(f"schedulers of version {fields['version']!r}; this release reads {_VERSION}")
        listed = cast(list[list[list[str]]], fields["groups"])
        groups = [tuple(tuple(map(str, group)) for group in each) for each in listed]
        states = cast(list[object], fields["states"])
        entries = []
        for row in cast(list[dict[str, object]], fields["schedulers"]):
            of = Attached(str(row["kind"]), groups[_index(row["groups"])], _index(row["order"]))
            ranks = tuple(map(_index, cast(list[object], row["ranks"])))
            entries.append(SavedSchedule(of, ranks, states[_index(row["state"])]))
            if not ranks:
                raise StateFormatError("a scheduler's state is of no rank", hint="Restore the file.")
        return tuple(entries), _index(fields["world_size"])
    except StateFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StateFormatError(
            f"these are no schedulers' states ({type(error).__name__}: {error})", hint="Restore the file."
        ) from error


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def attached(schedulers: Sequence[Stateful], model: nn.Module | Sequence[nn.Module]) -> list[Attached]:
    """Describe this rank's schedulers: their classes, and the parameters that they steer. Local."""
    parts = [model] if isinstance(model, nn.Module) else list(model)
    names = {id(each.tensor): each.name for each in list_parameters(parts)}
    found: list[Attached] = []
    for scheduler in schedulers:
        kind, groups = kind_of(inner_of(scheduler)), _groups(inner_of(scheduler), names)
        order = sum(1 for other in found if (other.kind, other.groups) == (kind, groups))
        found.append(Attached(kind, groups, order))
    return found


def _groups(scheduler: object, names: Mapping[int, str]) -> Groups:
    optimizer = getattr(scheduler, "optimizer", None)
    param_groups = getattr(optimizer, "param_groups", None)
    if not isinstance(param_groups, list):
        # A container of schedulers, such as those of training frameworks.
        inside = getattr(scheduler, "schedulers", None)
        each = [_groups(inner_of(one), names) for one in inside] if isinstance(inside, list | tuple) else []
        return tuple(group for groups in each for group in groups)
    found = tuple(tuple(names[id(p)] for p in group["params"] if id(p) in names) for group in param_groups)
    return found if any(found) else ()


def inner_of(scheduler: object) -> object:
    """The scheduler itself, where another object only passes on to it (accelerate's)."""
    inner = scheduler
    while not isinstance(inner, LRScheduler) and isinstance(getattr(inner, "scheduler", None), LRScheduler):
        inner = getattr(inner, "scheduler")  # noqa: B009 - of no declared type
    return inner


def kind_of(scheduler: object) -> str:
    """Name of a scheduler's class, with those of the schedulers that it is made of."""
    inside = inner_schedulers(scheduler)
    if isinstance(scheduler, LRScheduler) and isinstance(inside, list | tuple) and inside:
        return f"{type(scheduler).__name__}[{', '.join(map(kind_of, inside))}]"
    return type(scheduler).__name__


def capture_schedules(schedulers: Sequence[Stateful], model: nn.Module | Sequence[nn.Module]) -> tuple[bytes, bytes]:
    """This rank's schedulers now: what they steer, and their states; both empty where there are none. Local."""
    if not schedulers:
        return b"", b""
    rows = [[each.kind, [list(group) for group in each.groups], each.order] for each in attached(schedulers, model)]
    states = [scheduler.state_dict() for scheduler in schedulers]
    return joined(pack_state(rows)), joined(pack_state(states))


def merge_schedules(
    attachments: Sequence[DistinctValue], states: Sequence[DistinctValue], world_size: int
) -> dict[str, bytes]:
    """All ranks' distinct values of `capture_schedules` as one packed state; empty where no rank has any. Local."""
    entries = []
    read = [(own.ranks, cast(list[object], unpack_state(split(own.blob)))) for own in states]
    for own in attachments:
        rows = cast(list[list[object]], unpack_state(split(own.blob)))
        for number, (kind, groups, order) in enumerate(rows):
            of = Attached(str(kind), tuple(tuple(group) for group in cast(list[list[str]], groups)), cast(int, order))
            for their_ranks, their_states in read:
                ranks = tuple(sorted({*own.ranks} & {*their_ranks}))
                if ranks:
                    entries.append(SavedSchedule(of, ranks, their_states[number]))
    entries.sort(key=lambda entry: entry.ranks[0])
    return pack_state(_as_state(entries, world_size)) if entries else {}


class DistinctValue(NamedTuple):
    """A value as bytes, and the ranks in the group that have it, ascending."""

    blob: bytes
    ranks: tuple[int, ...]


def gather_distinct(group: Group, blobs: Sequence[bytes]) -> list[list[DistinctValue]]:
    """Gather several values from all ranks, and return the distinct ones of each but empty ones. All ranks call.

    Many ranks have equal values, so only digests and one copy of each distinct value are sent, in the order of ranks.
    """
    own = [hashlib.blake2b(blob, digest_size=16).hexdigest() if blob else "" for blob in blobs]
    everyone = group.gather_json(own, "comparing states")
    found = []
    for number, blob in enumerate(blobs):
        digests = [theirs[number] for theirs in everyone]
        rows = []
        for digest in filter(None, dict.fromkeys(digests)):
            ranks = tuple(rank for rank, theirs in enumerate(digests) if theirs == digest)
            raw = group.broadcast_bytes(blob if group.rank == ranks[0] else b"", ranks[0], "exchanging states")
            rows.append(DistinctValue(raw, ranks))
        found.append(rows)
    return found


SCHEDULER_STATE = "scheduler"
#: An attribute of torch's schedulers that some releases lack.
MAY_LACK = {"verbose"}
_BUILD = "Build the scheduler that the checkpoint was saved with; or restore without it, and it starts afresh."


@dataclass(frozen=True, slots=True)
class FoundSchedules:
    """This rank's schedulers, each with its state, not yet loaded; and all entries that were saved.

    Attributes:
        used: Numbers of the entries that this rank's schedulers are restored from, with equivalent ones.
        chosen: Keys with different values on ranks of one scheduler, where the lowest rank's value was taken.
    """

    schedules: tuple[tuple[Stateful, dict[str, object]], ...] = ()
    entries: tuple[SavedSchedule, ...] = ()
    used: frozenset[int] = frozenset()
    chosen: tuple[str, ...] = ()


def saved_schedules(
    schedulers: Sequence[Stateful],
    own: Sequence[Attached],
    renamed: Callable[[str, frozenset[str]], str],
    kinds: Sequence[str],
    directory: Path,
    group: Group,
) -> FoundSchedules:
    """The state of each of some schedulers, which ``own`` describes. Local; nothing is changed.

    ``renamed`` gives the name under which a parameter was saved, of its name and those that were saved; ``kinds`` are
    the classes of schedulers that an older release saved.
    """
    stem = directory / SCHEDULER_STATE
    path = stem.with_name(f"{SCHEDULER_STATE}.json")
    if not has_state(stem):
        raise no_scheduler(path)
    states = read_state(stem)
    if isinstance(states, list):
        return _by_position(schedulers, states, kinds, path)
    try:
        saved, saved_world_size = _parsed(states)
    except StateFormatError as error:
        error.path = error.path or str(path)
        raise
    every = frozenset(name for entry in saved for name in entry.of.names)
    match = _Match(saved, group.rank if saved_world_size == group.world_size else None, len(schedulers), path)
    found, used, chosen = [], set[int](), dict[str, None]()
    for scheduler, each in zip(schedulers, own, strict=True):
        groups = tuple(tuple(renamed(name, every) for name in group) for group in each.groups)
        state, entries, differing = match.find(inner_of(scheduler), replace(each, groups=groups))
        found.append((scheduler, cast(dict[str, object], state)))
        used |= entries
        chosen |= dict.fromkeys(differing)
    return FoundSchedules(tuple(found), saved, frozenset(used), tuple(chosen))


@dataclass(frozen=True, slots=True)
class _Match:
    """Finds the states of ``count`` schedulers; no ``rank`` where another number of ranks restores than saved."""

    saved: Sequence[SavedSchedule]
    rank: int | None
    count: int
    path: Path

    def find(self, scheduler: object, own: Attached) -> tuple[object, set[int], list[str]]:
        """A scheduler's state, the numbers of the entries that it restores, and the keys in which ranks differed."""
        numbered = self._candidates(scheduler, own)
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

    def _candidates(self, scheduler: object, own: Attached) -> list[tuple[int, SavedSchedule]]:
        """The entries that steer any of a scheduler's parameters, of its class and order.

        Of one without parameters: those without, or else all, to be matched by class and order.
        """
        everything = list(enumerate(self.saved))
        if own.names:
            found = [each for each in everything if not own.names.isdisjoint(each[1].of.names)]
            if not found:
                raise MisuseError(
                    f"no scheduler in the checkpoint steers {min(own.names)}, as the {own.kind} to be restored does",
                    path=self.path,
                    hint="Build schedulers for the optimizers that the checkpoint was saved with.",
                )
        else:
            found = [each for each in everything if not each[1].of.names] or everything
        of_kind = [each for each in found if each[1].of.kind == own.kind]
        if not of_kind and isinstance(scheduler, LRScheduler):
            raise _other_kind(found[0][1].of.kind, own.kind, self.path)
        of_kind = of_kind or found
        ordered = [each for each in of_kind if each[1].of.order == own.order]
        if not ordered:
            first = of_kind[0][1]
            count = sum(1 for entry in self.saved if first.ranks[0] in entry.ranks)
            which = f"; only {own.order} of them as {own.kind} for {first.where}"
            raise other_number(count, self.count, self.path, which)
        return ordered


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
        raise other_number(len(states), len(schedulers), path, "")
    for number, (scheduler, state) in enumerate(zip(schedulers, states, strict=True)):
        inner = inner_of(scheduler)
        if isinstance(inner, LRScheduler):
            _check_fit(inner, state, kinds[number] if number < len(kinds) else "", path)
    return FoundSchedules(tuple(zip(schedulers, cast(list[dict[str, object]], states), strict=True)))


def other_number(saved: int, wanted: int, path: Path, which: str, names: str = "") -> MisuseError:
    """The error where as many schedulers were saved and others are to be restored."""
    return MisuseError(
        f"{saved} {'scheduler was' if saved == 1 else 'schedulers were'} saved{names} and "
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
    mine, saved = ({key for key in each if not key.startswith("_")} - MAY_LACK for each in (have, state))
    if not kind and mine - saved and saved - mine:
        raise MisuseError(
            f"the checkpoint's scheduler is no {own}: it has {sorted(saved - mine)} and lacks {sorted(mine - saved)}",
            path=path,
            hint=_BUILD,
        )
    check_rates("", have, state, path)


def check_rates(called: str, own: Mapping[str, object], saved: Mapping[object, object], path: Path) -> None:
    """Raise `MisuseError` if two states of a scheduler have learning rates of other numbers of groups."""
    rates, saved_rates = own.get("base_lrs"), saved.get("base_lrs")
    if isinstance(rates, list) and isinstance(saved_rates, list) and len(rates) != len(saved_rates):
        raise MisuseError(
            f"the checkpoint's scheduler{called} has learning rates of {len(saved_rates)} parameter groups and the one "
            f"to be restored of {len(rates)}",
            path=path,
            hint="Build the optimizer with the same parameter groups as when the checkpoint was saved.",
        )


def no_scheduler(path: Path) -> CheckpointNotFoundError:
    """The error where a scheduler is to be restored and none was saved."""
    return CheckpointNotFoundError(
        "the checkpoint was saved without a scheduler",
        path=path,
        hint="Restore without a scheduler, or choose a checkpoint that has one.",
    )


#: Attributes of torch's schedulers with one value for each parameter group. Source: ``torch.optim.lr_scheduler``.
_OF_GROUPS = frozenset({"base_lrs", LAST_RATES, "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})
_HINT = (
    "Build optimizers and schedulers with the parameter groups that the checkpoint was saved with; or restore without "
    "the scheduler, and it starts afresh."
)


#: A group of a saved scheduler: the number of the scheduler among the sources, and of the group in it.
_Place = tuple[int, int]


def composed(sources: Sequence[SavedSchedule], groups: Groups, own: Mapping[str, object]) -> object:
    """The state of one of torch's schedulers, of the saved ones that steered its parameters. Local.

    ``groups`` has the names of the checkpoint. A group of which no saved scheduler steered a parameter keeps its values
    in ``own``, the state that the scheduler has now. Saved values that differ where there is one now are a
    `MisuseError`.
    """
    first = sources[0]
    if len(sources) == 1 and [{*group} for group in first.of.groups] == [{*group} for group in groups]:
        return first.state
    places = [_places(sources, group, number) for number, group in enumerate(groups)]
    return _merged([source.state for source in sources], _Merge(sources, places), own, "")


def _places(sources: Sequence[SavedSchedule], group: Sequence[str], number: int) -> list[_Place]:
    wanted = {*group}
    found = [
        (source, index)
        for source, saved in enumerate(sources)
        for index, names in enumerate(saved.of.groups)
        if not wanted.isdisjoint(names)
    ]
    if not found and not group and all(number < len(saved.of.groups) for saved in sources):
        # A group without parameters is known by its number alone.
        found = [(source, number) for source in range(len(sources))]
    return found


@dataclass(frozen=True, slots=True)
class _Merge:
    """The saved schedulers, and for each group of the result its places in them."""

    sources: Sequence[SavedSchedule]
    places: Sequence[Sequence[_Place]]


def _merged(values: Sequence[object], merge: _Merge, own: object, key: str) -> object:
    first = values[0]
    name = key.rpartition(".")[2]
    if name in _OF_GROUPS and all(
        isinstance(value, list | tuple) and len(value) == len(source.of.groups)
        for value, source in zip(values, merge.sources, strict=True)
    ):
        return _by_group(values, merge, own, key)
    if isinstance(first, Mapping) and all(
        isinstance(value, Mapping) and value.keys() == first.keys() for value in values
    ):
        theirs = own if isinstance(own, Mapping) else {}
        pairs = {k: [v[k] for v in values if isinstance(v, Mapping)] for k in first}
        merged = {k: _merged(each, merge, theirs.get(k), f"{key}.{k}" if key else str(k)) for k, each in pairs.items()}
        # Counters and ordered dictionaries have no groups inside.
        return merged if type(first) is dict else _same(values, merge, key)
    if name == INNER_SCHEDULERS and all(isinstance(v, list) and len(v) == len(values[0]) for v in values):  # type: ignore[arg-type]
        lists = [v for v in values if isinstance(v, list)]
        owns = own if isinstance(own, list) and len(own) == len(lists[0]) else [None] * len(lists[0])
        return [_merged([v[n] for v in lists], merge, owns[n], f"{key}[{n}]") for n in range(len(lists[0]))]
    return _same(values, merge, key)


def _by_group(values: Sequence[object], merge: _Merge, own: object, key: str) -> list[object]:
    found: list[object] = []
    for number, places in enumerate(merge.places):
        if not places:
            if not isinstance(own, list | tuple) or number >= len(own):
                raise MisuseError(
                    f"the checkpoint has no scheduler for parameter group {number}: it lacks {key} of it", hint=_HINT
                )
            found.append(own[number])
            continue
        each = [cast("Sequence[object]", values[source])[group] for source, group in places]
        for (source, _), value in zip(places, each, strict=True):
            if not equal(value, each[0]):
                raise MisuseError(
                    f"parameters of group {number} were saved in groups with different {key}: {each[0]!r} in "
                    f"{merge.sources[places[0][0]].where}, {value!r} in {merge.sources[source].where}",
                    hint=_HINT,
                )
        found.append(each[0])
    return found


def _same(values: Sequence[object], merge: _Merge, key: str) -> object:
    first = values[0]
    for source, value in zip(merge.sources, values, strict=True):
        if not equal(first, value):
            raise MisuseError(
                f"the saved schedulers of these parameters have different {key or 'states'}: {_short(first)} in "
                f"{merge.sources[0].where}, {_short(value)} in {source.where}",
                hint=_HINT,
            )
    if (
        isinstance(first, list)
        and any(len(first) == len(source.of.groups) != len(merge.places) for source in merge.sources)
        and key.rpartition(".")[2] not in (MILESTONES, "milestones")
    ):
        raise MisuseError(
            f"the saved scheduler has {len(first)} values as {key}, perhaps one for each of its parameter groups, and "
            f"the one to be restored has {len(merge.places)} groups",
            hint=_HINT,
        )
    return first


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
