"""Loads models: matches the names in a checkpoint with those of the model, and reads this rank's part.

The names may be other tools', those of a DCP directory, or those that share or tie a tensor. One process has one tensor
for embedding and head, and so have its files; two pipeline stages have one each. The last stage may therefore find no
tensor under its head's name in the files, and loads the embedding instead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse
from operator import attrgetter
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.base.names import names_in_files, names_of_ties, under_names_of_files
from shardwise.checkpointing import module_state
from shardwise.checkpointing.hub import (
    HubState,
    exported_modules,
    file_name,
    memory_of,
    natives_of,
    recomputed_buffers,
    require_memory,
)
from shardwise.checkpointing.per_rank import OwnRead, find_of_model
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.convert.mapping import rename
from shardwise.convert.rules import HeldGroup
from shardwise.disk.names import is_file
from shardwise.disk.storage import Storage
from shardwise.engine.computed import OpenedComputed, open_computed
from shardwise.engine.load import (
    LoadOptions,
    LoadSource,
    OpenedLoad,
    listed_anywhere,
    open_load,
    saved_aliases,
)
from shardwise.engine.name_suggestions import listed
from shardwise.engine.per_rank import saved_ranks
from shardwise.errors import MisuseError, StateFormatError, TensorError
from shardwise.format.dcp_metadata import read_dcp_metadata
from shardwise.format.json_file import read_json
from shardwise.format.notes import METADATA_DIR, NATIVE_DTYPES, PASSED_THROUGH
from shardwise.geometry import Box
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import MODEL_KEYS, DcpModel, find_model, model_below, places_of
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.sources.sources import Source, open_source
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.model import Model
from shardwise.stateful_wrappers.names import promised_ties
from shardwise.stateful_wrappers.units import Step
from shardwise.stateful_wrappers.wrapping import is_pretrained, plain_name, unwrap
from shardwise.timing import phase
from shardwise.upstream.transformers import may_be_unexpected

_LOG = logging.getLogger(__name__)

#: What DistributedDataParallel and DataParallel put before names.
_PREFIX = "module."


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model matched with a checkpoint, on every rank; nothing has been read or written yet.

    ``direct`` has the tensors to read into the model's memory and for modules with loading code of their own,
    ``computed`` those that are converted after reading, ``own`` this rank's alone; ``None`` on all ranks where there
    are none.
    """

    session: Session
    direct: OpenedLoad
    computed: OpenedComputed | None
    module_load: module_state.ModuleLoad
    own: OwnRead | None = None

    def fill(self) -> None:
        """Fill the model. All ranks call, once."""
        self.direct.read()
        if self.computed is not None:
            self.computed.read(self.session.storage)
        if self.own is not None:
            with self.session.group.together("reading each rank's own tensors"):
                self.own.read(self.session)
        with phase("install"), self.direct.reading() as values:
            self.module_load.run(values, str(self.direct.source.plain.path), self.session.group)


def open_model(
    session: Session, model: Model, path: Path, *, key_mapping: Mapping[str, str] | None, options: LoadOptions
) -> OpenedModel:
    """Open a checkpoint, and compare names, shapes and dtypes with the model's. All ranks call; nothing is written."""
    group, storage = session.group, session.storage
    state = ModelState(model)
    source, hub, options, differs, metadata = _opened(session, state, path, key_mapping, options)
    own = find_of_model(session, state, path, metadata.ranks)
    speaks_native = differs and _speaks_native(hub, source, group)
    computed = [] if speaks_native else [each for each in hub.groups if not _are_in(each.natives, source)]

    steps: list[Step] = []

    def direct() -> list[HeldTensor]:
        if speaks_native:
            held = list(hub.native)
        else:
            held = under_saved_names(exported_modules(state.model), hub.held, source.tensors.keys())
            held += natives_of([group for group in hub.groups if group not in computed])
            held += [tensor for tensor in hub.excluded if tensor.spec.name in source.tensors]
            absent = [tensor.spec.name for tensor in hub.excluded if tensor.spec.name not in source.tensors]
            if absent:
                _LOG.warning("%s, which the model's class keeps out of files, keep their values", listed(absent))
        own_steps, extra = module_state.with_extra_in_files(module_state.steps_of(state.model, hub.listing), source)
        steps.extend(own_steps)
        return held if hub.listing is None else [*module_state.as_modules_load(held, hub, computed, source), *extra]

    load = open_load(direct, LoadSource(source), group, storage, options, lambda: bool(steps))
    has_computed = differs and not speaks_native
    there = open_computed(computed, LoadSource(source), group, options) if has_computed else None
    stems = metadata.module_state  # the same on every rank
    module_load = module_state.ModuleLoad((), None, options, 0)
    if load.asked or stems:
        is_own = bool(stems) and Path(stems[0]).parent.parent == path  # and not of the directory around an export
        module_load = module_state.open_module_load(steps, stems, group, options, is_strict=is_own)
    return OpenedModel(session, load, there, module_load, own)


