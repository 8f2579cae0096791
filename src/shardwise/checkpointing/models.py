"""Saving and loading models: which files, under which names, in which mode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, SaveHookArgs
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.aliases import Aliased, names_lacking, with_aliases
from shardwise.checkpointing.base import BaseModel
from shardwise.checkpointing.context import Context
from shardwise.checkpointing.foreign import in_names_of_files, in_vain
from shardwise.checkpointing.hooks import run_hooks
from shardwise.checkpointing.hub import HubState, memory_of, require_memory
from shardwise.checkpointing.proof import promise_of, prove, read_back, require
from shardwise.checkpointing.recasts import Recasts
from shardwise.checkpointing.saved_notes import read_notes
from shardwise.checkpointing.ties import under_saved_names, untied
from shardwise.checkpointing.torch_format import save_distcp
from shardwise.comm import Group, JsonValue
from shardwise.convert import HeldGroup, rename
from shardwise.engine.computed import ComputedPlan, declared, load_computed
from shardwise.engine.export import Copies, ExportOptions, ExportPlan, plan_export, write_export
from shardwise.engine.jobs import Step
from shardwise.engine.load import LoadOptions, LoadReport, listed_anywhere, load_tensors
from shardwise.engine.memo import Memo
from shardwise.engine.merge import MergeOptions, write_merged
from shardwise.engine.records import ComponentRecord
from shardwise.engine.rosters import RosterKeeper
from shardwise.engine.shards import ShardPlan, without_tensors, write_shards
from shardwise.format.manifest import AliasRecord
from shardwise.format.notes import METADATA_DIR, NATIVE_DTYPES, PASSED_THROUGH
from shardwise.io.sources import Source, open_source
from shardwise.io.statefiles import write_plain
from shardwise.lifecycle.filesystem import storage_errors
from shardwise.plan.collector import collector_paused
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.plan.shards import ShardFile, plan_shards
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.names import undeclared_names
from shardwise.types import TensorSpec

CONSOLIDATED_DIR = "consolidated"
#: Component of the shards beside an export that rounds: the manifest lists a tensor once in a component.
EXACT = "model.exact"
CONSOLIDATE_NAME = "consolidate.sh"
CONSOLIDATE_SCRIPT = b'#!/bin/sh\nexec python -m shardwise consolidate "$(dirname "$0")" "$@"\n'


@dataclass(frozen=True, slots=True)
class _Planned:
    """An export that is ready to be written.

    Attributes:
        plan: The export.
        roster: Who holds what of it.
        recasts: What the export has in other dtypes than the ranks have in memory.
        passed: Names of the base model's tensors that are carried over.
        exact: This rank's tensors that the export rounds, and that are saved once more as they are.
        kept: Further names of this rank's tensors -> the names that these are written under.
    """

    plan: ExportPlan
    roster: Roster
    recasts: Recasts
    passed: Sequence[str]
    exact: Sequence[HeldTensor]
    kept: Mapping[str, str]


class ModelSave:
    """One save of a model: captured in the foreground, written by `steps`. All ranks make one.

    Args:
        context: Settings, ranks and storage.
        model: The model, or this rank's pipeline stages.
        directory: Where the ``model`` directory's content goes.
        addons: Hooks around the writing.
        hook_args: What the caller gave for the hooks (tokenizer, adapter configuration).
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module | Sequence[nn.Module],
        directory: Path,
        addons: Sequence[CheckpointAddon],
        *,
        tokenizer: SavesPretrained | None,
        peft_config: object | None,
        is_final: bool,
    ) -> None:
        self._context = context
        self._directory = directory
        self._addons = addons
        self._exports = context.exports(is_final) and context.config.model_save_format == "safetensors"
        self.state = ModelState(model)
        self.base = context.base()
        self._args: SaveHookArgs = {
            "model_state": self.state,
            "model_path": str(directory),
            "hf_metadata_dir": str(directory / METADATA_DIR),
            "consolidated_path": str(directory / CONSOLIDATED_DIR) if self._exports else None,
            "tokenizer": tokenizer,
            "peft_config": peft_config,
            "original_model_path": context.base_path(),
            "v4_compatible": context.config.v4_compatible,
            "diffusers_compatible": context.config.diffusers_compatible,
            "legacy_paramwrapper_layout": context.config.legacy_paramwrapper_layout,
            "is_final_checkpoint": is_final,
        }

    def steps(self) -> list[Step]:
        """Capture the model, run the addons' first hooks, and return what is left to do. All ranks call."""
        context = self._context
        if context.config.model_save_format == "torch_save":
            kept: dict[str, str] = {}
            with context.group.together("describing the model"):
                require_memory(memory_of(self.state.held()), "values to save")
                kept = undeclared_names(self.state.tensors(), self.state.model)
            first = [*self._before({}), _telling(kept)]
            return [*first, lambda group: save_distcp(self.state, self._directory, group), self._after]
        if not self._exports:
            hub = self._described()
            held = [*hub.held, *natives_of(hub.groups)]
            shards = self._shards(held, context.model_roster)
            return [*self._before({}), shards, _telling(hub.unwritten), self._leave_script, self._after]
        planned = self._planned()
        steps = [*self._before(planned.recasts.native, planned.passed), self._export(planned.plan, planned.roster)]
        if context.config.verify_export:
            steps.append(lambda group: self._read_back(planned.plan, group))
        if planned.recasts.rounds:  # on any rank: a stage may have no such tensor where another does
            steps.append(self._shards(planned.exact, context.exact_roster, EXACT))
        return [*steps, _telling(planned.kept), self._after]

    @collector_paused()
    def _planned(self) -> _Planned:
        """Capture the model and plan its export; all ranks call."""
        context, hub = self._context, self._described()
        held = [*hub.held, *declared(hub.groups)]
        base = self.base.specs if self.base is not None else {}
        own = context.recasts.recast(held, base)
        recasts = context.recasts.together(own) if self.base is not None else Recasts({}, False)
        roster = context.model_roster.roster(own.export)
        names = self._prove(roster.specs, hub.absent)
        passed = [self.base.source.tensors[name] for name in names] if self.base is not None else []
        computed = ComputedPlan(hub.groups, context.computed_roster.roster(natives_of(hub.groups)))
        directory = self._directory / CONSOLIDATED_DIR
        copies = Copies(tuple(passed), self.base.source.files if self.base is not None else ())
        options = self._options()
        known: ExportPlan | None = None
        with context.group.together("planning the export"):
            known = context.model_plan.get(
                [*own.export, roster, *computed.groups],
                (options, copies),
                lambda: plan_export(own.export, roster, context.group, directory, options, computed, copies),
            )
        assert known is not None
        placed, exact = replace(known, directory=directory), _uncomputed(own.exact, hub.groups)
        return _Planned(placed, roster, recasts, names, exact, hub.unwritten)

    def _described(self) -> HubState:
        hub: HubState | None = None
        with self._context.group.together("describing the model"):
            hub = self._captured()
        assert hub is not None
        return hub

    def _captured(self) -> HubState:
        context = self._context
        hub = context.names.capture(self.state)
        if hub is not context.sound:
            require_memory(memory_of(hub.native), "values to save")
            context.sound = hub
        # All at once: each component has one piece of memory, which a second call would fill anew.
        natives = iter(context.staged("model.native", natives_of(hub.groups)))
        groups = tuple(replace(held, natives=tuple(islice(natives, len(held.natives)))) for held in hub.groups)
        return replace(hub, held=tuple(context.staged("model", hub.held)), groups=groups)

    def _options(self) -> ExportOptions:
        config = self._context.config
        return ExportOptions(
            base_files=dict(self.base.files) if self.base is not None else {},
            max_file_bytes=config.max_file_bytes,
            stem="diffusion_pytorch_model" if config.diffusers_compatible else "model",
            threads=self._context.writing_threads,
        )

    def _prove(self, specs: Sequence[TensorSpec], absent: Sequence[str]) -> list[str]:
        """Compare what will be written with the base model; returns the names of what is carried over.

        All ranks call. Rank 0 compares, since the base's config on another machine may be another, or not there.
        """
        if self.base is None:
            return []
        config, group = self._context.config, self._context.group
        promise = promise_of(self.state.model, absent, group)

        def compare(base: BaseModel) -> JsonValue:
            proof = prove(specs, base, promise, pass_through=config.pass_through_unloaded)
            if config.verify_export:
                require(proof, base.directory)
            return list(proof.passed)

        passed = group.tell(partial(compare, self.base), "comparing the export with the base model")
        return cast(list[str], passed)

    def _read_back(self, plan: ExportPlan, group: Group) -> ComponentRecord:
        read_back(plan, group)
        return ComponentRecord()

    def _before(self, native: Mapping[str, str], passed: Sequence[str] = ()) -> list[Step]:
        """Run the addons' first hooks now, while the model may be read."""
        group = self._context.group
        with group.together("preparing the model's directory"):
            if group.is_main:
                self._context.storage.make_directory(self._directory / METADATA_DIR)
                for name, value in ((NATIVE_DTYPES, dict(native)), (PASSED_THROUGH, list(passed))):
                    if value:
                        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
                        write_plain(self._context.storage, self._directory / METADATA_DIR / name, text.encode())
        args = self._args | {"group": group}
        if self.base is not None:
            numbers = self.base.numbers
            args["fqn_to_file_index_mapping"] = {n: numbers[f] for n, f in self.base.files.items()}
            args["fqn_to_dtype_mapping"] = {n: spec.dtype for n, spec in self.base.specs.items()}
        run_hooks(self._addons, "pre_save", args, group)
        return []

    def _leave_script(self, group: Group) -> ComponentRecord:
        """Put the script that makes the export later beside shards that have none."""
        with group.together("writing the consolidation script"):
            if group.is_main:
                script = self._directory / CONSOLIDATE_NAME
                write_plain(self._context.storage, script, CONSOLIDATE_SCRIPT)
                if script.exists():  # a storage may keep its files elsewhere
                    with storage_errors(script):
                        mode = script.stat().st_mode
                        script.chmod(mode | (mode & 0o444) >> 2)
        return ComponentRecord()

    def _after(self, group: Group) -> ComponentRecord:
        run_hooks(self._addons, "post_save", self._args, group)
        return ComponentRecord()

    def _export(self, plan: ExportPlan, roster: Roster) -> Step:
        context = self._context
        config = context.config
        if config.single_rank_consolidation or config.staging_dir is not None or not config.random_writes:
            options = MergeOptions(
                config.single_rank_consolidation, Path(config.staging_dir) if config.staging_dir else None
            )
            return lambda group: write_merged(plan, roster, group, context.storage, options).below(CONSOLIDATED_DIR)
        return lambda group: write_export(plan, group, context.storage).below(CONSOLIDATED_DIR)

    def _shards(self, held: Sequence[HeldTensor], keeper: RosterKeeper, component: str = "model") -> Step:
        context = self._context
        roster = keeper.roster(held)
        known: ShardPlan | None = None
        with context.group.together("planning the shards"):
            memo = context.shard_plans.setdefault(component, Memo())
            known = memo.get(
                [*held, roster],
                None,
                lambda: ShardPlan(self._directory, component, roster, self._files_of_shards(held, roster)),
            )
        assert known is not None
        plan = replace(known, directory=self._directory)
        return lambda group: write_shards(plan, group, context.storage)

    def _files_of_shards(self, held: Sequence[HeldTensor], roster: Roster) -> tuple[ShardFile, ...]:
        if not roster.specs:
            return (without_tensors(),) if self._context.group.is_main else ()
        index = None
        if self.base is not None:
            numbers = self.base.numbers
            last = max(numbers.values(), default=1)
            index = {s.name: numbers.get(self.base.files.get(s.name, ""), last) for s in roster.specs}
        return plan_shards(held, roster, self._context.group.rank, index)


