"""Optimizer options and plain values that several ranks hold for one parameter: they agree, or it is an error.

A parameter group's options and what an optimizer keeps of a parameter beside tensors are saved once for each parameter.
Ranks that hold parts of the same parameter have the same ones; where they have not, saving one rank's would lose the
others', and taking options from one rank and values from another would be a mix that no rank had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from shardwise.errors import ReplicasDifferError
from shardwise.stateful_wrappers.optimizer import OptimizerRecord, SavedGroup, label_of
from shardwise.stateful_wrappers.optimizer_classes import equal

_SHOWN = 4


class RankRecord(NamedTuple):
    """An optimizer's record, and the ranks that have it, in order."""

    record: OptimizerRecord
    ranks: tuple[int, ...]


def agreed(records: Sequence[RankRecord], may_differ: Callable[[str], bool]) -> list[OptimizerRecord]:
    """The records, each parameter with the options and values of the lowest rank that has it. Local.

    Args:
        records: Every different record, in the order of the first rank that has it.
        may_differ: Whether the lowest rank's are saved for all, by the parameter's name.

    Raises:
        ReplicasDifferError: Ranks differ in a parameter that may not; it names option and ranks.
    """
    owners: _Owners = {}
    found: list[OptimizerRecord] = []
    differences: list[_Difference] = []
    for own in records:
        dropped: set[str] = set()
        for group in own.record.groups:
            for name in group.params:
                # An optimizer around another one has a group of the same parameters.
                label = label_of(group.slot, name)
                if label not in owners:
                    owners[label] = (own, group)
                    continue
                first, theirs = owners[label]
                if first is own:
                    continue
                differing = _differences(label, (first, theirs), (own, group))
                if differing:
                    dropped.add(label)
                    differences += [] if may_differ(name) else differing
        found.append(_without(own.record, dropped, owners) if dropped else own.record)
    if differences:
        raise ReplicasDifferError(
            _message(differences),
            tensor=differences[0].name,
            hint="Make them the same on every rank before saving; or set replicas to 'first', and the lowest rank's "
            "are saved for all.",
        )
    return found


#: Label of a parameter's state -> the first record and group that have it.
_Owners = dict[str, tuple[RankRecord, SavedGroup]]


class _Difference(NamedTuple):
    name: str
    key: str
    values: tuple[object, object]
    ranks: tuple[tuple[int, ...], tuple[int, ...]]


def _differences(
    name: str, one: tuple[RankRecord, SavedGroup], other: tuple[RankRecord, SavedGroup]
) -> list[_Difference]:
    (first, group), (second, their_group) = one, other
    ranks = (first.ranks, second.ranks)
    found = []
    if group is not their_group and group.kind != their_group.kind:
        found.append(_Difference(name, "optimizer", (group.kind, their_group.kind), ranks))
    found += [_Difference(name, *row, ranks) for row in _unequal(group.options, their_group.options)]
    values, theirs = first.record.values.get(name), second.record.values.get(name)
    if values is not None and theirs is not None:
        found += [_Difference(name, *row, ranks) for row in _unequal(values, theirs)]
    return found


_ABSENT = object()


def _unequal(one: Mapping[str, object], other: Mapping[str, object]) -> list[tuple[str, tuple[object, object]]]:
    keys = dict.fromkeys([*one, *other])
    pairs = [(key, (one.get(key, _ABSENT), other.get(key, _ABSENT))) for key in keys]
    return [(key, pair) for key, pair in pairs if not _same(*pair)]


def _same(one: object, other: object) -> bool:
    if one is _ABSENT or other is _ABSENT:
        return one is other
    both_nan = isinstance(one, float) and isinstance(other, float) and one != one and other != other
    return both_nan or equal(one, other)


def _message(differences: Sequence[_Difference]) -> str:
    by_key: dict[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]], list[_Difference]] = {}
    for each in differences:
        by_key.setdefault((each.key, each.ranks), []).append(each)
    lines = []
    for (key, (ranks, others)), members in list(by_key.items())[:_SHOWN]:
        one, other = map(_shown, members[0].values)
        more = f" and {len(members) - 1} more parameters" if len(members) > 1 else ""
        lines.append(f"{key} of {members[0].name}{more} is {one} on {_ranks(ranks)} and {other} on {_ranks(others)}")
    rest = f"; and {len(by_key) - _SHOWN} more" if len(by_key) > _SHOWN else ""
    return f"the optimizers of ranks that hold the same parameters differ: {'; '.join(lines)}{rest}"


def _shown(value: object) -> str:
    return "absent" if value is _ABSENT else repr(value)[:60]


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks[:_SHOWN]))
    return f"ranks {listed}" + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _without(record: OptimizerRecord, dropped: set[str], owners: _Owners) -> OptimizerRecord:
    """The record without options and values of parameters for which another rank's are saved."""
    groups = []
    for group in record.groups:
        params = tuple(name for name in group.params if label_of(group.slot, name) not in dropped)
        if params or not group.params:
            groups.append(replace(group, params=params))
    values = dict(record.values)
    for name in dropped & values.keys():
        kept = owners[name][0].record.values.get(name)
        if kept is not None:
            values[name] = kept
    return replace(record, groups=tuple(groups), values=values)
