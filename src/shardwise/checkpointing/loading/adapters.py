"""Compares a model's adapters with saved ones, of peft, of diffusers or in a ``.bin`` file, and fills them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from shardwise.checkpointing.adapters import capture
from shardwise.checkpointing.loading.adapter_files import SavedAdapter, check_shared, find_saved, open_saved
from shardwise.checkpointing.session import Session
from shardwise.disk.names import is_file
from shardwise.engine.load import LoadOptions, OpenedLoad, listed_anywhere, open_described
from shardwise.engine.name_suggestions import listed
from shardwise.errors import AdapterError, MissingTensorError
from shardwise.peft.capture import hold_adapter
from shardwise.peft.config import adapter_settings, read_adapter_config
from shardwise.peft.diffusers_lora import check_scales, component_of
from shardwise.peft.extra import ALLOCATOR_PREFIX, AllocatorRestore, base_tensors, restore_allocators
from shardwise.peft.load import differing_settings
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME, ADAPTER_EXTRA_NAME, AdapterTensors
from shardwise.plan.fragments import HeldTensor
from shardwise.sources.sources import open_source
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor


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
    *,
    key_mapping: Mapping[str, str] | None = None,
    allow_missing: bool = False,
) -> OpenedAdapter:
    """Compare a model's adapters with saved ones, on any topology. All ranks call; nothing is changed.

    ``path`` is a checkpoint's ``model`` directory, another adapter's directory, or an adapter's file. With
    ``allow_missing``, what is not in the checkpoint keeps its values.

    Raises:
        AdapterError: The saved adapter means something else in this model (another alpha, rsLoRA, DoRA).
        TensorError: Model and adapter do not fit.
    """
    group = session.group
    session.base_name()  # looked for here, since all ranks have to
    parts = ModelState(model).model
    directory = path.parent if is_file(path) else path

    def describe() -> tuple[object | None, AdapterTensors, dict[str, SavedAdapter]]:
        config = read_adapter_config(directory) if is_file(directory / ADAPTER_CONFIG_NAME) else None
        captured = capture(session, parts, config)
        saved = find_saved(path, captured.files, component_of(parts), key_mapping, allow_missing=allow_missing)
        for file in captured.files:
            if group.is_main and file.adapter_name in saved:
                check_shared(file, saved[file.adapter_name], key_mapping)
        return config, captured, saved

    config, captured, saved = group.attempt(describe, "describing the adapter")
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
        # Entries that share memory are equal in the file, as was checked; one of them is enough.
        distinct = [entry for entry in file.entries if entry.alias_of is None]
        held = group.attempt(
            partial(hold_adapter, distinct, MeshRegister()),
            f"describing the tensors of the adapter {file.adapter_name}",
        )
        source = open_saved(session, saved[file.adapter_name], key_mapping)
        aliases = [entry.spec.name for entry in file.entries if entry.alias_of is not None]
        ignored = listed_anywhere(aliases, source, group)  # of other stages' entries this rank knows nothing
        options = LoadOptions(allow_missing, threads=session.threads, sharing=session.sharing, ignored=ignored)
        loads.append(open_described(partial(list, held), source, group, session.storage, options))
    extra, allocators = _open_extra(session, parts, captured, directory, allow_missing)
    return OpenedAdapter((*loads, *extra), allocators)


def _open_extra(
    session: Session, parts: Sequence[nn.Module], captured: AdapterTensors, path: Path, allow_missing: bool
) -> tuple[list[OpenedLoad], AllocatorRestore]:
    """Compare the tensors that were trained beside the adapter; this model may not train them. All ranks call."""
    group, file = session.group, path / ADAPTER_EXTRA_NAME
    is_there = group.broadcast_result(partial(is_file, file), "looking for what was trained beside the adapter")
    trained = [entry for entry in captured.extra if isinstance(entry.tensor, nn.Parameter)]
    source = open_source(file, group) if is_there else None

    def find_allocators() -> AllocatorRestore:
        if source is None and trained and not allow_missing:
            raise _no_extra([entry.spec.name for entry in trained], path)
        specs = {} if source is None else source.tensors
        return restore_allocators(parts, {name: tensor.spec.shape for name, tensor in specs.items()})

    allocators = group.attempt(find_allocators, "looking for what was trained beside the adapter")
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
