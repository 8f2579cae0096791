"""Finds the tensors of a model under the names they were saved under, where modules shared them in the save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from operator import attrgetter
from typing import cast

from shardwise.checkpointing.hub import HubState
from shardwise.comm import Group, JsonValue
from shardwise.convert import rename
from shardwise.engine.missing_files import saved_aliases
from shardwise.sources.sources import Source

_NAME = attrgetter("spec.name")


@dataclass(frozen=True)
class Aliased:
    """A source with tensors under additional names.

    Attributes:
        source: The source.
        kept: Added alias -> the name under which the tensor is saved.
    """

    source: Source
    kept: Mapping[str, str] = field(default_factory=dict)


def names_lacking(source: Source, hub: HubState) -> list[str]:
    """Names of the model's tensors that the source lacks. Local."""
    # Walked by the interpreter itself, since every load of a model goes through here.
    lacking = list(filterfalse(source.tensors.__contains__, map(_NAME, hub.held)))
    return lacking + [s.name for held in hub.groups for s in held.computed.hub if s.name not in source.tensors]


def with_aliases(
    source: Source, hub: HubState, lacking: Sequence[str], key_mapping: Mapping[str, str] | None, group: Group
) -> Aliased:
    """Add aliases of saved tensors, under names that a rank's model has and the files lack.

    All ranks of the group call if any of them lacks a name, and get the same result. One rank reads the manifest.

    Args:
        source: The source to load from.
        hub: What this rank holds.
        lacking: The `names_lacking` on this rank.
        key_mapping: What the source's names were passed through.
        group: The ranks that load together.
    """
    received = group.broadcast_result(
        lambda: dict(_renamed(saved_aliases(source), key_mapping)), "reading which tensors were shared"
    )
    aliases = {name: str(kept) for name, kept in cast(dict[str, JsonValue], received).items()}
    if not aliases:
        return Aliased(source)
    lacking = list(lacking)
    # A source of native names, such as a DCP directory, has native aliases.
    lacking += filterfalse(source.tensors.__contains__, map(_NAME, hub.native))
    own = cast(JsonValue, sorted(aliases.keys() & set(lacking)))
    wanted = {
        str(name) for theirs in group.gather_json(own, "comparing shared tensors") for name in cast(list[str], theirs)
    }
    found = {name: aliases[name] for name in sorted(wanted) if aliases[name] in source.tensors}
    added = {
        name: (tensor := source.tensors[kept])._replace(spec=tensor.spec._replace(name=name))
        for name, kept in found.items()
    }
    return Aliased(replace(source, tensors={**source.tensors, **added}), found)


def _renamed(aliases: Mapping[str, str], key_mapping: Mapping[str, str] | None) -> Mapping[str, str]:
    if not key_mapping:
        return aliases
    names = tuple(dict.fromkeys([*aliases, *aliases.values()]))
    mapping = dict(zip(names, rename(names, key_mapping), strict=True))
    return {mapping[name]: mapping[kept] for name, kept in aliases.items()}
