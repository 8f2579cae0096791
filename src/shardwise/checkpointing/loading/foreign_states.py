"""Schedulers and extra state that other tools saved in a DCP directory, in the form their objects load.

DCP flattens a state dict and loses its empty containers, and its loading fills the state dict that an object has. The
same is done here: empty dictionaries, which DCP cannot express, stay as the object has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch.optim.lr_scheduler import LRScheduler

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.run_state.schedulers import check_rates, no_scheduler, other_number
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.engine.name_suggestions import listed
from shardwise.errors import MisuseError, StateFormatError
from shardwise.sources.dcp_states import components, place_called, scheduler_places, state_at
from shardwise.sources.dcp_values import DcpValues, is_dcp
from shardwise.sources.state_files import joined, pack_state, split, unpack_state

#: An attribute of torch's schedulers that some releases lack.
_MAY_DIFFER = {"verbose"}
_FRESH = "Or restore without it, and it starts afresh."


@dataclass(frozen=True, slots=True)
class ForeignSchedules:
    """The schedulers' states in a DCP directory, by place, and whether they were a list there."""

    directory: Path
    states: Mapping[str, object]
    listed: bool


def read_schedules(directory: Path, group: Group, legacy: bool) -> ForeignSchedules:
    """Read what a DCP directory has of schedulers. All ranks call."""

    def read() -> dict[str, object]:
        values = DcpValues(directory, legacy)
        places = scheduler_places(values)
        states = {".".join(map(str, place)): state_at(values, place) for place in places}
        return {"states": states, "listed": all(isinstance(place[-1], int) for place in places if place)}

    found = cast("dict[str, object]", broadcast_state(read, group, f"reading the schedulers of {directory}"))
    return ForeignSchedules(directory, cast("dict[str, object]", found["states"]), cast(bool, found["listed"]))


def foreign_schedules(
    schedulers: Sequence[Stateful], found: ForeignSchedules
) -> list[tuple[Stateful, dict[str, object]]]:
    """Each scheduler with its saved state. Local; nothing is changed.

    Others, another number, or such that cannot be matched without doubt are a `MisuseError`.
    """
    path = found.directory
    if not found.states:
        raise no_scheduler(path)
    if len(found.states) != len(schedulers) or (len(schedulers) > 1 and not found.listed):
        unclear = "" if len(found.states) != len(schedulers) else ": which is which is not known"
        names = f" ({listed([*found.states])})"
        raise other_number(len(found.states), len(schedulers), path, unclear, names)
    return [
        (scheduler, _fitting(scheduler, place, state, path))
        for scheduler, (place, state) in zip(schedulers, found.states.items(), strict=True)
    ]


def _fitting(scheduler: Stateful, place: str, saved: object, path: Path) -> dict[str, object]:
    own = scheduler.state_dict()
    state = filled(own, saved)
    if not isinstance(state, dict):
        raise StateFormatError(f"what is saved as {place!r} is no scheduler's state", path=path, hint=_FRESH)
    lacking = sorted({str(key) for key in own} - {str(key) for key in state} - _MAY_DIFFER)
    if isinstance(getattr(scheduler, "scheduler", scheduler), LRScheduler):
        # Attributes with a leading underscore differ between releases of torch.
        lacking = [key for key in lacking if not key.startswith("_")]
        beyond = sorted(key for key in {*state} - {*own} - _MAY_DIFFER if not str(key).startswith("_"))
    else:
        beyond = []
    if lacking or beyond:
        raise MisuseError(
            f"the checkpoint's scheduler {place!r} is no {type(scheduler).__name__}: it has {beyond} and "
            f"lacks {lacking}",
            path=path,
            hint=f"Build the scheduler that the checkpoint was saved with. {_FRESH}",
        )
    check_rates(f" {place!r}", own, state, path)
    return state


def filled(own: object, saved: object) -> object:
    """The saved state, completed with the object's own empty containers and numeric keys."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        made = dict(saved)
        for key, value in own.items():
            known = key if key in made else str(key)
            if known in made:
                made[key] = filled(value, made.pop(known))
            elif _vanishes(value):
                made[key] = value
        return made
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [filled(one, other) for one, other in zip(own, saved, strict=True)]
    return saved


def _vanishes(value: object) -> bool:
    """Whether DCP's flattening leaves nothing of a value."""
    if isinstance(value, Mapping):
        return all(_vanishes(each) for each in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and _vanishes(v) for v in value)


def read_states(directory: Path, wanted: Iterable[str], group: Group, legacy: bool) -> dict[str, object]:
    """Extra state in a DCP directory: name -> state, of all names that any rank wants. All ranks call.

    A name is the path of a part of the state dict, joined by dots. Empty where the checkpoint is not a DCP directory.
    What cannot be read otherwise is unpickled without restrictions if ``legacy`` is true.
    """
    own = sorted(wanted)

    def describe() -> JsonValue:
        return [cast(JsonValue, own), group.is_main and is_dcp(directory)]

    gathered = cast("list[tuple[list[str], bool]]", group.gather(describe, "comparing what is to be restored"))
    names = sorted({name for theirs, _ in gathered for name in theirs})
    if not gathered[0][1] or not names:
        return {}

    def read() -> dict[str, object]:
        values = DcpValues(directory, legacy)
        return {name: state_at(values, place_called(values, name)) for name in names}

    return cast("dict[str, object]", broadcast_state(read, group, f"reading extra state of {directory}"))


def foreign_components(directory: Path, model_place: str | None = None) -> list[str]:
    """Names of what a DCP directory has beside a model; empty where it is not a DCP directory. Local.

    ``model_place`` is the prefix of the model's names in it, where that is known.
    """
    return components(DcpValues(directory), model_place) if is_dcp(directory) else []


def torch_leftovers(directory: Path) -> list[str]:
    """Files of ``torch.save`` beside model and optimizer, and directories of them, which are not read. Local."""
    found = []
    for entry in (directory / name for name in names_in(directory)):
        if entry.suffix in (".pt", ".pth") and is_file(entry):
            found.append(entry.stem)
        elif is_directory(entry) and entry.name not in ("model", "optim"):
            found += [entry.name] * any(name.endswith(".pt") for name in names_in(entry))
    return found


def broadcast_state(read: Callable[[], object], group: Group, what: str) -> object:
    """Call ``read`` on rank 0 and broadcast its result, which may hold tensors. All ranks call."""
    packed = group.attempt(lambda: joined(pack_state(read())) if group.is_main else b"", what)
    return unpack_state(split(group.broadcast_bytes(packed, 0, what)))
