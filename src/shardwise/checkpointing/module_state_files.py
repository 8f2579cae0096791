"""State of modules beside ordinary tensors: extra state, quantized weights, and the versions that torch notes.

It is saved in a separate directory beside the model's tensors, in files of JSON and tensors, and is not part of an
export. Each value is written by the lowest rank that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.comm import Group
from shardwise.disk.names import files_under, is_file
from shardwise.disk.storage import Storage
from shardwise.engine.jobs import Step
from shardwise.engine.records import ComponentRecord, write_state
from shardwise.errors import ModuleStateError, StateFormatError
from shardwise.format.notes import ASIDE_DIR
from shardwise.sources.state_files import pack_state, read_state
from shardwise.stateful_wrappers.names import Listing
from shardwise.stateful_wrappers.units import Aside

_VERSION = 1


@dataclass(frozen=True, slots=True)
class SavedModuleState:
    """The module state saved beside a model's tensors.

    ``metadata`` has what torch keeps of each module (its version), by the module's plain name.
    """

    values: Mapping[str, object]
    metadata: Mapping[str, Mapping[str, object]]


def module_state_names(listing: Listing | None) -> list[list[str]]:
    """Names of a model's values beside its tensors, and names of its modules with torch metadata."""
    return [[], []] if listing is None else [sorted(listing.aside), sorted(listing.metadata)]


def module_state_step(
    listing: Listing | None, everyone: Sequence[list[list[str]]], directory: Path, group: Group, storage: Storage
) -> Step:
    """Capture this rank's part of the module state now, and return the step that writes it. All ranks call.

    ``everyone`` has the `module_state_names` of each rank, ``directory`` is the model's. A value that cannot be stored
    is a `ModuleStateError` that names the module.
    """
    values = {} if listing is None else listing.aside
    metadata = {} if listing is None else listing.metadata
    stem = directory / ASIDE_DIR / f"state-{group.rank + 1:05d}"

    def take() -> dict[str, bytes]:
        below = {name for names, _ in everyone[: group.rank] for name in names}
        noted = {name for _, names in everyone[: group.rank] for name in names}
        own = {name: value for name, value in values.items() if name not in below}
        own_notes = {name: dict(found) for name, found in metadata.items() if name not in noted}
        return _packed(own, own_notes) if own or own_notes else {}

    packed = group.attempt(take, "taking what modules have beside tensors")

    def write(group: Group) -> ComponentRecord:
        record = ComponentRecord()
        with group.together(f"writing {stem.parent}"):
            if packed:
                storage.make_directory(stem.parent)
                record = write_state(storage, stem, packed)
                storage.sync_directory(stem.parent)
                storage.sync_directory(directory)
        return record.below(ASIDE_DIR)

    return write


def _packed(values: Mapping[str, Aside], metadata: Mapping[str, Mapping[str, object]]) -> dict[str, bytes]:
    plain = {name: _plain(value) for name, (value, _) in values.items()}
    try:
        return pack_state({"version": _VERSION, "values": plain, "metadata": metadata})
    except StateFormatError as failure:
        for name, (value, label) in values.items():  # which of them it is
            try:
                pack_state(_plain(value))
            except StateFormatError as error:
                raise ModuleStateError(
                    f"{label} gives for its state what cannot be stored without pickle: {error.message}",
                    tensor=name,
                    hint="Let get_extra_state return a tensor, or numbers, text, bytes, lists, tuples and dicts of "
                    "such.",
                ) from error
        raise ModuleStateError(
            f"what torch notes of the modules' versions cannot be stored: {failure.message}", hint=failure.hint
        ) from failure


def _plain(value: object) -> object:
    """A value with its parameters replaced by plain tensors."""
    if isinstance(value, nn.Parameter) and not isinstance(value, DTensor):
        return value.detach().as_subclass(torch.Tensor)
    if type(value) is tuple:
        return tuple(map(_plain, value))
    if type(value) is list:
        return list(map(_plain, value))
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return value


def find_module_state(path: Path) -> list[str]:
    """The stems of the files of module state beside the model at ``path``; none in other tools' checkpoints. Local."""
    places = (path, path.parent, path.parent.parent) if is_file(path) else (path, path.parent)
    for place in places:
        found = [path for path in files_under(place / ASIDE_DIR) if path.match("state-*.json")]
        if found:
            return [str(file.with_suffix("")) for file in found]
    return []


def is_own_module_state(path: Path, stems: Sequence[str]) -> bool:
    """Whether the files that `find_module_state` found belong to this directory, not to the one around an export."""
    return bool(stems) and Path(stems[0]).parent.parent == path


def read_module_state(stems: Sequence[str]) -> SavedModuleState | None:
    """Read what `module_state_step` wrote, if anything; `StateFormatError` if a file is damaged. Local."""
    if not stems:
        return None
    values: dict[str, object] = {}
    metadata: dict[str, Mapping[str, object]] = {}
    for stem in stems:
        state = read_state(Path(stem))
        fields = state if isinstance(state, dict) else {}
        own, noted = fields.get("values"), fields.get("metadata")
        if fields.get("version") != _VERSION or not isinstance(own, dict) or not isinstance(noted, dict):
            raise StateFormatError(
                f"this is not the state of modules; this release reads version {_VERSION}",
                path=f"{stem}.json",
                hint="Restore the file, or choose another checkpoint.",
            )
        values |= own
        metadata |= {str(name): dict(found) for name, found in noted.items() if isinstance(found, dict)}
    return SavedModuleState(values, metadata)