def _match(state: ModelState, hub: HubState, source: Source) -> tuple[HubState, dict[str, str], list[str]]:
    """A rank's model under the names of files, the names that it ties, and the source's names that it does not use."""
    hub, ties = _in_names_of_files(state.model, hub, {**hub.kept, **hub.ties}, list(source.tensors))
    own = {tensor.spec.name for tensor in hub.held}
    unused = expected_unused(exported_modules(state.model), [name for name in source.tensors if name not in own])
    # Computed tensors are read separately, by the ranks of their stage only.
    unused += [spec.name for held in hub.groups for spec in held.computed.hub]
    return hub, ties, unused


def _opened(
    session: Session, state: ModelState, path: Path, key_mapping: Mapping[str, str] | None, options: LoadOptions
) -> tuple[Source, HubState, LoadOptions, bool, ModelMetadata]:
    """Open the checkpoint and match it with the model. All ranks call.

    Returns also the allowed differences between the two, and whether any rank's model has other names than the source,
    ties, or tensors that have to be computed.
    """
    group = session.group
    metadata = read_model_metadata(path, group)
    source = open_source(path, group, spread=True)
    source = model_part(source, lambda: session.names.capture(state, load=True), key_mapping, group)
    with group.together("describing the model") as differs:
        if key_mapping:
            source = renamed(source, key_mapping)
        hub = session.names.capture(state, load=True)
        if hub is not session.checked_state:
            require_memory(memory_of(hub.native), "memory to load into")
            session.checked_state = hub
        absent = (tensor.spec.name for tensor in hub.held if tensor.spec.name not in source.tensors)
        if any(name.rpartition(".")[2] == "num_batches_tracked" for name in absent):
            # torch's normalisation layers accept files without their counters, which older ones did not have.
            hub = session.names.capture(state, load=True, norms=True)
        if _has_wrappers_prefix(source, hub):
            source = renamed(source, {"^" + re.escape(_PREFIX): ""})
        if hub.copies:  # each tensor is loaded once
            held = tuple(tensor for tensor in hub.held if tensor.spec.name not in hub.copies)
            hub = replace(hub, held=held, copies=frozenset())
        lacking = names_lacking(source, hub)
        plain = source.without(metadata.passed)
        matched, ties, unused = (hub, {}, []) if lacking else _match(state, hub, plain)
        differs.flag = bool(lacking or ties or unused or names_lacking(plain, matched))
    if not differs.any:
        return plain, matched, replace(options, exact=dict(metadata.exact)), False, metadata
    kept: dict[str, str] = {}
    if group.any(bool(lacking), "comparing names"):
        source, kept = with_aliases(source, hub, lacking, key_mapping, group)
        with group.together("matching the model's names with the checkpoint's"):
            plain = source.without(metadata.passed)
            matched, ties, unused = _match(state, hub, plain)
    everyone = group.gather_json(ties, "comparing tied tensors")
    source = untied(plain, everyone, group, session.storage)
    ignored = listed_anywhere(unused, source, group)
    exact = {alias: metadata.exact[name] for alias, name in kept.items() if name in metadata.exact}
    options = replace(options, exact={**metadata.exact, **exact}, ignored=ignored)
    return source, matched, options, True, metadata


