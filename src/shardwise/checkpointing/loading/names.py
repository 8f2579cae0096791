"""A model's tensors under the names of files: other tools', those of a DCP directory, and those that share or tie them.

One process has one tensor for embedding and head, and so have its files; two pipeline stages have one each. The last
stage may therefore find no tensor under its head's name in the files, and loads the embedding instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import filterfalse
from operator import attrgetter
from typing import cast

from torch import nn

from shardwise.base.names import names_in_files, names_of_ties, under_names_of_files
from shardwise.checkpointing.hub import HubState
from shardwise.checkpointing.shared_names import file_name, recomputed_buffers
from shardwise.comm import Group, JsonValue
from shardwise.convert import HeldGroup, rename
from shardwise.disk.storage import Storage
from shardwise.engine.load import listed_anywhere, saved_aliases
from shardwise.engine.name_suggestions import listed
from shardwise.errors import MisuseError, TensorError
from shardwise.format.dcp_metadata import read_dcp_metadata
from shardwise.geometry import Box
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import MODEL_KEYS, DcpModel, find_model, model_below, places_of
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.sources.sources import Source
from shardwise.stateful_wrappers.names import promised_ties
from shardwise.stateful_wrappers.wrapping import is_pretrained, plain_name, unwrap
from shardwise.upstream.transformers import may_be_unexpected


def in_names_of_files(
    parts: Sequence[nn.Module], hub: HubState, ties: Mapping[str, str], names: Sequence[str]
) -> tuple[HubState, dict[str, str]]:
    """Give this rank's tensors of a model the names that the files have. Local.

    ``ties`` are native: the alias of a tied tensor -> the name under which it is kept; ``names`` are all in the files.

    Returns:
        ``hub`` and ``ties`` in the names of the files; as they are where the files have the hub's names, or the
            model's own, or where the parts are not of transformers. A tensor that is not there keeps its hub name.
    """
    available = set(names)
    fits = hub.names <= available or hub.native_names <= available
    if fits or not any(is_pretrained(unwrap(part)) for part in parts):
        return hub, dict(ties)
    by_name = {tensor.spec.name: tensor for tensor in hub.native}
    held: list[HeldTensor] = []
    groups: list[HeldGroup] = []
    found_ties = dict(ties)
    for part in parts:
        module = unwrap(part)
        own = [by_name.pop(name) for name in _names_of(part, parts, hub) if name in by_name]
        _, converted = under_names_of_files(module, own, names)
        own_names = {tensor.spec.name for tensor in own}
        found_ties |= _ties_in_files(module, {a: name for a, name in ties.items() if name in own_names}, names)
        held += converted.held
        groups += converted.groups
    return replace(hub, held=tuple(held), groups=tuple(groups)), found_ties


def _names_of(part: nn.Module, parts: Sequence[nn.Module], hub: HubState) -> list[str]:
    """The names of a part's tensors, in its order."""
    if len(parts) == 1:
        return [tensor.spec.name for tensor in hub.native]
    return [plain_name(name) for name in unwrap(part).state_dict(keep_vars=True)]


def expected_unused(parts: Sequence[nn.Module], names: Iterable[str]) -> list[str]:
    """Names in files that a model expects but does not load: those its class lists, and buffers that it recomputes."""
    patterns: list[str] = []
    for part in parts:
        module = unwrap(part)
        patterns += may_be_unexpected(module)
        if is_pretrained(module):
            # Releases place the module that recomputes them differently, but do not rename it.
            patterns += [rf"(^|\.){re.escape(tail)}$" for tail in sorted(recomputed_buffers(module))]
    if not patterns:
        return []
    search = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).search
    return [name for name in names if search(name)]


