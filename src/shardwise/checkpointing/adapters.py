"""Adapter checkpoints: ``adapter_model.safetensors`` written by all ranks, no base weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.addons import CheckpointAddon, SaveHookArgs
from shardwise.addons.base import SavesPretrained
from shardwise.addons.peft_capture import capture_adapter, hold_adapter
from shardwise.addons.peft_check import check_adapter
from shardwise.addons.peft_config import read_adapter_config
from shardwise.addons.peft_load import check_shared_factors, differing_settings
from shardwise.addons.peft_settings import adapter_settings
from shardwise.addons.peft_tensors import ADAPTER_CONFIG_NAME, AdapterTensors
from shardwise.checkpointing.context import Context
from shardwise.checkpointing.hooks import after_arguments, run_hooks
from shardwise.comm import Group, JsonValue
from shardwise.engine.export import ExportOptions, ExportPlan, plan_export, write_export
from shardwise.engine.jobs import Step
from shardwise.engine.load import LoadOptions, OpenedLoad, listed_anywhere, open_described
from shardwise.engine.records import ComponentRecord
from shardwise.engine.rosters import RosterKeeper
from shardwise.errors import AdapterError
from shardwise.io.sources import open_source
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister
from shardwise.stateful_wrappers.ways import refuse_fsdp1


class AdapterSave:
    """One save of a model's adapters; the counterpart of `ModelSave`. All ranks make one."""

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
        reserve: Callable[[], None],
    ) -> None:
        self._context = context
        self._reserve = reserve
        self.closing: list[Callable[[Group], None]] = []
        self._directory = directory
        self._addons = addons
        self.state = ModelState(model)
        self._config = peft_config
        self._args: SaveHookArgs = {
            "model_state": self.state,
            "model_path": str(directory),
            "hf_metadata_dir": None,
            "consolidated_path": None,
            "tokenizer": tokenizer,
            "peft_config": peft_config,
            "original_model_path": context.base_name(),
            "v4_compatible": context.config.v4_compatible,
            "legacy_paramwrapper_layout": context.config.legacy_paramwrapper_layout,
            "is_final_checkpoint": is_final,
        }

    def steps(self) -> list[Step]:
        """Capture the adapters, check that they are whole, and return what is left to do. All ranks call."""
        context, group = self._context, self._context.group
        with group.together("preparing the adapter's directory"):
            refuse_fsdp1(self.state.model)
            if group.is_main:
                self._reserve()
                context.storage.make_directory(self._directory)
        run_hooks(self._addons, "pre_save", self._args, group)
        settings = adapter_settings(
            self.state.model,
            self._config,
            group,
            v4_compatible=context.config.v4_compatible,
            original_model_path=context.base_name(),
        )
        captured: AdapterTensors | None = None
        with group.together("describing the adapter"):
            captured = capture(context, self.state.model, self._config)
        assert captured is not None
        inventories = _inventories(group, captured)
        steps: list[Step] = []
        for file in captured.files:
            held: list[HeldTensor] = []
            with group.together(f"describing the tensors of the adapter {file.adapter_name}"):
                named = [(entry.spec.name, entry.tensor) for entry in file.entries]
                meshes = MeshRegister(context.may_differ.of_adapter(named, self.state.model))
                own = hold_adapter(file.entries, meshes)
                held = context.staged(f"adapter/{file.adapter_name}", own)
            roster = RosterKeeper(group, context.stage).roster(held)
            plan: ExportPlan | None = None
            with group.together(f"checking the adapter {file.adapter_name}"):
                check_adapter(roster.specs, settings[file.adapter_name], inventories, captured.layers)
                # The manifest lists a tensor once in a component, and adapters have the same names.
                component = "adapter" if not file.directory else f"adapter.{file.adapter_name}"
                options = ExportOptions(max_file_bytes=2**62, stem="adapter_model", component=component, index=False)
                plan = plan_export(held, roster, group, self._directory / file.directory, options)
            assert plan is not None
            prefix = file.directory
            steps.append(lambda g, p=plan, d=prefix: write_export(p, g, context.storage).below(d))  # type: ignore[misc]
        return [*steps, self._after]

    def _after(self, group: Group) -> ComponentRecord:
        args = after_arguments(self._args, self.state, in_background=self._context.stager is not None)
        run_hooks(self._addons, "post_save", args, group)
        return ComponentRecord()


