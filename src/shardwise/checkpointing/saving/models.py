"""Saving models: which files, under which names, in which mode."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import cast

import torch

from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, huggingface
from shardwise.addons.hf_config import CONFIG
from shardwise.checkpointing.arguments import refuse_whole_adapter
from shardwise.checkpointing.hub import HubState, Recast, loose_ties, memory_of, natives_of, require_memory, settle_ties
from shardwise.checkpointing.module_state import module_state_names, module_state_step
from shardwise.checkpointing.per_rank import model_steps
from shardwise.checkpointing.saving import checks
from shardwise.checkpointing.saving.commits import Closing
from shardwise.checkpointing.saving.hooks import ModelRequest, hook_arguments, leading_own, run_after, run_hooks
from shardwise.checkpointing.saving.torch_format import capture_distcp, tensors_alone, write_distcp
from shardwise.comm import Group, JsonValue
from shardwise.convert.rules import HeldGroup
from shardwise.disk.names import is_file
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import storage_errors
from shardwise.engine.agreement import Statement
from shardwise.engine.computed import ComputedPlan, declared
from shardwise.engine.export import Copies, ExportOptions, ExportPlan, make_room, plan_export, write_export
from shardwise.engine.memo import Memo
from shardwise.engine.merge import write_merged
from shardwise.engine.name_suggestions import listed
from shardwise.engine.records import ComponentRecord, Step
from shardwise.engine.replicas import comparison
from shardwise.engine.shards import ShardPlan, without_tensors, write_shards
from shardwise.errors import ExportMismatchError, ShardwiseError
from shardwise.format import notes
from shardwise.format.manifest import AliasRecord
from shardwise.geometry import TensorSpec
from shardwise.plan.deferred import release
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import left_to_others, plan_shards
from shardwise.settings import SaveConsolidatedMode
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.model_parts import described_part
from shardwise.stateful_wrappers.names import Listing, undeclared_names
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.wrapping import is_hub_mixin

_LOG = logging.getLogger(__name__)
CONSOLIDATED_DIR = "consolidated"
#: Component of the shards beside an export that rounds: the manifest lists a tensor once in a component.
EXACT = "model.exact"
CONSOLIDATE_NAME = "consolidate.sh"
CONSOLIDATE_SCRIPT = b'#!/bin/sh\nexec python -m shardwise consolidate "$(dirname "$0")" "$@"\n'


@dataclass(frozen=True, slots=True)
class Described:
    """A model to save: what this rank holds, as it is written and ``exact`` beside an export, and all ranks' facts.

    The rosters say who holds what of the tensors that are written, that an export is computed from, and that go beside
    it.
    """

    hub: HubState
    own: Recast
    exact: list[HeldTensor]
    roster: Roster
    computed: Roster
    beside: Roster
    facts: checks.Facts


class ModelSave:
    """One save of a model: captured now, written by `steps`, with local ``closing`` work. All ranks make one."""

    def __init__(self, request: ModelRequest) -> None:
        session, directory = request.session, request.directory
        self._session, self._directory, self._reserve = session, directory, request.reserve
        own = leading_own(request.addons)
        # The library's own addon works locally, inside steps whose failures reach all ranks anyway.
        self._describes, self._addons = bool(own), request.addons[own:]
        self._exporter: huggingface.HFMetadataExporter | None = None
        self._refusal: Exception | None = None
        self._loose_ties: dict[str, str] = {}
        self._untied_misfit: ExportMismatchError | None = None
        self._closing: list[Callable[[Group], None]] = []
        self._is_final = request.is_final
        self._exports = session.config.exports(is_final_checkpoint=request.is_final)
        self._carried: list[str] = []
        self.state = ModelState(request.model)
        self.base = session.base()
        self._args = hook_arguments(request, self.state)
        self._args["original_model_path"] = session.base_path()
        self._args["hf_metadata_dir"] = str(directory / notes.METADATA_DIR)
        self._args["consolidated_path"] = str(directory / CONSOLIDATED_DIR) if self._exports else None

    def steps(self) -> list[Step]:
        """Capture the model, run the addons' ``pre_save`` hooks, and return the steps that write it. All ranks call."""
        try:
            if self._session.config.model_save_format == "torch_save":
                steps = self._distcp()
            else:
                steps = self._exported() if self._exports else self._sharded()
        except ShardwiseError:
            if self._refusal is not None:  # of this rank's metadata exporter; the other ranks get a report of it
                raise self._refusal from None
            raise
        steps += model_steps(self._session, self.state, self._directory)
        if self._describes:
            self._closing.append(lambda group: huggingface.copy_metadata(self._args) if group.is_main else None)
        if not self._addons:
            return steps
        # Other addons may read everything that is there, and communicate.
        return [*steps, partial(self._after, self.take_closing())]

    def take_closing(self) -> Closing:
        """The local work behind the steps, which knows this save; handed over, so that nothing keeps the two alive."""
        closing, self._closing = self._closing, []
        return closing

    def _sharded(self) -> list[Step]:
        described = self._described()
        # An export made later carries the same tensors over.
        self._carried = self._compare_with_base(described.roster.specs, described.facts)
        shards = self._shards(described.own.export, described.roster, "model", described)
        self._closing.append(self._leave_script)
        return [shards, *self._also(described.facts, described.hub.listing, described.hub.unwritten_aliases)]

    def _distcp(self) -> list[Step]:
        session = self._session
        is_wanted = self._is_final and session.config.consolidated_mode is not SaveConsolidatedMode.FALSE
        if is_wanted and session.group.is_main:
            _LOG.warning(
                "this checkpoint has no Hugging Face export: model_save_format 'torch_save' writes none; "
                "`shardwise consolidate` makes one of it"
            )
        kept: dict[str, str] = {}
        held: list[HeldTensor] = []
        listed: Listing | None = None
        tensors: dict[str, torch.Tensor] = {}
        carries = self.base is not None and session.config.pass_through_unloaded

        def describe() -> Statement:
            nonlocal listed
            self._begin()
            listed = self.state.listing()
            require_memory(((named.name, named.tensor) for named in listed.tensors), "values to save")
            kept.update(undeclared_names(listed.tensors, self.state.model))
            meshes = MeshRegister(session.may_differ.of_model(listed.tensors, self.state.model))
            held.extend(held_tensors(((named.name, named.tensor) for named in listed.tensors), meshes))
            tensors.update(capture_distcp(session, "model", tensors_alone(self.state.state_dict())))
            facts = checks.Facts(self._describes and huggingface.is_quantized(self._args), [module_state_names(listed)])
            if carries:
                hub = session.names.capture(self.state)
                specs = [tensor.spec for tensor in (*hub.held, *declared(hub.groups))]
                facts = facts._replace(
                    expectation=checks.expectation_of(self.state.model, hub.absent, None), specs=specs
                )
            return Statement((held,), cast(JsonValue, facts))

        agreed = session.agreement("model").reach(describe, "describing the model")
        facts, [roster] = checks.Facts.merged(agreed.notes), agreed.rosters
        if carries:
            self._carried = self._compare_with_base(facts.specs, facts)
        with session.group.together("preparing the model's directory"):
            self._prepare_directory(facts)
        run_hooks(self._addons, "pre_save", self._args, session.group)
        rank = session.group.rank
        replicas, others = comparison(held, roster, rank), left_to_others(held, roster, rank)
        write = partial(write_distcp, tensors, self._directory, replicas=replicas, others=others)
        return [*self._also(facts, listed, kept), write]

    def _also(self, facts: checks.Facts, listing: Listing | None, aliases: Mapping[str, str]) -> list[Step]:
        """The steps that write module state, and add aliases to the manifest. All ranks call."""
        record = ComponentRecord(aliases=tuple(AliasRecord("model", alias, name) for alias, name in aliases.items()))
        session, steps = self._session, [lambda group: record]
        if not any(any(names) for names in facts.beside):
            return steps
        return [module_state_step(listing, facts.beside, self._directory, session.group, session.storage), *steps]

    def _exported(self) -> list[Step]:
        """Plan an export and prepare its directory; all ranks call."""
        session, described = self._session, self._described()
        hub, own, roster, facts = described.hub, described.own, described.roster, described.facts
        names = self._compare_with_base(roster.specs, facts)
        passed = [self.base.source.tensors[name] for name in names] if self.base is not None else []
        computed = ComputedPlan(hub.groups, described.computed)
        copies = Copies(tuple(passed), self.base.source.files if self.base is not None else ())
        options, directory = self._options(roster.specs), self._directory / CONSOLIDATED_DIR
        config = session.config
        # Whether shards are merged into the export, instead of writing it in place.
        merges = config.single_rank_consolidation or config.staging_dir is not None or not config.random_writes

        def prepare() -> ExportPlan:
            known = session.model_plan.get(
                [*own.export, roster, *computed.groups],
                (options, copies),
                lambda: plan_export(own.export, roster, session.group, directory, options, computed, copies),
            )
            self._look_at_ties(roster)
            self._prepare_directory(facts, names)
            self._check_opening(described, [tensor.spec for tensor in passed])
            plan = replace(known, directory=directory, within=CONSOLIDATED_DIR, has_room=not merges)
            if session.group.is_main and plan.has_room:
                make_room(plan, session.storage)
            return plan

        plan = session.group.attempt(prepare, "planning the export and preparing its directory")
        run_hooks(self._addons, "pre_save", self._args, session.group)
        if merges:
            write = partial(
                write_merged,
                plan,
                roster,
                storage=session.storage,
                single_rank=config.single_rank_consolidation,
                staging_dir=session.staging_dir,
                patience_seconds=config.consolidation_timeout_minutes * 60,
            )
        else:
            write = partial(write_export, plan, storage=session.storage)
        steps = [self._settling_ties(_release_after(write))]
        if session.config.verify_export:
            self._closing.append(partial(checks.read_back, plan))
        return [*steps, *self._beside(described)]

    def _beside(self, described: Described) -> list[Step]:
        """The steps that write what a resume needs beside the export. All ranks call."""
        hub, steps = described.hub, list[Step]()
        if described.beside.specs:  # of any rank: a stage may have no such tensor where another does
            excluded_names = {tensor.spec.name for tensor in hub.excluded}
            steps.append(self._shards(described.exact, described.beside, EXACT, excluded=excluded_names))
        return [*steps, *self._also(described.facts, hub.listing, hub.unwritten_aliases)]

    def _described(self) -> Described:
        """Make room, capture the model, and agree on who holds what. All ranks call."""
        session = self._session
        base = None if not self._exports else {} if self.base is None else self.base.specs
        captured: list[tuple[HubState, Recast, list[HeldTensor]]] = []
        has_expectation = self.base is not None or session.first_exchange.names_keys

        def describe() -> Statement:
            self._begin()
            hub, quantized = self._captured()
            natives = natives_of(hub.groups)
            held = [*hub.held, *(declared(hub.groups) if self._exports else [*natives, *hub.excluded])]
            own = session.recast.get(held, self._exports, lambda: Recast.of(held, base, hub.outside))
            exact = [*_uncomputed(own.exact, hub.groups), *hub.excluded] if self._exports else []
            captured.append((hub, own, exact))
            keys = session.config.model_state_dict_keys
            facts = checks.Facts(
                quantized,
                [module_state_names(hub.listing)],
                checks.expectation_of(self.state.model, hub.absent, keys) if has_expectation else checks.Expectation(),
                own.native,
                sorted(own.outside),
                [tensor.spec.name for tensor in hub.excluded],
            )
            return Statement((own.export, natives if self._exports else [], exact), cast(JsonValue, facts))

        agreed = session.agreement("model").reach(describe, "describing the model")
        roster, computed, beside = agreed.rosters
        return Described(*captured[0], roster, computed, beside, checks.Facts.merged(agreed.notes))

    def _begin(self) -> None:
        """Let the model's own metadata exporter refuse the save, on every rank, and make room. Local."""
        try:
            self._exporter = huggingface.own_exporter(self._args) if self._describes else None
        except Exception as error:
            self._refusal = error
            raise
        if self._session.group.is_main:
            self._reserve()

    def _captured(self) -> tuple[HubState, bool]:
        """This rank's tensors, as they are to be written, and whether there are quantized parameters. Local."""
        session = self._session
        hub = session.names.capture(self.state)
        if hub is not session.checked_state:
            require_memory(memory_of(hub.native), "values to save")
            session.checked_state = hub
        # As long as the same is captured, the parameters are the same.
        quantized = session.is_quantized.get([hub], None, self._look_at_parameters)
        return self._staged(hub), quantized

    def _staged(self, hub: HubState) -> HubState:
        # In one call: each component has one piece of memory, which a second call would overwrite.
        session = self._session
        natives = iter(session.staged("model.native", natives_of(hub.groups)))
        groups = tuple(replace(held, natives=tuple(islice(natives, len(held.natives)))) for held in hub.groups)
        staged = session.staged("model", [*hub.held, *hub.excluded])
        own = len(hub.held)
        return replace(hub, held=tuple(staged[:own]), excluded=tuple(staged[own:]), groups=groups)

    def _look_at_parameters(self) -> bool:
        session = self._session
        if session.may_export and session.config.verify_export:
            refuse_whole_adapter(self.state.model)
        return self._describes and huggingface.is_quantized(self._args)

    def _options(self, specs: Sequence[TensorSpec]) -> ExportOptions:
        config, described = self._session.config, described_part(self.state.model)
        files = dict(self.base.files) if self.base is not None else {}
        if described is not None and is_hub_mixin(described):
            # huggingface_hub's mixin opens this one file, whatever there is beside it.
            files = dict.fromkeys((spec.name for spec in specs), "model.safetensors")
        return ExportOptions(
            base_files=files,
            max_file_bytes=config.max_file_bytes,
            stem="diffusion_pytorch_model" if config.diffusers_compatible else "model",
            threads=self._session.writing_threads,
        )

    def _compare_with_base(self, specs: Sequence[TensorSpec], facts: checks.Facts) -> list[str]:
        """Compare what will be written with the base model; returns the names of tensors to carry over.

        All ranks call. Rank 0 compares, since the base's config may differ or be absent on another machine.
        """
        base, names_keys = self.base, self._session.first_exchange.names_keys
        if base is None and not names_keys:
            return []
        config, group = self._session.config, self._session.group
        verifies = config.verify_export and self._exports

        def compare() -> list[str]:
            if verifies:
                checks.require_equal(checks.compare_with_keys(specs, facts.expectation), self._directory)
            if base is None:
                return []
            through = config.pass_through_unloaded
            passed, differences = checks.compare_with_base(specs, base, facts.expectation, pass_through=through)
            if verifies:
                checks.require_equal(differences, base.directory)
            base.check_readable(passed)
            return passed

        return group.broadcast_result(compare, "comparing the export with the base model")

    def _prepare_directory(self, facts: checks.Facts, passed: Sequence[str] = ()) -> None:
        """Make the directory and write the files beside the weights. Local; only rank 0 writes."""
        session = self._session
        if self.base is not None:
            numbers = self.base.numbers
            self._args["fqn_to_file_index_mapping"] = {n: numbers[f] for n, f in self.base.files.items()}
            self._args["fqn_to_dtype_mapping"] = {n: spec.dtype for n, spec in self.base.specs.items()}
        if not session.group.is_main:
            return
        session.storage.make_directory(self._directory / notes.METADATA_DIR)
        content = {
            notes.NATIVE_DTYPES: dict(facts.native),
            notes.PASSED_THROUGH: list(passed),
            notes.KEPT_OUT: list(facts.excluded),
            notes.APART: sorted(facts.outside),
            notes.LOOSE_TIES: self._loose_ties,
            notes.EXPORT: self._export_note(),
        }
        for name, value in content.items():
            if value:
                text = json.dumps(value, indent=1, sort_keys=True) + "\n"
                write_file(session.storage, self._directory / notes.METADATA_DIR / name, text.encode())
        if self._describes:
            huggingface.write_metadata(self._args, facts.quantized, self._exporter)
            self._log_missing_config(facts)

    def _log_missing_config(self, facts: checks.Facts) -> None:
        """Log once why an export has no configuration, and which tensors are not in it. Local; rank 0 calls."""
        session = self._session
        if session.may_export and facts.outside:
            kept = listed(sorted(facts.outside))
            session.log_once(logging.INFO, f"kept beside the export, for resuming: {kept}")
        config = self._directory / notes.METADATA_DIR / CONFIG
        if session.may_export and self._exporter is None and not is_file(config):
            session.log_once(
                logging.WARNING, f"the export has no config.json: {huggingface.why_no_config(self.state.model)}"
            )

    def _look_at_ties(self, roster: Roster) -> None:
        """Find the configuration's ties with both names in the files. Local."""
        if self._session.group.is_main and self._describes:
            self._loose_ties = loose_ties(self.state.model, {spec.name for spec in roster.specs})

    def _settling_ties(self, step: Step) -> Step:
        """The step, after which the configuration's ties are corrected by what was written."""
        written: list[ComponentRecord] = []

        def settle(group: Group) -> None:
            if group.is_main and self._loose_ties:
                is_untied = settle_ties(self._loose_ties, written[0].tensors, self._directory / notes.METADATA_DIR)
                if is_untied and self._untied_misfit is not None:
                    raise self._untied_misfit

        def run(group: Group) -> ComponentRecord:
            written[:] = [step(group)]
            return written[0]

        self._closing.append(settle)
        return run

    def _check_opening(self, described: Described, passed: Sequence[TensorSpec]) -> None:
        """Check that what config.json describes would load the export, this one or a later one. Local."""
        session = self._session
        if not (session.group.is_main and session.may_export and session.config.verify_export):
            return
        if not self._exports and described.hub.groups:
            return  # shards hold the tensors that the names in files are computed from
        directory, left_out = (
            self._directory / notes.METADATA_DIR,
            {*described.facts.outside, *described.facts.excluded},
        )
        check = partial(
            session.class_check.check,
            self.state.model,
            directory,
            described.roster,
            session.log_once,
            passed=passed,
            left_out=left_out,
        )
        check()
        if self._exports and self._loose_ties:
            # Whether the two differ is known when they are written; the export is then opened as untied.
            try:
                check(untie=True)
            except ExportMismatchError as misfit:
                self._untied_misfit = misfit

    def _export_note(self) -> dict[str, object]:
        """The layout of an export made later; empty where this save writes one."""
        if self._exports:
            return {}
        options, base = self._options(()), self.base
        directory = None if base is None else str(base.directory.absolute())
        files = [] if base is None else list(base.numbers)
        values = (options.stem, options.max_file_bytes, directory, files, self._carried)
        return dict(zip(notes.EXPORT_KEYS, values, strict=True))

    def _leave_script(self, group: Group) -> None:
        """Put the script that makes the export later beside shards that have none. Local."""
        if group.is_main:
            script = self._directory / CONSOLIDATE_NAME
            write_file(self._session.storage, script, CONSOLIDATE_SCRIPT)
            with storage_errors(script):
                self._session.storage.make_executable(script)

    def _after(self, closing: Closing, group: Group) -> ComponentRecord:
        with group.together("finishing the model's directory"):
            for work in closing:
                work(group)
        return run_after(self._addons, self._args, self._session, group)

    def _shards(
        self,
        held: Sequence[HeldTensor],
        roster: Roster,
        component: str,
        described: Described | None = None,
        excluded: Collection[str] = (),
    ) -> Step:
        """Plan shards, and with what was described of the model prepare the directory. All ranks call."""
        session = self._session
        known: ShardPlan | None = None
        nbytes, failure = 0, None
        try:
            memo = session.shard_plans.setdefault(component, Memo())
            known = memo.get([*held, roster], None, lambda: self._shard_plan(held, roster, component, excluded))
            nbytes = known.own_bytes
            if described is not None:
                self._look_at_ties(roster)
                self._prepare_directory(described.facts)
                self._check_opening(described, ())
        except Exception as error:  # noqa: BLE001 - raised on every rank by fold()
            failure = error
        _, [total] = session.group.fold([], [nbytes], "planning the shards and preparing their directory", failure)
        assert known is not None
        if described is not None:
            run_hooks(self._addons, "pre_save", self._args, session.group)
        plan = replace(known, directory=self._directory, all_bytes=total)
        return _release_after(partial(write_shards, plan, storage=session.storage))

    def _shard_plan(
        self, held: Sequence[HeldTensor], roster: Roster, component: str, excluded: Collection[str]
    ) -> ShardPlan:
        rank = self._session.group.rank
        # Exact values beside an export are compared with the export; only excluded tensors are compared here.
        compared = held if component != EXACT else [t for t in held if t.spec.name in excluded]
        index = None
        if self.base is not None:
            numbers = self.base.numbers
            last = max(numbers.values(), default=1)
            index = {s.name: numbers.get(self.base.files.get(s.name, ""), last) for s in roster.specs}
        if roster.specs:
            files = plan_shards(held, roster, rank, index)
        else:
            files = (without_tensors(),) if rank == 0 else ()
        return ShardPlan(self._directory, component, roster, files, replicas=(comparison(compared, roster, rank),))


def _release_after(step: Step) -> Step:
    """The step, which then releases the tensors that modules have made for it."""

    def run(group: Group) -> ComponentRecord:
        try:
            return step(group)
        finally:
            release()

    return run


def default_addons(is_peft: bool) -> list[CheckpointAddon]:
    """The addons of an ordinary save: Hugging Face metadata, or an adapter's."""
    if is_peft:
        from shardwise.addons import PeftAddon

        return [PeftAddon()]
    return [ConsolidatedHFAddon()]


def _uncomputed(rounded: Sequence[HeldTensor], groups: Sequence[HeldGroup]) -> list[HeldTensor]:
    """The tensors with the exact values: for computed ones, the tensors that they are computed from."""
    names = {tensor.spec.name for tensor in rounded}
    computed = [held for held in groups if not names.isdisjoint(spec.name for spec in held.computed.hub)]
    outside = {spec.name for held in computed for spec in held.computed.hub}
    return [*(tensor for tensor in rounded if tensor.spec.name not in outside), *natives_of(computed)]
