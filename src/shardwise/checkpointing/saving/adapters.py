"""Adapter checkpoints: peft's ``adapter_model.safetensors`` or diffusers' LoRA file, written by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from shardwise.addons import CheckpointAddon
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.adapters import (
    Declared,
    capture,
    check_adapter_file,
    declare,
    diffusers_component,
    hold_extra,
    refuse_wrappers,
)
from shardwise.checkpointing.optimizers import Optimizers, several
from shardwise.checkpointing.saving.hooks import hook_arguments, run_after, run_hooks
from shardwise.checkpointing.saving.merged import MERGED, MergedSave
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.engine.agreement import Agreement
from shardwise.engine.export import ExportOptions, ExportPlan, plan_export, write_export
from shardwise.engine.jobs import Step
from shardwise.engine.name_suggestions import listed
from shardwise.peft.capture import hold_adapter
from shardwise.peft.check import vllm_limits
from shardwise.peft.config import adapter_settings
from shardwise.peft.diffusers_lora import LORA_WEIGHTS_NAME, as_diffusers, check_opens, header_metadata
from shardwise.peft.merge import merged_parts
from shardwise.peft.tensors import ADAPTER_EXTRA_NAME, ADAPTER_WEIGHTS_NAME, AdapterFile, AdapterTensors
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister

_LOG = logging.getLogger(__name__)


class AdapterSave:
    """One save of a model's adapters; the counterpart of `ModelSave`. All ranks make one."""

    def __init__(
        self,
        session: Session,
        model: nn.Module | Sequence[nn.Module],
        directory: Path,
        addons: Sequence[CheckpointAddon],
        *,
        tokenizer: SavesPretrained | None,
        peft_config: object | None,
        is_final: bool,
        reserve: Callable[[], None],
        optimizer: Optimizers | None = None,
    ) -> None:
        self._session, self._directory, self._reserve = session, directory, reserve
        self._addons, self._config, self._stepped = addons, peft_config, stepped(optimizer)
        self.closing: list[Callable[[Group], None]] = []
        self.state = ModelState(model)
        self._args = hook_arguments(session, self.state, directory, tokenizer, peft_config, is_final)

    def steps(self) -> list[Step]:
        """Capture the adapters, check that they are complete, and return the steps that write them. All ranks call."""
        session, group, parts = self._session, self._session.group, self.state.model
        with group.together("preparing the adapter's directory"):
            refuse_wrappers(parts)
            if group.is_main:
                self._reserve()
                session.storage.make_directory(self._directory)
        run_hooks(self._addons, "pre_save", self._args, group)
        component = group.attempt(lambda: diffusers_component(session, parts, self._config), "looking at the adapter")
        settings = adapter_settings(
            parts,
            self._config,
            group,
            v4_compatible=session.config.v4_compatible,
            original_model_path=session.base_name(),
            legacy_layout=session.config.legacy_paramwrapper_layout,
            diffusers_compatible=session.config.diffusers_compatible,
        )
        captured = group.attempt(lambda: capture(session, parts, self._config, self._stepped), "describing the adapter")
        declared = declare(session, captured)
        steps = [
            self._file_step(file, settings[file.adapter_name], component, declared, captured) for file in captured.files
        ]
        if declared.extra:
            steps.append(self._extra_step(captured))
        return [*steps, *self._merged_steps(), partial(run_after, self._addons, self._args, session)]

    def _file_step(
        self,
        file: AdapterFile,
        settings: Mapping[str, object],
        component: str,
        declared: Declared,
        captured: AdapterTensors,
    ) -> Step:
        """One adapter's file. All ranks call."""
        session, group, parts, name = self._session, self._session.group, self.state.model, file.adapter_name

        def hold() -> Sequence[HeldTensor]:
            entries = as_diffusers(file, component).entries if component else file.entries
            named = [(entry.spec.name, entry.tensor) for entry in entries]
            return hold_adapter(entries, MeshRegister(session.may_differ.of_adapter(named, parts)))

        held, roster = self._agreed(hold, f"adapter/{name}", f"describing the adapter {name}")

        def plan() -> ExportPlan:
            check_adapter_file(roster, settings, declared, captured, name, parts, component)
            if group.is_main and not component:
                _log_vllm_limits(session, name, roster, settings, declared)
            if component:
                check_opens(parts, self._config, file, session.logged)
            options = ExportOptions(
                max_file_bytes=None,
                stem=(LORA_WEIGHTS_NAME if component else ADAPTER_WEIGHTS_NAME).removesuffix(".safetensors"),
                # The manifest lists a tensor once in a component, and adapters have the same names.
                component="adapter" if not file.directory else f"adapter.{name}",
                index=False,
                metadata=header_metadata(settings, component) if component else None,
            )
            return plan_export(held, roster, group, self._directory / file.directory, options)

        planned = group.attempt(plan, f"checking the adapter {name}")
        return lambda group: write_export(planned, group, session.storage).below(file.directory)

    def _agreed(
        self, hold: Callable[[], Sequence[HeldTensor]], staging: str, what: str
    ) -> tuple[Sequence[HeldTensor], Roster]:
        """Stage what this rank holds, and agree on who holds what. All ranks call."""
        session, held = self._session, list[HeldTensor]()

        def describe() -> Sequence[HeldTensor]:
            held.extend(session.staged(staging, hold()))
            return held

        return held, Agreement(session.group, session.stage).roster(describe, what)

    def _merged_steps(self) -> list[Step]:
        """The steps of the merged export, where this save writes one. All ranks call."""
        session, is_final = self._session, self._args["is_final_checkpoint"]
        if not (session.config.export_merged and session.exports(is_final)):
            return []
        merged = session.group.attempt(lambda: merged_parts(self.state.model), "describing the merged model")
        save = MergedSave(
            session.of_model(MERGED),
            self.state.model,
            merged,
            self._directory,
            tokenizer=self._args["tokenizer"],
            is_final=is_final,
        )
        steps = save.steps()
        self.closing += save.closing
        return steps

    def _extra_step(self, captured: AdapterTensors) -> Step:
        """Tensors that are trained beside the adapter, in a file of their own. All ranks call."""
        session, group, what = self._session, self._session.group, "what is trained beside the adapter"
        held, roster = self._agreed(
            lambda: hold_extra(session, captured, self.state.model), "adapter_extra", f"describing {what}"
        )

        def plan() -> ExportPlan:
            stem = ADAPTER_EXTRA_NAME.removesuffix(".safetensors")
            options = ExportOptions(max_file_bytes=None, stem=stem, component=stem, index=False)
            if group.is_main:
                _log_extra_weights(session, roster)
            return plan_export(held, roster, group, self._directory, options)

        planned = group.attempt(plan, f"planning the file of {what}")
        return lambda group: write_export(planned, group, session.storage)