def _telling(kept: Mapping[str, str]) -> Step:
    """A step that writes nothing, and tells the manifest of further names."""
    record = ComponentRecord(aliases=tuple(AliasRecord("model", alias, name) for alias, name in kept.items()))
    return lambda group: record


def default_addons(is_peft: bool) -> list[CheckpointAddon]:
    """The addons of an ordinary save: Hugging Face metadata, or an adapter's."""
    if is_peft:
        from shardwise.addons import PeftAddon

        return [PeftAddon()]
    return [ConsolidatedHFAddon()]


def natives_of(groups: Sequence[HeldGroup]) -> list[HeldTensor]:
    """The native tensors of groups that have to be computed."""
    return [tensor for group in groups for tensor in group.natives]


def _uncomputed(rounded: Sequence[HeldTensor], groups: Sequence[HeldGroup]) -> list[HeldTensor]:
    """What holds the exact values: the tensors, but for those that have to be computed what they are computed from."""
    names = {tensor.spec.name for tensor in rounded}
    computed = [held for held in groups if not names.isdisjoint(spec.name for spec in held.computed.hub)]
    apart = {spec.name for held in computed for spec in held.computed.hub}
    return [*(tensor for tensor in rounded if tensor.spec.name not in apart), *natives_of(computed)]


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
    source = open_source(path, group)
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
    return Source(source.path, source.files, tensors)


def _has_natives(held: HeldGroup, source: Source) -> bool:
    return all(tensor.spec.name in source.tensors for tensor in held.natives)


def _speaks_native(hub: HubState, source: Source, group: Group) -> bool:
    """Whether the source has the model's own names and lacks some of the hub's: another writer's state dict."""
    hub_names = [*(t.spec.name for t in hub.held), *(s.name for held in hub.groups for s in held.computed.hub)]
    lacks = any(name not in source.tensors for name in hub_names)
    has_all = all(tensor.spec.name in source.tensors for tensor in hub.native)
    # Stages may differ; one whose names are the same either way has no say.
    return group.any(lacks, "comparing names") and not group.any(not has_all, "comparing names")