def capture(context: Context, parts: Sequence[nn.Module], config: object | None) -> AdapterTensors:
    """The adapters of this rank's parts, in the layout that the settings promise. Local."""
    return capture_adapter(
        list(parts),
        config,
        v4_compatible=context.config.v4_compatible,
        legacy_paramwrapper_layout=context.config.legacy_paramwrapper_layout,
    )


def _inventories(group: Group, captured: AdapterTensors) -> list[dict[str, tuple[int, ...]]]:
    own: JsonValue = {path: list(indices) for path, indices in captured.inventory.items()}
    everyone = cast(list[dict[str, list[int]]], group.gather_json(own, "comparing the stages' layers"))
    return [{path: tuple(indices) for path, indices in theirs.items()} for theirs in everyone]


@dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """A model's adapters and a checkpoint's that are known to fit, on every rank; nothing has been read or written."""

    loads: tuple[OpenedLoad, ...]

    def fill(self) -> None:
        """Fill the adapters. All ranks call, once."""
        for load in self.loads:
            load.read()


def open_adapter(
    context: Context, model: nn.Module | Sequence[nn.Module], path: Path, peft_config: object | None = None
) -> OpenedAdapter:
    """Compare a model's adapters with saved ones, on any topology. All ranks call; nothing is changed.

    Args:
        context: Settings, ranks and storage.
        model: The adapted model, or this rank's pipeline stages.
        path: A checkpoint's ``model`` directory, or another adapter's directory.
        peft_config: The adapter's configuration, for parts that do not carry one; the checkpoint's own if not given.

    Raises:
        AdapterError: The saved adapter means something else in this model (another alpha, rsLoRA, DoRA).
        TensorError: Model and adapter do not fit.
    """
    group = context.group
    parts = ModelState(model).model
    captured: AdapterTensors | None = None
    saved: dict[str, dict[str, object]] = {}
    with group.together("describing the adapter"):
        config = peft_config or (read_adapter_config(path) if (path / ADAPTER_CONFIG_NAME).is_file() else None)
        captured = capture(context, parts, config)
        for file in captured.files:
            directory = (path / file.path).parent
            if (directory / ADAPTER_CONFIG_NAME).is_file():
                saved[file.adapter_name] = read_adapter_config(directory)
            if group.is_main:
                check_shared_factors(file, path)
    assert captured is not None
    own = adapter_settings(parts, config, group, v4_compatible=context.config.v4_compatible)
    with group.together("comparing the adapter's settings"):
        for name, settings in saved.items():
            _refuse_other_meaning(name, differing_settings(settings, own[name]), path)
    loads: list[OpenedLoad] = []
    for file in captured.files:
        held: tuple[HeldTensor, ...] = ()
        with group.together(f"describing the tensors of the adapter {file.adapter_name}"):
            # Entries that share memory are equal in the file, as was checked; one of them is enough.
            held = hold_adapter([entry for entry in file.entries if entry.alias_of is None], MeshRegister())
        source = open_source(path / file.path, group)
        aliases = [entry.spec.name for entry in file.entries if entry.alias_of is not None]
        ignored = listed_anywhere(aliases, source, group)  # of other stages' entries this rank knows nothing
        options = LoadOptions(threads=context.threads, sharing=context.sharing, ignored=ignored)
        loads.append(open_described(partial(tuple, held), source, group, context.storage, options))
    return OpenedAdapter(tuple(loads))


def _refuse_other_meaning(name: str, differing: dict[str, tuple[object, object]], path: Path) -> None:
    if differing:
        listed = ", ".join(f"{key} was {theirs!r} and is {ours!r}" for key, (theirs, ours) in differing.items())
        raise AdapterError(
            f"the saved adapter {name!r} would mean something else in this model: {listed}",
            path=path,
            hint="Build the model with the adapter configuration that stands in the checkpoint.",
        )
