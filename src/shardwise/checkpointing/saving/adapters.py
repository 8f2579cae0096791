"""Adapter checkpoints, written by all ranks: peft's ``adapter_model.safetensors`` or diffusers' LoRA file.

Beside them the merged export, of base plus adapter, without a gather.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from shardwise.addons import ConsolidatedHFAddon
from shardwise.checkpointing import adapters
from shardwise.checkpointing.hub import HubState, memory_of, require_memory
from shardwise.checkpointing.optimizers import as_list
from shardwise.checkpointing.saving.checks import Facts
from shardwise.checkpointing.saving.commits import Closing
from shardwise.checkpointing.saving.hooks import ModelRequest, hook_arguments, run_after, run_hooks
from shardwise.checkpointing.saving.models import Described, ModelSave
from shardwise.engine.agreement import Agreement
from shardwise.engine.export import ExportOptions, ExportPlan, plan_export, write_export
from shardwise.engine.name_suggestions import listed
from shardwise.engine.records import Step
from shardwise.geometry import TensorSpec
from shardwise.peft.capture import hold_adapter
from shardwise.peft.check import vllm_limits
from shardwise.peft.config import adapter_settings
from shardwise.peft.diffusers_lora import LORA_WEIGHTS_NAME, as_diffusers, check_opens, header_metadata
from shardwise.peft.merge import MergedPart, merged_parts
from shardwise.peft.tensors import ADAPTER_EXTRA_NAME, ADAPTER_WEIGHTS_NAME, AdapterFile, AdapterTensors
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister


class AdapterSave:
    """One save of a model's adapters; the counterpart of `ModelSave`. All ranks make one."""

    def __init__(self, request: ModelRequest) -> None:
        self._request, self._session, self._directory = request, request.session, request.directory
        self._addons, self._config = request.addons, request.peft_config
        self._closing: Closing = ()
        self.state = ModelState(request.model)
        self._args = hook_arguments(request, self.state)

    def steps(self) -> list[Step]:
        """Capture the adapters, check that they are complete, and return the steps that write them. All ranks call."""
        session, group, parts = self._session, self._session.group, self.state.model
        with group.together("preparing the adapter's directory"):
            adapters.refuse_wrappers(parts)
            if group.is_main:
                self._request.reserve()
                session.storage.make_directory(self._directory)
        run_hooks(self._addons, "pre_save", self._args, group)
        component = group.attempt(
            lambda: adapters.diffusers_component(session, parts, self._config), "looking at the adapter"
        )
        settings = adapter_settings(
            parts,
            self._config,
            group,
            v4_compatible=session.config.v4_compatible,
            original_model_path=session.base_name(),
            legacy_layout=session.config.legacy_paramwrapper_layout,
            diffusers_compatible=session.config.diffusers_compatible,
        )
        # Parameters with optimizer state have been trained, frozen by now or not.
        states = [getattr(each, "state", None) for each in as_list(self._request.optimizer)]
        stepped = {id(p) for state in states if isinstance(state, Mapping) for p in state if state[p]}
        captured = group.attempt(
            lambda: adapters.capture(session, parts, self._config, stepped), "describing the adapter"
        )
        declared = adapters.declare(session, captured)
        steps = [
            self._file_step(file, settings[file.adapter_name], component, declared, captured) for file in captured.files
        ]
        if declared.extra:
            steps.append(self._extra_step(captured))
        if session.config.exports(is_final_checkpoint=self._request.is_final):
            merged = group.attempt(lambda: merged_parts(parts), "describing the merged model")
            save = MergedSave(replace(self._request, session=session.of_model(MERGED)), parts, merged)
            steps += save.steps()
            self._closing = save.take_closing()
        return [*steps, partial(run_after, self._addons, self._args, session)]

    def take_closing(self) -> Closing:
        """The local work behind the steps, as of a `ModelSave`."""
        return self._closing

    def _file_step(
        self,
        file: AdapterFile,
        settings: Mapping[str, object],
        component: str,
        declared: adapters.Declared,
        captured: AdapterTensors,
    ) -> Step:
        """One adapter's file. All ranks call."""
        session, group, parts, name = self._session, self._session.group, self.state.model, file.adapter_name

        def hold() -> Sequence[HeldTensor]:
            entries = as_diffusers(file, component).entries if component else file.entries
            named = [(entry.spec.name, entry.tensor) for entry in entries]
            return hold_adapter(entries, MeshRegister(session.may_differ.of_adapter(named, parts)))

        def look(roster: Roster) -> ExportOptions:
            adapters.check_adapter_file(roster, settings, declared, captured, name, parts, component)
            if component:
                check_opens(parts, self._config, file, session.logged)
            elif group.is_main:
                limits = vllm_limits([spec.name for spec in roster.specs], settings, has_extra=declared.extra)
                text = f"vLLM does not serve the adapter {name!r} as it was trained: {'; '.join(limits)}"
                if limits:
                    session.log_once(logging.INFO, text, f"vLLM/{name}")
            return ExportOptions(
                max_file_bytes=None,
                stem=(LORA_WEIGHTS_NAME if component else ADAPTER_WEIGHTS_NAME).removesuffix(".safetensors"),
                # The manifest lists a tensor once in a component, and adapters have the same names.
                component="adapter" if not file.directory else f"adapter.{name}",
                index=False,
                metadata=header_metadata(settings, component) if component else None,
            )

        return self._writing(hold, f"adapter/{name}", f"the adapter {name}", look, file.directory)

    def _writing(
        self,
        hold: Callable[[], Sequence[HeldTensor]],
        staging: str,
        what: str,
        look: Callable[[Roster], ExportOptions],
        directory: str = "",
    ) -> Step:
        """Stage what this rank holds, agree on who holds what, and plan a file, which the step writes. All call."""
        session, held = self._session, list[HeldTensor]()

        def describe() -> Sequence[HeldTensor]:
            held.extend(session.staged(staging, hold()))
            return held

        def plan() -> ExportPlan:
            return plan_export(held, roster, session.group, self._directory / directory, look(roster))

        roster = Agreement(session.group, session.stage).roster(describe, f"describing {what}")
        planned = session.group.attempt(plan, f"checking {what}")
        return lambda group: write_export(planned, group, session.storage).below(directory)

    def _extra_step(self, captured: AdapterTensors) -> Step:
        """Tensors that are trained beside the adapter, in a file of their own. All ranks call."""
        session, stem = self._session, ADAPTER_EXTRA_NAME.removesuffix(".safetensors")

        def look(roster: Roster) -> ExportOptions:
            if session.group.is_main:
                names = [spec.name for spec in roster.specs]
                text = (
                    f"{len(names)} tensors change beside the adapter and are saved in {ADAPTER_EXTRA_NAME}, which "
                    f"restore and load_model read and peft does not: {listed(names)}"
                )
                session.log_once(logging.INFO, text, ADAPTER_EXTRA_NAME)
            return ExportOptions(max_file_bytes=None, stem=stem, component=stem, index=False)

        hold = partial(adapters.hold_extra, session, captured, self.state.model)
        return self._writing(hold, "adapter_extra", "what is trained beside the adapter", look)


