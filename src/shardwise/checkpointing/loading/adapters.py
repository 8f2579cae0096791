"""Finds saved adapters, of peft, of diffusers or in a ``.bin`` file, compares them with a model's, and fills these."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from shardwise.checkpointing.adapters import capture
from shardwise.checkpointing.loading.models import renamed, retitled
from shardwise.checkpointing.session import Session
from shardwise.convert.mapping import rename
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.engine.load import LoadSource, OpenedLoad, listed_anywhere, open_load
from shardwise.engine.name_suggestions import listed
from shardwise.errors import AdapterError, AmbiguousFilesError, FormatError, MissingTensorError
from shardwise.peft.capture import ALLOCATOR_PREFIX, AllocatorRestore, base_tensors, hold_adapter, restore_allocators
from shardwise.peft.check import check_shared_factors, differing_settings
from shardwise.peft.config import adapter_settings, read_adapter_config
from shardwise.peft.diffusers_lora import LORA_WEIGHTS_NAME, check_scales, component_of, read_lora
from shardwise.peft.tensors import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_EXTRA_NAME,
    ADAPTER_WEIGHTS_NAME,
    AdapterFile,
    AdapterTensors,
)
from shardwise.plan.fragments import HeldTensor
from shardwise.sources.sources import Source, open_source
from shardwise.sources.torch_files import open_bin
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.model import Model
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor

_LOG = logging.getLogger(__name__)


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
    session: Session, model: Model, path: Path, key_mapping: Mapping[str, str] | None, allow_missing: bool
) -> OpenedAdapter:
    """Compare a model's adapters with saved ones, on any topology. All ranks call; nothing is changed.

    ``path`` is a checkpoint's ``model`` directory, another adapter's directory, or an adapter's file. With
    ``allow_missing``, what is not in the checkpoint keeps its values. A saved adapter that means something else in this
    model (another alpha, rsLoRA, DoRA) is an `AdapterError`.
    """
    group = session.group
    session.base_name()  # looked for here, since all ranks have to
    parts = ModelState(model).model
    directory = path.parent if is_file(path) else path

    def describe() -> tuple[object | None, AdapterTensors, dict[str, SavedAdapter]]:
        config = read_adapter_config(directory) if is_file(directory / ADAPTER_CONFIG_NAME) else None
        captured = capture(session, parts, config)
        saved = find_saved(path, captured.files, component_of(parts), key_mapping, allow_missing)
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
                differing = differing_settings(adapter.settings, own[name])
                if differing:
                    what = [f"{key} was {theirs!r} and is {ours!r}" for key, (theirs, ours) in differing.items()]
                    raise AdapterError(
                        f"the saved adapter {name!r} would mean something else in this model: {', '.join(what)}",
                        path=path,
                        hint="Build the model with the adapter configuration that stands in the checkpoint.",
                    )
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
        options = replace(session.load_options, allow_missing=allow_missing, ignored=ignored)
        loads.append(open_load(partial(list, held), LoadSource(source), group, session.storage, options))
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
    options = replace(session.load_options, ignored=ignored)
    return [open_load(wanted, LoadSource(source), group, session.storage, options)], allocators


def _no_extra(names: Sequence[str], path: Path) -> MissingTensorError:
    return MissingTensorError(
        f"the model trains tensors beside its adapter that the checkpoint has no values of: {listed(names)}",
        path=path,
        tensor=names[0],
        hint="Freeze them (requires_grad_(False)); or, to begin with the values that they have now, load the adapter "
        "with load_model(..., allow_checkpoint_key_subset=True).",
    )


#: Source: ``peft.utils.constants.WEIGHTS_NAME``: what peft wrote before 0.5, and still does without safetensors.
_BIN_NAME = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """One adapter of a checkpoint: its file, and its ``adapter_config.json`` or what diffusers' header says, if any.

    ``names`` are of diffusers' LoRA file: its tensors of this model, and the model's names for them.
    """

    weights: Path
    settings: Mapping[str, object] | None
    names: Mapping[str, str] | None = None


def find_saved(
    path: Path,
    files: Sequence[AdapterFile],
    component: str | None,
    key_mapping: Mapping[str, str] | None,
    allow_missing: bool,
) -> dict[str, SavedAdapter]:
    """The saved adapter for each of a model's; `AdapterError` if the directory has others. Local.

    The only adapter of a model takes the only one that there is, whatever it is called, as peft's own loading does.
    ``path`` may be a file. With ``allow_missing`` adapters that are not there keep their values, if any is there.
    ``component`` is the model's name in pipelines of diffusers, where it is a model of such.
    """
    there = dict(_there(path))
    found: dict[str, SavedAdapter] = {}
    lacking: list[str] = []
    for file in files:
        weights = there.get(file.directory)
        if weights is None and len(files) == len(there) == 1:
            weights = next(iter(there.values()))
        if weights is None and there:
            lacking.append(file.adapter_name)
            continue
        weights = weights or path / file.path
        lora = None
        if component is not None and is_file(weights) and not weights.name.endswith(".bin"):
            lora = read_lora(weights, component, key_mapping or {})
        if lora is not None:
            found[file.adapter_name] = SavedAdapter(weights, lora.settings, lora.names)
        else:
            has_config = is_file(weights.parent / ADAPTER_CONFIG_NAME)
            found[file.adapter_name] = SavedAdapter(
                weights, read_adapter_config(weights.parent) if has_config else None
            )
    names = ", ".join(repr(directory or "default") for directory in there)
    if lacking and not (allow_missing and found):
        raise AdapterError(
            f"the checkpoint has no adapter called {', '.join(map(repr, lacking))}; it has {names}",
            path=path,
            hint="Load it before the model gets that adapter, or pass allow_checkpoint_key_subset=True to load_model: "
            "then the adapter keeps its values.",
        )
    left = set(there.values()) - {saved.weights for saved in found.values()}
    if left:
        _LOG.warning("%s has adapters that the model lacks: %s", path, ", ".join(sorted(str(p.parent) for p in left)))
    return found


def _there(path: Path) -> Iterator[tuple[str, Path]]:
    """Directory below ``path`` (empty for itself) and file of each adapter."""
    if is_file(path):
        yield "", path
        return
    places = [path, *(p for name in names_in(path) if is_directory(p := path / name))] if is_directory(path) else []
    for place in places:
        names = [name for name in (ADAPTER_WEIGHTS_NAME, _BIN_NAME, LORA_WEIGHTS_NAME) if is_file(place / name)]
        if len(names) > 1 and names[-1] == LORA_WEIGHTS_NAME:
            raise AmbiguousFilesError(
                f"the directory holds adapters of peft and of diffusers: {', '.join(names)}",
                path=place,
                hint="Pass the path of the file that is meant.",
            )
        if names:
            yield "" if place == path else place.name, place / names[0]


def check_shared(file: AdapterFile, saved: SavedAdapter, key_mapping: Mapping[str, str] | None) -> None:
    """Raise `AdapterError` if what is one parameter in the model has several values in the file. One rank calls."""
    if not any(item.alias_of is not None for item in file.entries):
        return
    if saved.weights.name == _BIN_NAME:
        raise AdapterError(
            "tensors that are one parameter of this model cannot be compared in a .bin file",
            path=saved.weights,
            hint="Save the adapter as safetensors once, with peft.",
        )
    check_shared_factors(file, saved.weights, lambda name: rename((name,), key_mapping or {})[0])


def open_saved(session: Session, saved: SavedAdapter, key_mapping: Mapping[str, str] | None) -> Source:
    """Open an adapter's file under the model's names; of a ``.bin`` file each tensor is a range. All ranks call."""
    if saved.weights.name.endswith(".bin"):
        opened = open_bin(saved.weights, session.group, session.config.allow_legacy_pickle_restore)
        if opened.loose:
            raise FormatError(
                "no range of bytes of this .bin file holds some of its tensors",
                path=saved.weights,
                tensor=next(iter(opened.loose)),
                hint="Save the adapter as safetensors once, with peft.",
            )
        source = opened.source
    else:
        source = open_source(saved.weights, session.group)
    if saved.names is not None:
        return retitled(source.without(source.tensors.keys() - saved.names.keys()), saved.names)
    return renamed(source, key_mapping) if key_mapping else source
