"""Which replicated tensors may have different values on the ranks that hold them, and what of an optimizer may not.

A parameter group's options and what an optimizer keeps of a parameter beside tensors are saved once for each parameter.
Ranks that hold parts of the same parameter have the same ones; where they have not, saving one rank's would lose the
others', and taking options from one rank and values from another would be a mix that no rank had.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from shardwise.errors import ReplicasDifferError, some
from shardwise.stateful_wrappers.names import NamedTensor
from shardwise.stateful_wrappers.optimizer import OptimizerRecord, SavedGroup, label_of
from shardwise.stateful_wrappers.state_trees import equal, values_in
from shardwise.stateful_wrappers.wrapping import plain_name, unwrap
from shardwise.upstream.torch_modules import EXTRA, UNREAD_STATE


class _Everything:
    """Contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class MayDiffer:
    """The settings for tensors whose values may differ between the ranks that hold them as replicas.

    Parameters are compared. Buffers and extra state differ between ranks while they train (statistics of their own
    batches), and the lowest rank's are saved for all, as in DistributedDataParallel's own broadcast.
    """

    all: bool = False  #: Whether nothing is compared: the lowest rank's value is saved for all (``replicas="first"``).
    #: Patterns of the names of tensors that have another value on each rank (``per_rank_state``).
    per_rank: tuple[str, ...] = ()

    def of_model(self, tensors: Sequence[NamedTensor], parts: Sequence[nn.Module]) -> Container[str]:
        """Names of the model's tensors with replicas that may differ."""
        if self.all:
            return _Everything()
        others = [named for named in tensors if not isinstance(named.tensor, nn.Parameter)]
        buffers = {
            plain_name(name)
            for part in (parts if others else ())
            for name, _ in unwrap(part).named_buffers(remove_duplicate=False)
        }
        # A tensor that is neither parameter, buffer nor extra state was made of parameters by a hook.
        names = {named.name: (named.name, *named.aliases) for named in others}
        found = {n for n, own in names.items() if any(o in buffers or o.rpartition(".")[2] == EXTRA for o in own)}
        return found | {named.name for named in self.own(tensors)}

    def of_adapter(self, tensors: Iterable[tuple[str, torch.Tensor]], parts: Sequence[nn.Module]) -> Container[str]:
        """As `of_model`, for the tensors of an adapter by their names in its file."""
        if self.all:
            return _Everything()
        buffers = {id(buffer) for part in parts for buffer in part.buffers()}
        return {name for name, tensor in tensors if id(tensor) in buffers}

    def of_state(self, names: Iterable[tuple[str, str]]) -> Container[str]:
        """Names of an optimizer's state tensors with replicas that may differ, of pairs with the parameter."""
        if self.all:
            return _Everything()
        return {name for name, parameter in names if self.is_own(parameter)} if self.per_rank else frozenset()

    def own(self, tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
        """The tensors that have another value on each rank."""
        if not self.per_rank:
            return []
        return [named for named in tensors if any(map(self.is_own, (named.name, *named.aliases)))]

    @staticmethod
    def matches(pattern: str, names: Iterable[str]) -> bool:
        """Whether a pattern matches any of ``names``."""
        return any(fnmatchcase(name, pattern) for name in names)

    def is_own(self, name: str) -> bool:
        """Whether the tensor called ``name`` has another value on each rank."""
        return any(fnmatchcase(name, pattern) for pattern in self.per_rank)


# --- an optimizer's options and plain values -------------------------------------------------------------------------


_SHOWN = 4


class RankRecord(NamedTuple):
    """An optimizer's record, and the ranks that have it, in order."""

    record: OptimizerRecord
    ranks: tuple[int, ...]


def agreed(records: Sequence[RankRecord], may_differ: Callable[[str], bool]) -> list[OptimizerRecord]:
    """The records, each parameter with the options and values of the lowest rank that has it. Local.

    The records are the different ones, in the order of the first rank. Ranks that differ in a parameter of which
    ``may_differ`` does not say that the lowest rank's are saved for all raise `ReplicasDifferError`.
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
    values, theirs = _beside_tensors(first.record, name), _beside_tensors(second.record, name)
    if values is not None and theirs is not None:
        unread = UNREAD_STATE.get(group.kind, ())
        found += [_Difference(name, *row, ranks) for row in _unequal(values, theirs) if row[0] not in unread]
    return found


def _beside_tensors(record: OptimizerRecord, name: str) -> Mapping[str, object] | None:
    return dict(values_in(record.trees[name])) if name in record.trees else record.values.get(name)


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
    return f"rank{'s' if len(ranks) > 1 else ''} {some(ranks, _SHOWN)}"


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