def _has_wrappers_prefix(source: Source, hub: HubState) -> bool:
    """Whether the files' names have the prefix of DistributedDataParallel and DataParallel, and the model's do not."""
    if not source.tensors or not all(name.startswith(_PREFIX) for name in source.tensors):
        return False
    return not any(tensor.spec.name.startswith(_PREFIX) for tensor in (*hub.held, *hub.native))


def renamed(source: Source, key_mapping: Mapping[str, str]) -> Source:
    """The source with its names mapped by regular expressions; the first match applies."""
    names = tuple(source.tensors)
    return retitled(source, dict(zip(names, rename(names, key_mapping), strict=True)))


def retitled(source: Source, names: Mapping[str, str]) -> Source:
    """The source with a new name for each of its tensors."""
    return replace(
        source, tensors={names[name]: tensor.renamed(names[name]) for name, tensor in source.tensors.items()}
    )


def _are_in(held: Iterable[HeldTensor], source: Source) -> bool:
    return all(tensor.spec.name in source.tensors for tensor in held)


def _speaks_native(hub: HubState, source: Source, group: Group) -> bool:
    """Whether the source has the model's own names and lacks some of the hub's: another writer's state dict."""
    lacks = bool(names_lacking(source, hub))
    # Stages may differ; a stage where both kinds of names are equal does not count.
    return group.any(lacks, "comparing names") and not group.any(not _are_in(hub.native, source), "comparing names")


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The metadata; empty for other tools' checkpoints.

    Attributes:
        exact: Name in the file -> dtype in memory, where the export has another dtype.
        passed: Names of the base model's tensors that were carried over.
        ranks: Number of ranks that saved per-rank tensors; 0 where there are none.
        module_state: Stems of the files of module state.
    """

    exact: Mapping[str, str]
    passed: tuple[str, ...]
    ranks: int = 0
    module_state: tuple[str, ...] = ()


def read_model_metadata(path: Path, group: Group) -> ModelMetadata:
    """Read the metadata beside a model on rank 0 and broadcast it. All ranks of the group call."""

    def look() -> tuple[JsonValue, JsonValue, int, list[str]]:
        exact, passed = _note(path, NATIVE_DTYPES, {}), _note(path, PASSED_THROUGH, [])
        return exact, passed, saved_ranks(path), module_state.find_module_state(path)

    found = group.broadcast_result(look, "reading what was noted beside the model")
    exact, passed, ranks, stems = cast(tuple[dict[str, str], list[str], int, list[str]], found)
    return ModelMetadata(exact, tuple(passed), ranks, tuple(stems))


def _note(path: Path, name: str, absent: JsonValue) -> JsonValue:
    """The note called ``name``, with texts in it; ``absent`` where there is none."""
    for directory in (path / METADATA_DIR, path.parent / METADATA_DIR):
        file = directory / name
        if not is_file(file):
            continue
        found = read_json(file, StateFormatError)
        if isinstance(found, dict) and isinstance(absent, dict):
            return {str(key): str(value) for key, value in found.items()}
        if isinstance(found, list) and isinstance(absent, list):
            return [str(value) for value in found]
        raise StateFormatError(f"not a {type(absent).__name__}", path=file, hint="Restore the file.")
    return absent


def _in_names_of_files(
    parts: Sequence[nn.Module], hub: HubState, ties: Mapping[str, str], names: Sequence[str]
) -> tuple[HubState, dict[str, str]]:
    """Give ``hub`` and ``ties`` the ``names`` that the files have. Local.

    They stay as they are where the files have the hub's names, or the model's own, or where the parts are not of
    transformers. A tensor that is not there keeps its hub name. ``ties`` are native: alias -> the name that is kept.
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
        part_names = [*by_name]
        if len(parts) > 1:
            part_names = [plain_name(name) for name in module.state_dict(keep_vars=True)]
        own = [by_name.pop(name) for name in part_names if name in by_name]
        _, converted = under_names_of_files(module, own, names)
        own_names = {tensor.spec.name for tensor in own}
        own_ties = {alias: name for alias, name in ties.items() if name in own_names}
        if own_ties:  # those for which the files have the alias, under the files' names
            there = names_in_files(module, [*own_ties, *own_ties.values()], names)
            found_ties |= {there[alias]: there.get(name, name) for alias, name in own_ties.items() if alias in there}
        held += converted.held
        groups += converted.groups
    return replace(hub, held=tuple(held), groups=tuple(groups)), found_ties


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

    def look() -> list[str] | None:
        nonlocal native, hub
        own = capture()
        native, hub = own.native_names, own.names
        if key_mapping or not native:
            return None
        return [*dict.fromkeys([*places_of([*source.tensors], native), *places_of([*source.tensors], hub)])]

    everyone = group.gather(look, "looking for the model")
    place = _common([heads for heads in everyone if heads is not None], source)
    expected: frozenset[str] = frozenset()
    if place is not None:
        front = f"{place}." if place else ""
        expected = listed_anywhere([front + name for name in native | hub], source, group)

    def decide() -> tuple[str, dict[str, str]] | None:
        metadata = read_dcp_metadata(source.path)
        try:
            model = model_below(metadata, source.path, place, expected) if place is not None else None
            model = model or find_model(metadata, source.path)
        except MisuseError as error:
            if key_mapping:
                return None  # the caller says which names are the model's
            error.hint = _HINT
            raise
        return model.prefix, dict(model.names)

    found_model = group.broadcast_result(decide, f"looking for the model in {source.path}")
    if found_model is None:
        return source
    prefix, found = found_model
    model = DcpModel(found, prefix)
    if key_mapping and prefix:
        mapped = frozenset(rename([*model.names.values()], key_mapping))
        covers = native <= mapped or hub <= mapped
        if not group.any(not covers, "comparing names"):
            model = DcpModel({name: name for name in model.names.values()}, "")
    if len(model.names) == len(source.tensors) and all(name == known for name, known in model.names.items()):
        return source
    tensors = {name: source.tensors[known].renamed(name) for name, known in model.names.items()}
    return replace(source, tensors=tensors, below=model.prefix.removesuffix("."))


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