def stepped(optimizer: Optimizers | None) -> frozenset[int]:
    """Identities of the parameters with optimizer state: those that have been trained, frozen by now or not."""
    states = [getattr(each, "state", None) for each in several(optimizer)]
    return frozenset(
        id(parameter) for state in states if isinstance(state, Mapping) for parameter in state if state[parameter]
    )


def _log_vllm_limits(
    session: Session, name: str, roster: Roster, settings: Mapping[str, object], declared: Declared
) -> None:
    """Log once which features of an adapter vLLM does not serve."""
    limits = vllm_limits([spec.name for spec in roster.specs], settings, has_extra=declared.extra)
    if limits and (key := f"vLLM/{name}") not in session.logged:
        session.logged.add(key)
        _LOG.info("vLLM does not serve the adapter %r as it was trained: %s", name, "; ".join(limits))


def _log_extra_weights(session: Session, roster: Roster) -> None:
    names = [spec.name for spec in roster.specs]
    if ADAPTER_EXTRA_NAME not in session.logged:
        session.logged.add(ADAPTER_EXTRA_NAME)
        _LOG.info(
            "%d tensors change beside the adapter and are saved in %s, which restore and load_model read and peft does "
            "not: %s",
            len(names),
            ADAPTER_EXTRA_NAME,
            listed(names),
        )
