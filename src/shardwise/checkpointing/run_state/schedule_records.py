"""The saved form of schedulers: each distinct state once, with its ranks and the parameters that it steers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.comm import Group, JsonValue
from shardwise.errors import StateFormatError
from shardwise.sources.state_files import joined, pack_state, split, unpack_state
from shardwise.stateful_wrappers.names import list_parameters
from shardwise.upstream.torch_optim import inner_schedulers

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


@dataclass(frozen=True, slots=True)
class SavedSchedules:
    """All that was saved of schedulers, and the number of ranks that saved."""

    entries: tuple[SavedSchedule, ...]
    world_size: int

    def to_state(self) -> dict[str, object]:
        """As plain containers; each state, and each list of groups, once."""
        groups = list(dict.fromkeys(entry.of.groups for entry in self.entries))
        states: list[object] = []
        rows = []
        known: dict[int, int] = {}
        for entry in self.entries:
            if id(entry.state) not in known:
                known[id(entry.state)] = len(states)
                states.append(entry.state)
            rows.append(
                {
                    "kind": entry.of.kind,
                    "groups": groups.index(entry.of.groups),
                    "order": entry.of.order,
                    "ranks": list(entry.ranks),
                    "state": known[id(entry.state)],
                }
            )
        return {
            "version": _VERSION,
            "world_size": self.world_size,
            "groups": [[list(group) for group in each] for each in groups],
            "states": states,
            "schedulers": rows,
        }

    @staticmethod
    def from_state(state: object) -> SavedSchedules:
        """Parse what `to_state` gave; `StateFormatError` if it is something else."""
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
                ranks = tuple(_index(rank) for rank in cast(list[object], row["ranks"]))
                entries.append(SavedSchedule(of, ranks, states[_index(row["state"])]))
                if not ranks:
                    raise StateFormatError("a scheduler's state is of no rank", hint="Restore the file.")
            return SavedSchedules(tuple(entries), _index(fields["world_size"]))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, StateFormatError):
                raise
            raise StateFormatError(
                f"these are no schedulers' states ({type(error).__name__}: {error})", hint="Restore the file."
            ) from error


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def attached(schedulers: Sequence[Stateful], model: nn.Module | Sequence[nn.Module]) -> list[Attached]:
    """Describe this rank's schedulers: their classes, and the parameters that they steer. Local."""
    if not schedulers:
        return []
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
    return pack_state(SavedSchedules(tuple(entries), world_size).to_state()) if entries else {}


class DistinctValue(NamedTuple):
    """A value as bytes, and the ranks in the group that have it, ascending."""

    blob: bytes
    ranks: tuple[int, ...]


def gather_distinct(group: Group, blobs: Sequence[bytes]) -> list[list[DistinctValue]]:
    """Gather several values from all ranks, and return the distinct ones of each but empty ones. All ranks call.

    Many ranks have equal values, so only digests and one copy of each distinct value are sent, in the order of ranks.
    """
    own: JsonValue = [hashlib.blake2b(blob, digest_size=16).hexdigest() if blob else "" for blob in blobs]
    everyone = cast(list[list[str]], group.gather_json(own, "comparing states"))
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
