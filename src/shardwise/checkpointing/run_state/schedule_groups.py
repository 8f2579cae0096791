"""One scheduler's state from those of several, or for other parameter groups than it was saved with.

On pipeline stages each rank's scheduler knows the groups of its stage. On another topology a scheduler gets the values
of each of its groups from the saved scheduler that steered these parameters. Values that do not belong to a group have
to be equal in all saved schedulers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from shardwise.checkpointing.run_state.schedule_records import Groups, SavedSchedule
from shardwise.errors import MisuseError
from shardwise.stateful_wrappers.state_trees import equal
from shardwise.upstream.torch_optim import INNER_SCHEDULERS, LAST_RATES, MILESTONES

#: Attributes of torch's schedulers with one value for each parameter group. Source: ``torch.optim.lr_scheduler``.
_OF_GROUPS = frozenset({"base_lrs", LAST_RATES, "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})
_HINT = (
    "Build optimizers and schedulers with the parameter groups that the checkpoint was saved with; or restore without "
    "the scheduler, and it starts afresh."
)


class _Place(NamedTuple):
    """A group of a saved scheduler: the number of the scheduler among the sources, and of the group in it."""

    source: int
    group: int


def composed(sources: Sequence[SavedSchedule], groups: Groups, own: Mapping[str, object]) -> object:
    """The state of one of torch's schedulers, of the saved ones that steered its parameters. Local.

    ``groups`` has the names of the checkpoint. A group of which no saved scheduler steered a parameter keeps its values
    in ``own``, the state that the scheduler has now.

    Raises:
        MisuseError: They differ in values that do not belong to a group, or in groups that are one now.
    """
    first = sources[0]
    if len(sources) == 1 and _alike(first.of.groups, groups):
        return first.state
    places = [_places(sources, group, number) for number, group in enumerate(groups)]
    return _merged([source.state for source in sources], _Merge(sources, places), own, "")


def _alike(one: Groups, other: Groups) -> bool:
    return len(one) == len(other) and all({*a} == {*b} for a, b in zip(one, other, strict=True))


def _places(sources: Sequence[SavedSchedule], group: Sequence[str], number: int) -> list[_Place]:
    wanted = {*group}
    found = [
        _Place(source, index)
        for source, saved in enumerate(sources)
        for index, names in enumerate(saved.of.groups)
        if not wanted.isdisjoint(names)
    ]
    if not found and not group and all(number < len(saved.of.groups) for saved in sources):
        # A group without parameters is known by its number alone.
        found = [_Place(source, number) for source in range(len(sources))]
    return found


@dataclass(frozen=True, slots=True)
class _Merge:
    """The saved schedulers, and for each group of the result its places in them."""

    sources: Sequence[SavedSchedule]
    places: Sequence[Sequence[_Place]]


def _merged(values: Sequence[object], merge: _Merge, own: object, key: str) -> object:
    first = values[0]
    name = key.rpartition(".")[2]
    if name in _OF_GROUPS and all(_is_of_groups(v, s) for v, s in zip(values, merge.sources, strict=True)):
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


def _is_of_groups(value: object, source: SavedSchedule) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(source.of.groups)


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
        each = [cast("Sequence[object]", values[place.source])[place.group] for place in places]
        for place, value in zip(places, each, strict=True):
            if not equal(value, each[0]):
                raise MisuseError(
                    f"parameters of group {number} were saved in groups with different {key}: {each[0]!r} in "
                    f"{merge.sources[places[0].source].where}, {value!r} in {merge.sources[place.source].where}",
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
