"""Adapter checkpoints: ``adapter_model.safetensors`` written by all ranks, no base weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.addons import CheckpointAddon, SaveHookArgs
from shardwise.addons.base import SavesPretrained
from shardwise.addons.peft_capture import capture_adapter
from shardwise.addons.peft_check import check_adapter
from shardwise.addons.peft_tensors import AdapterEntry, AdapterTensors
from shardwise.checkpointing.context import Context
from shardwise.comm import Group, JsonValue
from shardwise.engine.export import ExportOptions, plan_export, write_export
from shardwise.engine.jobs import Step
from shardwise.engine.load import LoadOptions, load_tensors
from shardwise.engine.records import ComponentRecord
from shardwise.engine.rosters import RosterKeeper
from shardwise.io.sources import open_source
from shardwise.plan.fragments import HeldTensor, Part, hold
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor


def held_entry(entry: AdapterEntry, meshes: MeshRegister) -> HeldTensor:
    """What this rank holds of one tensor of an adapter file, as views of the parameter's memory."""
    native = held_tensor(entry.fqn, entry.tensor, meshes).parts[0]
    part = Part(native.part.native_shape, native.part.mesh, native.part.placements, entry.view)
    detached = entry.tensor.detach()
    local = cast(nn.Parameter, detached.to_local() if hasattr(detached, "to_local") else detached)
    return hold(entry.spec, part, native.coordinate, local, entry.grid)


class AdapterSave:
    """One save of a model's adapters; the counterpart of `ModelSave`."""

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
        self.state = ModelState(model)
        self._config = peft_config
        self._args: SaveHookArgs = {
            "model_state": self.state,
            "model_path": str(directory),
            "hf_metadata_dir": None,
            "consolidated_path": None,
            "tokenizer": tokenizer,
            "peft_config": peft_config,
            "original_model_path": context.base_path,
            "v4_compatible": context.config.v4_compatible,
            "legacy_paramwrapper_layout": context.config.legacy_paramwrapper_layout,
            "is_final_checkpoint": is_final,
        }

    def steps(self) -> list[Step]:
        """Capture the adapters, check that they are whole, and return what is left to do. All ranks call."""
        from shardwise.addons.peft import adapter_settings

        context, group = self._context, self._context.group
        with group.together("preparing the adapter's directory"):
            if group.is_main:
                context.storage.make_directory(self._directory)
        for addon in self._addons:
            addon.pre_save(**(self._args | {"group": group}))
        settings = adapter_settings(
            self.state.model,
            self._config,
            group,
            v4_compatible=context.config.v4_compatible,
            original_model_path=context.base_path,
        )
        captured: AdapterTensors | None = None
        with group.together("describing the adapter"):
            captured = capture(context, self.state.model, self._config)
        assert captured is not None
        inventories = _inventories(group, captured)
        steps: list[Step] = []
        for file in captured.files:
            meshes = MeshRegister()
            own = [held_entry(entry, meshes) for entry in file.entries]
            held = context.staged(f"adapter/{file.adapter_name}", own)
            roster = RosterKeeper(group, context.stage).roster(held)
            with group.together(f"checking the adapter {file.adapter_name}"):
                check_adapter(roster.specs, settings[file.adapter_name], inventories)
            options = ExportOptions(max_file_bytes=2**62, stem="adapter_model", component="adapter", index=False)
            plan = plan_export(held, roster, group, self._directory / file.directory, options)
            prefix = file.directory
            steps.append(lambda g, p=plan, d=prefix: write_export(p, g, context.storage).below(d))  # type: ignore[misc]
        return [*steps, self._after]

    def _after(self, group: Group) -> ComponentRecord:
        for addon in self._addons:
            addon.post_save(**(self._args | {"group": group}))
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


def load_adapter(context: Context, model: nn.Module | Sequence[nn.Module], path: Path) -> None:
    """Fill a model's adapters in place, on any topology. All ranks call."""
    group = context.group
    captured: AdapterTensors | None = None
    with group.together("describing the adapter"):
        captured = capture(context, ModelState(model).model, None)
    assert captured is not None
    for file in captured.files:
        meshes = MeshRegister()
        # Entries that share memory are equal in every file that can be loaded; one of them is enough.
        held = [held_entry(entry, meshes) for entry in file.entries if entry.alias_of is None]
        aliases = [entry.spec.name for entry in file.entries if entry.alias_of is not None]
        place = path if path.is_file() else path / file.path
        source = open_source(place, group).without(aliases)
        load_tensors(held, source, group, context.storage, LoadOptions(threads=context.threads))