def _ties_in_files(module: nn.Module, ties: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The ties for which the files have the alias, under the files' names."""
    if not ties:
        return {}
    found = names_in_files(module, [*ties, *ties.values()], names)
    return {found[alias]: found.get(name, name) for alias, name in ties.items() if alias in found}


_HINT = (
    "Save the model below 'model', beside the optimizer below 'optimizer'; or name what its names begin with in "
    "key_mapping, {'^NAME\\\\.': ''}."
)


def model_part(
    source: Source, capture: Callable[[], HubState], key_mapping: Mapping[str, str] | None, group: Group
) -> Source:
    """Select the model's tensors in a DCP directory and remove the prefix of their names. All ranks call.

    Other sources, and a directory that holds a model alone, are returned as they are. ``capture`` returns this rank's
    model; ``key_mapping`` maps the checkpoint's, with or without the prefix. `MisuseError` if it is not clear
    which part is the model.
    """
    if not source.dcp or not source.tensors:
        return source
    native, hub = frozenset[str](), frozenset[str]()

    def look() -> JsonValue:
        nonlocal native, hub
        own = capture()
        native, hub = own.native_names, own.names
        if key_mapping or not native:
            return None
        return [*dict.fromkeys([*places_of([*source.tensors], native), *places_of([*source.tensors], hub)])]

    everyone = cast("list[list[str] | None]", group.gather(look, "looking for the model"))
    place = _common([heads for heads in everyone if heads is not None], source)
    expected: frozenset[str] = frozenset()
    if place is not None:
        front = f"{place}." if place else ""
        expected = listed_anywhere([front + name for name in native | hub], source, group)

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
        covers = native <= mapped or hub <= mapped
        if not group.any(not covers, "comparing names"):
            model = DcpModel({name: name for name in model.names.values()}, "")
    return _only(source, model)


def _common(everyone: Sequence[Collection[str]], source: Source) -> str | None:
    """The prefix under which every rank's names are, ``None`` if they do not decide it; `MisuseError` for several."""
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
    tensors = {name: source.tensors[known].renamed(name) for name, known in model.names.items()}
    return replace(source, tensors=tensors, below=model.prefix.removesuffix("."))


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
    return [tensor.renamed(found.get(tensor.spec.name, tensor.spec.name)) for tensor in held]


def untied(source: Source, ties: Sequence[JsonValue], group: Group, storage: Storage) -> Source:
    """The source with each tensor that the model ties under one name: other tools write both, or the other one.

    All ranks call. ``ties`` are every rank's: the name that is not kept -> the name that is. Where the source has both,
    they are compared, by one rank each; if they differ, one would be lost, which is a `TensorError`.
    """
    pairs = {alias: str(name) for theirs in ties if isinstance(theirs, dict) for alias, name in theirs.items()}
    there: dict[str, list[str]] = {}
    for alias, name in sorted(pairs.items()):
        if alias in source.tensors:
            there.setdefault(name, [name] if name in source.tensors else []).append(alias)
    twice = [(alias, names[0]) for _, names in sorted(there.items()) for alias in names[1:]]
    if twice:
        _compare(twice[group.rank :: group.world_size], source, group, storage)
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in pairs}
    for name, names in there.items():
        tensors[name] = source.tensors[names[0]].renamed(name)
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


def names_lacking(source: Source, hub: HubState) -> list[str]:
    """Names of the model's tensors that the source lacks. Local."""
    # Walked by the interpreter itself, since every load of a model goes through here.
    lacking = list(filterfalse(source.tensors.__contains__, map(_NAME, hub.held)))
    return lacking + [s.name for held in hub.groups for s in held.computed.hub if s.name not in source.tensors]


def with_aliases(
    source: Source, hub: HubState, lacking: Sequence[str], key_mapping: Mapping[str, str] | None, group: Group
) -> tuple[Source, dict[str, str]]:
    """Add aliases of saved tensors, under names that a rank's model has and the files lack; also returns these.

    All ranks of the group call if any of them lacks a name, and get the same result. One rank reads the manifest.
    ``lacking`` are this rank's `names_lacking`; the source's names were passed through ``key_mapping``.
    """
    received = group.broadcast_result(
        lambda: dict(_renamed(saved_aliases(source), key_mapping)), "reading which tensors were shared"
    )
    aliases = {name: str(kept) for name, kept in cast(dict[str, JsonValue], received).items()}
    if not aliases:
        return source, {}
    lacking = list(lacking)
    # A source of native names, such as a DCP directory, has native aliases.
    lacking += filterfalse(source.tensors.__contains__, map(_NAME, hub.native))
    own = cast(JsonValue, sorted(aliases.keys() & set(lacking)))
    wanted = {
        str(name) for theirs in group.gather_json(own, "comparing shared tensors") for name in cast(list[str], theirs)
    }
    found = {name: aliases[name] for name in sorted(wanted) if aliases[name] in source.tensors}
    added = {name: source.tensors[kept].renamed(name) for name, kept in found.items()}
    return replace(source, tensors={**source.tensors, **added}), found


def _renamed(aliases: Mapping[str, str], key_mapping: Mapping[str, str] | None) -> Mapping[str, str]:
    if not key_mapping:
        return aliases
    names = tuple(dict.fromkeys([*aliases, *aliases.values()]))
    mapping = dict(zip(names, rename(names, key_mapping), strict=True))
    return {mapping[name]: mapping[kept] for name, kept in aliases.items()}
