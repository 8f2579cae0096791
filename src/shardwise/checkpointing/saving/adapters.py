"""Adapter checkpoints: peft's ``adapter_model.safetensors`` or diffusers' LoRA file, written by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from shardwise.addons import CheckpointAddon, SaveHookArgs
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.loading.adapter_files import SavedAdapter, check_shared, find_saved, open_saved
from shardwise.checkpointing.optimizers import Optimizers, several
from shardwise.checkpointing.saving.hooks import after_arguments, run_hooks
from shardwise.checkpointing.saving.merged import MERGED, MergedSave, check_merging
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_file
from shardwise.engine.agreement import Agreement
from shardwise.engine.export import ExportOptions, ExportPlan, plan_export, write_export
from shardwise.engine.jobs import Step
from shardwise.engine.load import LoadOptions, OpenedLoad, listed_anywhere, open_described
from shardwise.engine.name_suggestions import listed
from shardwise.engine.records import ComponentRecord
from shardwise.errors import AdapterError, MissingTensorError, MisuseError
from shardwise.peft.allocator import ALLOCATOR_PREFIX, AllocatorRestore, restore_allocators
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.check import check_adapter, check_stages
from shardwise.peft.compatibility import check_opens as check_opens_in_peft
from shardwise.peft.compatibility import vllm_limits
from shardwise.peft.config import read_adapter_config
from shardwise.peft.diffusers_lora import (
    LORA_WEIGHTS_NAME,
    as_diffusers,
    as_peft,
    check_opens,
    check_scales,
    component_of,
    header_metadata,
    require_component,
)
from shardwise.peft.extra import base_tensors
from shardwise.peft.load import differing_settings
from shardwise.peft.merge import MergedPart, merged_parts
from shardwise.peft.models import is_peft_adapted
from shardwise.peft.settings import adapter_settings
from shardwise.peft.tensors import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_EXTRA_NAME,
    ADAPTER_WEIGHTS_NAME,
    AdapterFile,
    AdapterTensors,
)
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.sources.sources import open_source
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.state_dict_overrides import refuse_fsdp1
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.wrapping import is_average

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
        self._session = session
        self._reserve = reserve
        self.closing: list[Callable[[Group], None]] = []
        self._directory = directory
        self._addons = addons
        self.state = ModelState(model)
        self._config = peft_config
        self._stepped = stepped(optimizer)
        self._args: SaveHookArgs = {
            "model_state": self.state,
            "model_path": str(directory),
            "hf_metadata_dir": None,
            "consolidated_path": None,
            "tokenizer": tokenizer,
            "peft_config": peft_config,
            "original_model_path": session.base_name(),
            "v4_compatible": session.config.v4_compatible,
            "diffusers_compatible": session.config.diffusers_compatible,
            "legacy_paramwrapper_layout": session.config.legacy_paramwrapper_layout,
            "is_final_checkpoint": is_final,
            "pp_group": session.pp_group,
        }

    def steps(self) -> list[Step]:
        """Capture the adapters, check that they are complete, and return the steps that write them. All ranks call."""
        session, group = self._session, self._session.group
        with group.together("preparing the adapter's directory"):
            _refuse_wrappers(self.state.model)
            if group.is_main:
                self._reserve()
                session.storage.make_directory(self._directory)
        run_hooks(self._addons, "pre_save", self._args, group)
        component = ""
        with group.together("looking at the adapter"):
            component = _component(session, self.state.model, self._config)
        settings = adapter_settings(
            self.state.model,
            self._config,
            group,
            v4_compatible=session.config.v4_compatible,
            original_model_path=session.base_name(),
            legacy_layout=session.config.legacy_paramwrapper_layout,
            diffusers_compatible=session.config.diffusers_compatible,
        )
        captured: AdapterTensors | None = None
        with group.together("describing the adapter"):
            captured = capture(session, self.state.model, self._config, self._stepped)
        assert captured is not None
        declared = declare(session, captured)
        steps = [
            self._file_step(file, settings[file.adapter_name], component, declared, captured) for file in captured.files
        ]
        if declared.extra:
            steps.append(self._extra_step(captured))
        steps += self._merged_steps()
        return [*steps, self._after]

    def _file_step(
        self,
        file: AdapterFile,
        settings: Mapping[str, object],
        component: str,
        declared: Declared,
        captured: AdapterTensors,
    ) -> Step:
        """One adapter's file. All ranks call."""
        session, group = self._session, self._session.group
        held: list[HeldTensor] = []
        with group.together(f"describing the tensors of the adapter {file.adapter_name}"):
            entries = as_diffusers(file, component).entries if component else file.entries
            named = [(entry.spec.name, entry.tensor) for entry in entries]
            own = hold_adapter(entries, MeshRegister(session.may_differ.of_adapter(named, self.state.model)))
            held = session.staged(f"adapter/{file.adapter_name}", own)
        roster = Agreement(group, session.stage).roster(
            partial(list, held), f"describing the adapter {file.adapter_name}"
        )
        plan: ExportPlan | None = None
        with group.together(f"checking the adapter {file.adapter_name}"):
            _check(roster, settings, declared, captured, file.adapter_name, self.state.model, component)
            if group.is_main and not component:
                _log_vllm_limits(session, file.adapter_name, roster, settings, declared)
            if component:
                check_opens(self.state.model, self._config, file, session.logged)
            options = ExportOptions(
                max_file_bytes=None,
                stem=(LORA_WEIGHTS_NAME if component else ADAPTER_WEIGHTS_NAME).removesuffix(".safetensors"),
                # The manifest lists a tensor once in a component, and adapters have the same names.
                component="adapter" if not file.directory else f"adapter.{file.adapter_name}",
                index=False,
                metadata=header_metadata(settings, component) if component else None,
            )
            plan = plan_export(held, roster, group, self._directory / file.directory, options)
        assert plan is not None
        return lambda g, p=plan: write_export(p, g, session.storage).below(file.directory)  # type: ignore[misc]

    def _merged_steps(self) -> list[Step]:
        """What is left to do for the merged export, where this save writes one. All ranks call."""
        session, is_final = self._session, self._args["is_final_checkpoint"]
        if not (session.config.export_merged and session.exports(is_final)):
            return []
        merged: list[MergedPart] = []
        with session.group.together("describing the merged model"):
            merged += merged_parts(self.state.model)
        save = MergedSave(
            session.further(MERGED),
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
        """What is trained beside the adapter, as a file of its own. All ranks call."""
        session, group = self._session, self._session.group
        held: list[HeldTensor] = []
        with group.together("describing what is trained beside the adapter"):
            own = hold_extra(session, captured, self.state.model)
            held = session.staged("adapter_extra", own)
        roster = Agreement(group, session.stage).roster(
            partial(list, held), "describing what is trained beside the adapter"
        )
        plan: ExportPlan | None = None
        with group.together("planning the file of what is trained beside the adapter"):
            stem = ADAPTER_EXTRA_NAME.removesuffix(".safetensors")
            options = ExportOptions(max_file_bytes=None, stem=stem, component=stem, index=False)
            plan = plan_export(held, roster, group, self._directory, options)
            if group.is_main:
                _log_extra_weights(session, roster)
        assert plan is not None
        return lambda g, p=plan: write_export(p, g, session.storage)  # type: ignore[misc]

    def _after(self, group: Group) -> ComponentRecord:
        args = after_arguments(self._args, self.state, in_background=self._session.config.is_async)
        run_hooks(self._addons, "post_save", args, group)
        return ComponentRecord()


def stepped(optimizer: Optimizers | None) -> frozenset[int]:
    """Identities of the parameters that the optimizers have state of: what has been trained, frozen by now or not."""
    states = [getattr(each, "state", None) for each in several(optimizer)]
    return frozenset(
        id(parameter) for state in states if isinstance(state, Mapping) for parameter in state if state[parameter]
    )


def capture(
    session: Session, parts: Sequence[nn.Module], config: object | None, stepped: Collection[int] = ()
) -> AdapterTensors:
    """The adapters of this rank's parts, in the layout that the settings promise. Local."""
    return capture_adapter(
        list(parts),
        config,
        v4_compatible=session.config.v4_compatible,
        legacy_paramwrapper_layout=session.config.legacy_paramwrapper_layout,
        base=session.base_name(),
        stepped=stepped,
    )


@dataclass(frozen=True, slots=True)
class Declared:
    """Gathered facts about the ranks' parts of an adapted model.

    Attributes:
        inventories: Each rank's layers, where one of them has a part of a model; else nothing.
        extra: Whether any has tensors that are trained beside the adapter.
    """

    inventories: tuple[Mapping[str, Sequence[int]], ...]
    extra: bool


def declare(session: Session, captured: AdapterTensors) -> Declared:
    """Gather the layers of the model on each rank. All ranks call.

    Raises:
        AdapterError: A pipeline stage is missing.
    """
    group = session.group
    layers: dict[str, JsonValue] = {path: list(indices) for path, indices in captured.inventory.items()}
    own: JsonValue = [layers, bool(captured.cut), session.stage, bool(captured.extra)]
    rows = cast(
        "list[tuple[dict[str, list[int]], bool, int, bool]]", group.gather_json(own, "comparing the stages' layers")
    )
    check_stages({stage for _, _, stage, _ in rows})
    # A list with fewer layers than the configuration says is a pruned model; a stage's has keys, or holes.
    inventories = tuple(theirs for theirs, *_ in rows) if any(cut for _, cut, _, _ in rows) else ()
    return Declared(inventories, any(extra for *_, extra in rows))


def _component(session: Session, parts: Sequence[nn.Module], peft_config: object | None) -> str:
    """The model's name in a pipeline of diffusers, where its adapter is saved for these; else nothing."""
    return require_component(parts, peft_config) if session.config.diffusers_compatible else ""


def _check(
    roster: Roster,
    settings: Mapping[str, object],
    declared: Declared,
    captured: AdapterTensors,
    name: str,
    parts: Sequence[nn.Module],
    component: str,
) -> None:
    specs = [as_peft(spec, component) for spec in roster.specs] if component else roster.specs
    check_adapter(specs, settings, declared.inventories, captured.layers, declared=True)
    check_opens_in_peft(parts, name, [spec.name for spec in specs], settings)


def _log_vllm_limits(
    session: Session, name: str, roster: Roster, settings: Mapping[str, object], declared: Declared
) -> None:
    """Log once which features of an adapter vLLM does not serve."""
    limits = vllm_limits([spec.name for spec in roster.specs], settings, has_extra=declared.extra)
    if limits and (key := f"vLLM/{name}") not in session.logged:
        session.logged.add(key)
        _LOG.info("vLLM does not serve the adapter %r as it was trained: %s", name, "; ".join(limits))


def hold_extra(session: Session, captured: AdapterTensors, parts: Sequence[nn.Module]) -> tuple[HeldTensor, ...]:
    """What this rank holds of the tensors that are trained beside the adapter."""
    named = [(entry.spec.name, entry.tensor) for entry in captured.extra]
    return hold_adapter(captured.extra, MeshRegister(session.may_differ.of_adapter(named, parts)))


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


def check_before_training(session: Session, model: nn.Module | Sequence[nn.Module], *, is_adapted: bool) -> None:
    """Describe and check a model's adapters as a save would, and write nothing. All ranks call.

    What a configuration says that is passed to saves alone (of a model's own LoRA) is checked by these.

    Args:
        session: Settings, ranks and storage.
        model: The model, or this rank's pipeline stages.
        is_adapted: Whether it has to have an adapter by now.

    Raises:
        ShardwiseError: What the first save would raise.
    """
    group = session.group
    session.base_name()  # looked for here, since all ranks have to
    parts = ModelState(model).model
    kind = component = ""
    with group.together("looking at the adapter"):
        _refuse_wrappers(parts)
        kind = "peft" if is_peft_adapted(parts) else "own" if any(find_sites(part) for part in parts) else ""
    kinds = group.gather_json(kind, "looking at the adapter")
    if not any(kinds):
        if is_adapted:
            raise AdapterError(
                "the model has no adapter, and is_peft is true",
                hint="Adapt it before it is restored, or set is_peft to false.",
            )
        return
    captured = AdapterTensors((), {})
    with group.together("describing the adapter"):
        component = _component(session, parts, None)
        if kind:
            captured = capture(session, parts, None)
    declared = declare(session, captured)
    if set(kinds) == {"peft"}:
        settings = adapter_settings(parts, None, group, v4_compatible=session.config.v4_compatible)
        for file in captured.files:
            roster = _roster(session, partial(hold_adapter, file.entries, MeshRegister()))
            with group.together(f"checking the adapter {file.adapter_name}"):
                _check(roster, settings[file.adapter_name], declared, captured, file.adapter_name, parts, "")
                if component:
                    check_opens(parts, None, file, session.logged)
    if declared.extra:
        _roster(session, partial(hold_extra, session, captured, parts))
    if session.config.export_merged:
        with group.together("describing the merged model"):
            check_merging(session, parts)


def _roster(session: Session, hold: Callable[[], tuple[HeldTensor, ...]]) -> Roster:
    return Agreement(session.group, session.stage).roster(hold, "describing the adapter's tensors")


@dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """A model's adapters and a checkpoint's that are known to fit, on every rank; nothing has been read or written."""

    loads: tuple[OpenedLoad, ...]
    allocators: AllocatorRestore

    def fill(self) -> None:
        """Fill the adapters. All ranks call, once."""
        for load in self.loads:
            load.read()
        self.allocators.install()


def open_adapter(
    session: Session,
    model: nn.Module | Sequence[nn.Module],
    path: Path,
    peft_config: object | None = None,
    *,
    key_mapping: Mapping[str, str] | None = None,
    allow_missing: bool = False,
) -> OpenedAdapter:
    """Compare a model's adapters with saved ones, on any topology. All ranks call; nothing is changed.

    Args:
        session: Settings, ranks and storage.
        model: The adapted model, or this rank's pipeline stages.
        path: A checkpoint's ``model`` directory, another adapter's directory, or an adapter's file.
        peft_config: The adapter's configuration, for parts that do not carry one; the checkpoint's own if not given.
        key_mapping: Regular expressions and replacements, from the file's names to the model's; first match.
        allow_missing: Adapters, their tensors, and what is trained beside them and is not in the checkpoint keep
            their values.

    Raises:
        AdapterError: The saved adapter means something else in this model (another alpha, rsLoRA, DoRA).
        TensorError: Model and adapter do not fit.
    """
    group = session.group
    session.base_name()  # looked for here, since all ranks have to
    parts = ModelState(model).model
    captured: AdapterTensors | None = None
    saved: dict[str, SavedAdapter] = {}
    directory = path.parent if is_file(path) else path
    with group.together("describing the adapter"):
        has_config = is_file(directory / ADAPTER_CONFIG_NAME)
        config = peft_config or (read_adapter_config(directory) if has_config else None)
        captured = capture(session, parts, config)
        saved |= find_saved(path, captured.files, component_of(parts), key_mapping, allow_missing=allow_missing)
        for file in captured.files:
            if group.is_main and file.adapter_name in saved:
                check_shared(file, saved[file.adapter_name], key_mapping)
    assert captured is not None
    own = adapter_settings(
        parts,
        config,
        group,
        v4_compatible=session.config.v4_compatible,
        legacy_layout=session.config.legacy_paramwrapper_layout,
    )
    with group.together("comparing the adapter's settings"):
        for name, adapter in saved.items():
            if adapter.settings is not None:
                _refuse_other_meaning(name, differing_settings(adapter.settings, own[name]), path)
            elif adapter.names is not None:
                check_scales(parts, name, adapter.weights)
    loads: list[OpenedLoad] = []
    for file in (file for file in captured.files if file.adapter_name in saved):
        held: tuple[HeldTensor, ...] = ()
        with group.together(f"describing the tensors of the adapter {file.adapter_name}"):
            # Entries that share memory are equal in the file, as was checked; one of them is enough.
            held = hold_adapter([entry for entry in file.entries if entry.alias_of is None], MeshRegister())
        source = open_saved(session, saved[file.adapter_name], key_mapping)
        aliases = [entry.spec.name for entry in file.entries if entry.alias_of is not None]
        ignored = listed_anywhere(aliases, source, group)  # of other stages' entries this rank knows nothing
        options = LoadOptions(allow_missing, threads=session.threads, sharing=session.sharing, ignored=ignored)
        loads.append(open_described(partial(tuple, held), source, group, session.storage, options))
    extra, allocators = _open_extra(session, parts, captured, directory, allow_missing)
    return OpenedAdapter((*loads, *extra), allocators)


def _open_extra(
    session: Session, parts: Sequence[nn.Module], captured: AdapterTensors, path: Path, allow_missing: bool
) -> tuple[list[OpenedLoad], AllocatorRestore]:
    """What was trained beside the adapter, whether or not this model trains it. All ranks call; nothing is changed."""
    group, file = session.group, path / ADAPTER_EXTRA_NAME
    is_there = group.broadcast_result(file.is_file, "looking for what was trained beside the adapter")
    trained = [entry for entry in captured.extra if isinstance(entry.tensor, nn.Parameter)]
    source = open_source(file, group) if is_there else None
    allocators = AllocatorRestore({}, ())
    with group.together("looking for what was trained beside the adapter"):
        if source is None and trained and not allow_missing:
            raise _no_extra([entry.spec.name for entry in trained], path)
        specs = {} if source is None else source.tensors
        allocators = restore_allocators(parts, {name: tensor.spec.shape for name, tensor in specs.items()})
    if source is None:
        return [], allocators

    def wanted() -> tuple[HeldTensor, ...]:
        found: dict[str, torch.Tensor] = dict(allocators.tensors)
        seen: set[int] = set()
        for names, tensor in base_tensors(parts):
            for name in names:
                if name in source.tensors:
                    found[name] = tensor
                    seen.add(id(tensor))
        lost = [entry.spec.name for entry in trained if id(entry.tensor) not in seen]
        if lost and not allow_missing:
            raise _no_extra(lost, file)
        return tuple(held_tensor(name, tensor, MeshRegister()) for name, tensor in found.items())

    # A model that is not trained has no allocator.
    ignored = frozenset(name for name in source.tensors if name.startswith(ALLOCATOR_PREFIX))
    options = LoadOptions(threads=session.threads, sharing=session.sharing, ignored=ignored)
    return [open_described(wanted, source, group, session.storage, options)], allocators


def _no_extra(names: Sequence[str], path: Path) -> MissingTensorError:
    return MissingTensorError(
        f"the model trains tensors beside its adapter that the checkpoint has no values of: {listed(names)}",
        path=path,
        tensor=names[0],
        hint="Freeze them (requires_grad_(False)); or, to begin with the values that they have now, load the adapter "
        "with load_model(..., allow_checkpoint_key_subset=True).",
    )


def _refuse_other_meaning(name: str, differing: dict[str, tuple[object, object]], path: Path) -> None:
    if differing:
        listed = ", ".join(f"{key} was {theirs!r} and is {ours!r}" for key, (theirs, ours) in differing.items())
        raise AdapterError(
            f"the saved adapter {name!r} would mean something else in this model: {listed}",
            path=path,
            hint="Build the model with the adapter configuration that stands in the checkpoint.",
        )


def _refuse_wrappers(parts: Sequence[nn.Module]) -> None:
    """Check that adapters can be saved out of what wraps the model. Local.

    Raises:
        MisuseError: It is FSDP1, or an average, whose count no adapter file has a place for.
    """
    refuse_fsdp1(parts)
    if any(is_average(part) for part in parts):
        raise MisuseError(
            "the model is an AveragedModel, and is_peft is true: an adapter's files have no place for the average's "
            "n_averaged, which would be lost",
            hint="Save the adapted model, and pass the average as ema; or set is_peft to false.",
        )
