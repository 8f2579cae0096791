"""Tensors of a model that files have under another name, since modules shared them in the save or tie them now.

One process has one tensor for embedding and head, and so have its files; two pipeline stages have one each. The last
stage may therefore find no tensor under its head's name in the files, and loads the embedding instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from operator import attrgetter
from typing import cast

from torch import nn

from shardwise.base.names import names_of_ties
from shardwise.checkpointing.hub import HubState
from shardwise.checkpointing.shared_names import file_name
from shardwise.comm import Group, JsonValue
from shardwise.convert import rename
from shardwise.disk.storage import Storage
from shardwise.engine.missing_files import saved_aliases
from shardwise.errors import TensorError
from shardwise.geometry import Box
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceTensor
from shardwise.sources.reader import Reader
from shardwise.sources.sources import Source
from shardwise.sources.stream import tensor_blocks
from shardwise.stateful_wrappers.names import promised_ties
from shardwise.stateful_wrappers.wrapping import unwrap


def under_saved_names(
    parts: Sequence[nn.Module], held: Sequence[HeldTensor], available: Collection[str]
) -> list[HeldTensor]:
    """Give copies of tied tensors that the files lack the name of the tensor they are tied to. Local."""
    lacking = {tensor.spec.name for tensor in held if tensor.spec.name not in available}
    found: dict[str, str] = {}
    for part in parts if lacking else ():
        ties = promised_ties([part])
        own = {name: native for native in ties if (name := file_name(part, native)) in lacking}
        found |= names_of_ties(unwrap(part), own, ties, list(available))
    if not found:
        return list(held)
    return [t._replace(spec=t.spec._replace(name=found.get(t.spec.name, t.spec.name))) for t in held]


def untied(source: Source, ties: Sequence[JsonValue], group: Group, storage: Storage) -> Source:
    """The source with each tensor that the model ties under one name: other tools write both, or the other one.

    All ranks call. ``ties`` are every rank's: the name that is not kept -> the name that is. Where the source has both,
    they are compared, by one rank each; if they differ, one would be lost, which is a `TensorError`.
    """
    tensors = dict(source.tensors)
    pairs = {alias: str(name) for theirs in ties if isinstance(theirs, dict) for alias, name in theirs.items()}
    twice = sorted((alias, name) for alias, name in pairs.items() if alias in tensors and name in tensors)
    if twice:
        _compare(twice[group.rank :: group.world_size], source, group, storage)
    for alias, name in pairs.items():
        tensor = tensors.pop(alias, None)
        if tensor is not None:
            tensors.setdefault(name, tensor._replace(spec=tensor.spec._replace(name=name)))
    return replace(source, tensors=tensors)


def _compare(own: Sequence[tuple[str, str]], source: Source, group: Group, storage: Storage) -> None:
    """Compare pairs of tensors, each rank its own; all ranks call."""
    names = [name for pair in own for name in pair]
    known = source.located(lambda: {name: [Box.whole(source.tensors[name].spec.shape)] for name in names}, group)
    with group.together("comparing tied tensors"):
        reader = Reader(storage, source.files)
        try:
            for alias, name in own:
                if not _equal(known.tensors[alias], known.tensors[name], reader):
                    raise TensorError(
                        f"the checkpoint holds other values for it than for {name!r}, with which the model ties it",
                        path=source.path,
                        tensor=alias,
                        hint="Build the model untied (tie_word_embeddings=False, or modules that do not share the "
                        "parameter), so that both are kept.",
                    )
        finally:
            reader.close()


def _equal(a: SourceTensor, b: SourceTensor, reader: Reader) -> bool:
    if a.spec.shape != b.spec.shape or a.spec.dtype != b.spec.dtype:
        return False
    return all(x == y for x, y in zip(tensor_blocks(a, reader), tensor_blocks(b, reader), strict=True))


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
    ``lacking`` are this rank's `names_lacking`; the source's names were passed through ``key_mapping``.

    Returns:
        The source, and the added aliases with the names under which the tensors are saved.
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
