"""Finds the model in a DCP directory that holds more than a model: the prefix of its names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.convert import rename
from shardwise.engine.load import listed_anywhere
from shardwise.engine.name_suggestions import listed
from shardwise.errors import MisuseError
from shardwise.format.dcp_metadata import read_dcp_metadata
from shardwise.sources.dcp_model import MODEL_KEYS, DcpModel, find_model, model_below, places_of
from shardwise.sources.sources import Source

_HINT = (
    "Save the model below 'model', beside the optimizer below 'optimizer'; or name what its names begin with in "
    "key_mapping, {'^NAME\\\\.': ''}."
)


@dataclass(frozen=True, slots=True)
class OwnNames:
    """The names of a rank's model: its native ones, and those in its files."""

    native: frozenset[str]
    hub: frozenset[str]


def model_part(
    source: Source, names: Callable[[], OwnNames], key_mapping: Mapping[str, str] | None, group: Group
) -> Source:
    """Select the model's tensors in a DCP directory and remove the prefix of their names. All ranks call.

    Other sources, and a directory that holds a model alone, are returned as they are.

    Args:
        source: The opened source.
        names: Returns the names of this rank's model. Local.
        key_mapping: The caller's mapping of the checkpoint's names, with or without the prefix.
        group: The ranks that load together.

    Raises:
        MisuseError: Which part is the model is not clear.
        NameCollisionError: Two tensors have the model's name.
    """
    if not source.dcp or not source.tensors:
        return source
    own = OwnNames(frozenset(), frozenset())

    def look() -> JsonValue:
        nonlocal own
        own = names()
        if key_mapping or not own.native:
            return None
        return [*dict.fromkeys([*places_of([*source.tensors], own.native), *places_of([*source.tensors], own.hub)])]

    everyone = cast("list[list[str] | None]", group.gather(look, "looking for the model"))
    place = _common([heads for heads in everyone if heads is not None], source)
    expected: frozenset[str] = frozenset()
    if place is not None:
        front = f"{place}." if place else ""
        expected = listed_anywhere([front + name for name in own.native | own.hub], source, group)

    def decide() -> JsonValue:
        metadata = read_dcp_metadata(source.path)
        try:
            model = model_below(metadata, source.path, place, expected) if place is not None else None
            model = model or find_model(metadata, source.path)
        except MisuseError as error:
            if key_mapping:
                return None  # the caller says which names are the model's
            error.hint = _HINT
            raise
        return [model.prefix, cast(JsonValue, dict(model.names))]

    found_model = group.broadcast_result(decide, f"looking for the model in {source.path}")
    if found_model is None:
        return source
    prefix, found = cast("tuple[str, dict[str, str]]", found_model)
    model = DcpModel(found, prefix)
    if key_mapping and prefix:
        mapped = frozenset(rename([*model.names.values()], key_mapping))
        covers = own.native <= mapped or own.hub <= mapped
        if not group.any(not covers, "comparing names"):
            model = DcpModel({name: name for name in model.names.values()}, "")
    return _only(source, model)


def _common(everyone: Sequence[Collection[str]], source: Source) -> str | None:
    """The prefix under which every rank's names are; ``None`` where the names do not decide it.

    Raises:
        MisuseError: There are several.
    """
    if not everyone:
        return None
    common = [head for head in everyone[0] if all(head in heads for heads in everyone)]
    called = [head for head in common if head.rpartition(".")[2] in MODEL_KEYS]
    chosen = [""] if "" in common else called if len(called) == 1 else common
    if len(chosen) > 1:
        raise MisuseError(
            f"which part of the checkpoint is the model is not clear: it fits what is below each of {listed(chosen)}",
            path=source.path,
            hint=_HINT,
        )
    return chosen[0] if chosen else None


def _only(source: Source, model: DcpModel) -> Source:
    if len(model.names) == len(source.tensors) and all(name == known for name, known in model.names.items()):
        return source
    tensors = {
        name: source.tensors[known]._replace(spec=source.tensors[known].spec._replace(name=name))
        for name, known in model.names.items()
    }
    return replace(source, tensors=tensors, below=model.prefix.removesuffix("."))