def untied(source: Source, ties: Sequence[Mapping[str, str]], group: Group, storage: Storage) -> Source:
    """The source with each tensor that the model ties under one name: other tools write both, or the other one.

    All ranks call. ``ties`` are every rank's: the name that is not kept -> the name that is. Where the source has both,
    they are compared, by one rank each; if they differ, one would be lost, which is a `TensorError`.
    """
    pairs = {alias: name for theirs in ties for alias, name in theirs.items()}
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
    aliases = group.broadcast_result(
        lambda: dict(_renamed(saved_aliases(source), key_mapping)), "reading which tensors were shared"
    )
    if not aliases:
        return source, {}
    lacking = list(lacking)
    # A source of native names, such as a DCP directory, has native aliases.
    lacking += filterfalse(source.tensors.__contains__, map(_NAME, hub.native))
    own = sorted(aliases.keys() & set(lacking))
    wanted = {name for theirs in group.gather_json(own, "comparing shared tensors") for name in theirs}
    found = {name: aliases[name] for name in sorted(wanted) if aliases[name] in source.tensors}
    added = {name: source.tensors[kept].renamed(name) for name, kept in found.items()}
    return replace(source, tensors={**source.tensors, **added}), found


def _renamed(aliases: Mapping[str, str], key_mapping: Mapping[str, str] | None) -> Mapping[str, str]:
    if not key_mapping:
        return aliases
    names = tuple(dict.fromkeys([*aliases, *aliases.values()]))
    mapping = dict(zip(names, rename(names, key_mapping), strict=True))
    return {mapping[name]: mapping[kept] for name, kept in aliases.items()}
