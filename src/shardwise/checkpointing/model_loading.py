"""Loading models: what a checkpoint has, under whose names, and what of it a rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.checkpointing.aliases import Aliased, names_lacking, with_aliases
from shardwise.checkpointing.context import Context
from shardwise.checkpointing.foreign import in_names_of_files, in_vain
from shardwise.checkpointing.hub import HubState, memory_of, natives_of, require_memory
from shardwise.checkpointing.saved_notes import read_notes
from shardwise.checkpointing.ties import under_saved_names, untied
from shardwise.comm import Group, JsonValue
from shardwise.convert import HeldGroup, rename
from shardwise.engine.computed import load_computed
from shardwise.engine.load import LoadOptions, LoadReport, listed_anywhere, load_tensors
from shardwise.io.sources import Source, open_source
from shardwise.plan.collector import collector_paused
from shardwise.stateful_wrappers import ModelState


def load_model(
    context: Context,
    model: nn.Module | Sequence[nn.Module],
    path: Path,
    *,
    key_mapping: Mapping[str, str] | None,
    options: LoadOptions,
    skip_prefixes: Sequence[str] = (),
) -> LoadReport:
    """Fill a model in place from a checkpoint's ``model`` directory or any Hugging Face directory. All ranks call.

    Raises:
        TensorError: Model and checkpoint do not fit.
        FormatError: The checkpoint is damaged.
    """
    group = context.group
    state = ModelState(model, skip_prefixes=skip_prefixes)
    source, hub, options = _opened(context, state, path, key_mapping, options)
    if _speaks_native(hub, source, group):
        return load_tensors(hub.native, source, group, context.storage, options)
    computed = [held for held in hub.groups if not _has_natives(held, source)]
    own = list(hub.held)
    with group.together("looking for tied tensors"):
        own = under_saved_names(state.model, hub.held, source.tensors.keys())
    direct = [*own, *natives_of([held for held in hub.groups if held not in computed])]
    report = load_tensors(direct, source, group, context.storage, options)
    load_computed(computed, source, group, context.storage, options)
    return report


@collector_paused()
def _opened(
    context: Context, state: ModelState, path: Path, key_mapping: Mapping[str, str] | None, options: LoadOptions
) -> tuple[Source, HubState, LoadOptions]:
    """What there is to load, what this rank holds of the model, and what may differ between the two."""
    group = context.group
    source = open_source(path, group, spread=True)
    notes = read_notes(path, group)
    ties: dict[str, str] = {}
    apart: list[str] = []
    lacking: list[str] = []
    hub: HubState | None = None
    with group.together("describing the model") as lacks:
        if key_mapping:
            source = renamed(source, key_mapping)
        hub = context.names.capture(state)
        if hub is not context.sound:
            require_memory(memory_of(hub.native), "memory to load into")
            context.sound = hub
        hub = hub.once
        lacking = names_lacking(source, hub)
        lacks.flag = bool(lacking)
    assert hub is not None
    aliased = with_aliases(source, hub, lacking, key_mapping, group) if lacks.any else Aliased(source)
    with group.together("matching the model's names with the checkpoint's") as differs:
        source = aliased.source.without(notes.passed)
        hub, ties = in_names_of_files(state.model, hub, {**hub.kept, **hub.ties}, list(source.tensors))
        own = {tensor.spec.name for tensor in hub.held}
        apart = in_vain(state.model, [name for name in source.tensors if name not in own])
        # What is computed is read apart, and by the ranks of its stage alone.
        apart += [spec.name for held in hub.groups for spec in held.computed.hub]
        differs.flag = bool(ties or apart)
    assert hub is not None
    ignored: frozenset[str] = frozenset()
    if differs.any:
        everyone = group.gather_json(cast(JsonValue, dict(ties)), "comparing tied tensors")
        source = untied(source, everyone, group, context.storage)
        ignored = listed_anywhere(apart, source, group)
    kept = {alias: notes.exact[name] for alias, name in aliased.kept.items() if name in notes.exact}
    return source, hub, replace(options, exact={**notes.exact, **kept}, ignored=ignored)


def renamed(source: Source, key_mapping: Mapping[str, str]) -> Source:
    """The source with its names passed through regular expressions; the first that matches a name applies."""
    names = tuple(source.tensors)
    mapping = dict(zip(names, rename(names, key_mapping), strict=True))
    tensors = {
        mapping[name]: tensor._replace(spec=tensor.spec._replace(name=mapping[name]))
        for name, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def _has_natives(held: HeldGroup, source: Source) -> bool:
    return all(tensor.spec.name in source.tensors for tensor in held.natives)


def _speaks_native(hub: HubState, source: Source, group: Group) -> bool:
    """Whether the source has the model's own names and lacks some of the hub's: another writer's state dict."""
    hub_names = [*(t.spec.name for t in hub.held), *(s.name for held in hub.groups for s in held.computed.hub)]
    lacks = any(name not in source.tensors for name in hub_names)
    has_all = all(tensor.spec.name in source.tensors for tensor in hub.native)
    # Stages may differ; one whose names are the same either way has no say.
    return group.any(lacks, "comparing names") and not group.any(not has_all, "comparing names")
