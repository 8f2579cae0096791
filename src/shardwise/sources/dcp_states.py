"""Values of a DCP directory beside model and optimizer: schedulers, counters, other state of a training loop."""

from __future__ import annotations

import re

from shardwise.errors import CheckpointNotFoundError, MisuseError
from shardwise.sources.dcp_model import DcpPath, find_model, model_below
from shardwise.sources.dcp_optimizers import optimizer_places
from shardwise.sources.dcp_values import DcpValues, nested
from shardwise.upstream.torch_modules import STEP_COUNT

_SCHEDULER_NAME = re.compile(r"sched", re.IGNORECASE)
#: State of torch's schedulers: all have the first entry, and each has one of the others.
_SCHEDULER_KEYS = ("last_epoch", frozenset({STEP_COUNT, "base_lrs", "num_bad_epochs"}))


def state_at(values: DcpValues, place: DcpPath) -> object:
    """The value below a place of the state dict, as before DCP flattened it; empty dictionaries are lost."""
    names = [name for name, path in values.paths.items() if path[: len(place)] == place]
    read = values.values(names)
    return nested({values.paths[name][len(place) :]: read[name] for name in names})


def place_called(values: DcpValues, name: str) -> DcpPath:
    """The place of the entry ``name``: its path in the state dict, joined by dots.

    Raises:
        CheckpointNotFoundError: There is no such state; lists those that exist.
    """
    for path in values.paths.values():
        for length in range(1, len(path) + 1):
            if ".".join(map(str, path[:length])) == name:
                return path[:length]
    raise CheckpointNotFoundError(
        f"the checkpoint has no extra state {name!r}",
        path=values.directory,
        hint=f"It has {', '.join(components(values)) or 'nothing beside a model'}: leave it out of extra_state, or "
        "choose a checkpoint that has it.",
    )


def scheduler_places(values: DcpValues) -> list[DcpPath]:
    """The places of schedulers: entries of that name, or with the state of torch's schedulers. Reads no item."""
    children: dict[DcpPath, set[str]] = {}
    for path in values.paths.values():
        for length in range(len(path)):
            children.setdefault(path[:length], set()).add(str(path[length]))
    torchs = [
        place
        for place, keys in children.items()
        if _SCHEDULER_KEYS[0] in keys and not keys.isdisjoint(_SCHEDULER_KEYS[1])
    ]
    called = [place for place in torchs if any(_SCHEDULER_NAME.search(str(part)) for part in place)]
    found = _outermost(called or torchs)
    if found:
        return found
    # Another's class, or torch's as one value.
    named = {
        path[: number + 1]
        for path in values.paths.values()
        for number, part in enumerate(path)
        if isinstance(part, str) and _SCHEDULER_NAME.search(part)
    }
    own = {name for names in optimizer_places(values).values() for name in names} | values.tensors
    heads = [
        place for place in named if any(_is_below(values, place, name) for name in values.paths if name not in own)
    ]
    lists = {place: {key for key in children.get(place, ()) if key.isdecimal()} for place in heads}
    return [
        inner
        for place in _outermost(heads)
        for inner in ([(*place, int(key)) for key in sorted(lists[place], key=int)] or [place])
    ]


def _is_below(values: DcpValues, place: DcpPath, name: str) -> bool:
    return values.paths[name][: len(place)] == place


def _outermost(places: list[DcpPath]) -> list[DcpPath]:
    every = set(places)
    return [p for p in places if not any(p[:length] in every for length in range(len(p)))]


def components(values: DcpValues, model_place: str | None = None) -> list[str]:
    """The entries beside a model: ``optimizer``, ``scheduler``, and the places of all others. Reads no item.

    ``model_place`` is what DCP's names of the model have in front, where that is known.
    """
    optimizers = optimizer_places(values)
    schedulers = scheduler_places(values)
    known = {name for names in optimizers.values() for name in names}
    try:
        if model_place is None:
            model = find_model(values.metadata, values.directory)
        else:
            model = model_below(values.metadata, values.directory, model_place, ())
        known |= {*model.names.values()}
    except MisuseError:
        pass  # there is none, or the caller has to say which part it is
    paths = list(values.paths.values())
    common = _common(paths)
    rest = [
        ".".join(map(str, path[: common + 1]))
        for name, path in values.paths.items()
        if name not in known and not any(path[: len(place)] == place for place in schedulers)
    ]
    return ["optimizer"] * bool(optimizers) + ["scheduler"] * bool(schedulers) + list(dict.fromkeys(rest))


def _common(paths: list[DcpPath]) -> int:
    """The number of leading parts that all paths share, less than the length of any."""
    shortest = min((len(path) - 1 for path in paths), default=0)
    length = 0
    while length < shortest and len({path[length] for path in paths}) == 1:
        length += 1
    return length