#: Component of the merged tensors: the manifest lists a tensor once in a component.
MERGED = "merged"


class MergedSave(ModelSave):
    """The merged export of one save of a model's adapters; it writes nothing that resumes. All ranks make one.

    ``parts`` have their adapters, ``merged`` are the same without; the request's directory exists.
    """

    def __init__(self, request: ModelRequest, parts: Sequence[nn.Module], merged: Sequence[MergedPart]) -> None:
        models = [part.model for part in merged]
        own = replace(request, model=models, addons=[ConsolidatedHFAddon()], peft_config=None, reserve=lambda: None)
        super().__init__(own)
        self._parts, self._merged = parts, merged

    def _captured(self) -> tuple[HubState, bool]:
        session = self._session
        hub = session.names.capture(self.state)
        hub = adapters.merged_state(hub, self._parts, self._merged, session.may_differ)
        require_memory(memory_of(hub.held), "values to save")
        return self._staged(hub), self._look_at_parameters()

    def _options(self, specs: Sequence[TensorSpec]) -> ExportOptions:
        return replace(super()._options(specs), component=MERGED)

    def _prepare_directory(self, facts: Facts, passed: Sequence[str] = ()) -> None:
        # The notes beside an export are for resuming from it.
        super()._prepare_directory(facts._replace(native={}, outside=(), excluded=()))

    def _beside(self, described: Described) -> list[Step]:
        return []
