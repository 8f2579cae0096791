"""Loads models: matches the names in a checkpoint with those of the model, and reads this rank's part."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.checkpointing.hub import HubState, memory_of, natives_of, require_memory
from shardwise.checkpointing.loading.names import (
    expected_unused,
    in_names_of_files,
    model_part,
    names_lacking,
    under_saved_names,
    untied,
    with_aliases,
)
from shardwise.checkpointing.module_state import (
    ModuleLoad,
    as_modules_load,
    find_module_state,
    open_module_load,
    steps_of,
    with_extra_in_files,
)
from shardwise.checkpointing.per_rank import OwnRead, find_model
from shardwise.checkpointing.session import Session
from shardwise.checkpointing.shared_names import exported_modules
from shardwise.comm import Group, JsonValue
from shardwise.convert import rename
from shardwise.disk.names import is_file
from shardwise.engine.computed import OpenedComputed, open_computed
from shardwise.engine.load import (
    LoadOptions,
    LoadReport,
    LoadSource,
    OpenedLoad,
    listed_anywhere,
    open_load,
)
from shardwise.engine.name_suggestions import listed
from shardwise.engine.per_rank import saved_ranks
from shardwise.errors import StateFormatError
from shardwise.format.json_file import read_json
from shardwise.format.notes import METADATA_DIR, NATIVE_DTYPES, PASSED_THROUGH
from shardwise.plan.fragments import HeldTensor
from shardwise.sources.sources import Source, open_source
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.units import Step
from shardwise.timing import phase

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
    module_load: ModuleLoad
    own: OwnRead | None = None

    def fill(self) -> LoadReport:
        """Fill the model. All ranks call, once."""
        report = self.direct.read()
        if self.computed is not None:
            self.computed.read(self.session.storage)
        if self.own is not None:
            with self.session.group.together("reading each rank's own tensors"):
                self.own.read(self.session)
        with phase("install"), self.direct.reading() as values:
            self.module_load.run(values, str(self.direct.source.plain.path), self.session.group)
        return report


def open_model(
    session: Session,
    model: nn.Module | Sequence[nn.Module],
    path: Path,
    *,
    key_mapping: Mapping[str, str] | None,
    options: LoadOptions,
) -> OpenedModel:
    """Open a checkpoint, and compare names, shapes and dtypes with the model's. All ranks call; nothing is written."""
    group, storage = session.group, session.storage
    state = ModelState(model)
    opened = _opened(session, state, path, key_mapping, options)
    own = find_model(session, state, path, opened.metadata.ranks)
    source, hub, options = opened.source, opened.hub, opened.options
    speaks_native = opened.differs and _speaks_native(hub, source, group)
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
        own_steps, extra = with_extra_in_files(steps_of(state.model, hub.listing), source)
        steps.extend(own_steps)
        return held if hub.listing is None else [*as_modules_load(held, hub, computed, source), *extra]

    load = open_load(direct, LoadSource(source), group, storage, options, lambda: bool(steps))
    has_computed = opened.differs and not speaks_native
    there = open_computed(computed, LoadSource(source), group, options) if has_computed else None
    # Every rank knows which module state was saved.
    stems = opened.metadata.module_state
    module_load = ModuleLoad((), None, options, 0)
    if load.asked or stems:
        is_own = bool(stems) and Path(stems[0]).parent.parent == path  # and not of the directory around an export
        module_load = open_module_load(steps, stems, group, options, is_strict=is_own)
    return OpenedModel(session, load, there, module_load, own)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source, what this rank holds, and the allowed differences between the two.

    It ``differs`` where any rank's model has other names than the source, ties, or tensors that have to be computed.
    """

    source: Source
    hub: HubState
    options: LoadOptions
    differs: bool
    metadata: ModelMetadata


@dataclass(frozen=True, slots=True)
class _Matched:
    """A rank's model under the names of files, the names that it ties, and the source's names that it does not use."""

    hub: HubState
    ties: Mapping[str, str]
    unused: Sequence[str]


def _match(state: ModelState, hub: HubState, source: Source) -> _Matched:
    hub, ties = in_names_of_files(state.model, hub, {**hub.kept, **hub.ties}, list(source.tensors))
    own = {tensor.spec.name for tensor in hub.held}
    unused = expected_unused(exported_modules(state.model), [name for name in source.tensors if name not in own])
    # Computed tensors are read separately, by the ranks of their stage only.
    unused += [spec.name for held in hub.groups for spec in held.computed.hub]
    return _Matched(hub, ties, unused)


def _opened(
    session: Session, state: ModelState, path: Path, key_mapping: Mapping[str, str] | None, options: LoadOptions
) -> _Opened:
    """Open the checkpoint and match it with the model. All ranks call."""
    group = session.group
    hub: HubState | None = None
    metadata = read_model_metadata(path, group)
    source = open_source(path, group, spread=True)

    source = model_part(source, lambda: session.names.capture(state, load=True), key_mapping, group)
    lacking: list[str] = []
    matched: _Matched | None = None
    with group.together("describing the model") as differs:
        if key_mapping:
            source = renamed(source, key_mapping)
        hub = session.names.capture(state, load=True)
        if hub is not session.checked_state:
            require_memory(memory_of(hub.native), "memory to load into")
            session.checked_state = hub
        if _lacks_buffers(hub, source):
            # torch's normalisation layers accept files without their counters.
            hub = session.names.capture(state, load=True, norms=True)
        if _has_wrappers_prefix(source, hub):
            source = renamed(source, {"^" + re.escape(_PREFIX): ""})
        hub = hub.once
        lacking = names_lacking(source, hub)
        plain = source.without(metadata.passed)
        if not lacking:
            matched = _match(state, hub, plain)
        differs.flag = matched is None or bool(matched.ties or matched.unused or names_lacking(plain, matched.hub))
    assert hub is not None
    if not differs.any:
        assert matched is not None
        options = replace(options, exact=dict(metadata.exact))
        return _Opened(plain, matched.hub, options, False, metadata)
    kept: dict[str, str] = {}
    if group.any(bool(lacking), "comparing names"):
        source, kept = with_aliases(source, hub, lacking, key_mapping, group)
        with group.together("matching the model's names with the checkpoint's"):
            plain = source.without(metadata.passed)
            matched = _match(state, hub, plain)
    assert matched is not None
    everyone = group.gather_json(cast(JsonValue, dict(matched.ties)), "comparing tied tensors")
    source = untied(plain, everyone, group, session.storage)
    ignored = listed_anywhere(matched.unused, source, group)
    exact = {alias: metadata.exact[name] for alias, name in kept.items() if name in metadata.exact}
    options = replace(options, exact={**metadata.exact, **exact}, ignored=ignored)
    return _Opened(source, matched.hub, options, True, metadata)


def _lacks_buffers(hub: HubState, source: Source) -> bool:
    """Whether the source lacks counters that older normalisation layers did not have."""
    lacking = (tensor.spec.name for tensor in hub.held if tensor.spec.name not in source.tensors)
    return any(name.rpartition(".")[2] == "num_batches_tracked" for name in lacking)


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
    found = group.broadcast_result(lambda: _noted(path), "reading what was noted beside the model")
    exact, passed, ranks, module_state = cast(tuple[dict[str, str], list[str], int, list[str]], found)
    return ModelMetadata(exact, tuple(passed), ranks, tuple(module_state))


def _noted(path: Path) -> JsonValue:
    exact, passed = _note(path, NATIVE_DTYPES, {}), _note(path, PASSED_THROUGH, [])
    return [exact, passed, saved_ranks(path), cast(JsonValue, find_module_state(path))]


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
