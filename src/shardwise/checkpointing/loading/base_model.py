"""Materialises models and loads base weights into them.

Decisions made here, and why:

* The model keeps its own dtypes and values are cast to them, since loading happens in place and the optimizer and the
  sharding are made for what the model is. `shardwise.base_dtype` tells the base's dtype, for
  building the model in it.
* A tensor of the model that the base lacks is an error, listed with the nearest names. A task head that is to keep its
  fresh values is named in ``skip_task_head_prefixes_for_base_model``.
* Tensors that are about to be loaded get memory and no random values first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.base import initialise
from shardwise.base.files import base_config, find_base, open_base_source, ties_head
from shardwise.base.names import BaseWanted, match_base
from shardwise.base.source import BaseSource
from shardwise.checkpointing.hub import require_memory
from shardwise.checkpointing.loading.models import expected_unused
from shardwise.checkpointing.loading.restoring import overwriting
from shardwise.checkpointing.module_state import ModuleLoad, claimed, find_module_state, in_shapes_of, open_module_load
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.engine.computed import declared, open_computed
from shardwise.engine.load import LoadOptions, LoadReport, compare_load, open_load
from shardwise.engine.name_suggestions import listed
from shardwise.errors import MisuseError
from shardwise.peft import initial_values
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.models import is_peft_adapted
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.names import declared_ties

_LOG = logging.getLogger(__name__)


def initialize_model_weights(model: nn.Module, device: torch.device, peft_init_method: str | None) -> None:
    """Give meta-device parameters and buffers memory on ``device``, and fresh values by the model's own code.

    FSDP2's and tensor parallelism's DTensors get their shards; no rank ever holds a whole model. Ties are kept. Buffers
    that are in no file are recomputed by the module's own code. Random values follow from ``torch.initial_seed()`` of
    the first rank of the parameters' mesh: in-place draws on parameters are the same on every topology and device,
    whatever the other ranks' seeds; draws into other tensors are the same for the same seed and module order. The
    generators are left as they were.

    All ranks that hold parts of this model call, since they agree on the seed. A tensor that no code gives values is a
    `MisuseError`.
    """
    seed = torch.initial_seed()
    meshes = dict.fromkeys(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    for mesh in meshes:
        for dim in range(mesh.ndim):
            meeting = Group(mesh.get_group(dim))
            seed = meeting.broadcast_result(partial(int, seed), "agreeing on a seed")
    if is_peft_adapted([model]):
        initial_values.check_can_begin([model])
    slots = initialise.slots_of(model)
    initialise.initialise(model, device, seed, _of_adapters(model, slots), slots)
    _fresh_adapters([model], peft_init_method, seed)
    initialise.check_attributes(model)


def _fresh_adapters(parts: Sequence[nn.Module], method: str | None, seed: int) -> None:
    """Begin the adapters of models with memory: peft's as peft does, and a model's own LoRA factors."""
    if is_peft_adapted(parts):
        if method is not None:
            initial_values.check_method(parts, method)
        initial_values.initialise_peft(parts, seed=seed)
        if method is not None:
            initial_values.initialise_adapters(parts, None, method, seed=seed)
    elif any(find_sites(part) for part in parts):
        initial_values.initialise_adapters(parts, None, method, seed=seed)
    elif method is not None:
        _LOG.debug("peft_init_method is %s and the model has no adapter", method)


def _of_adapters(part: nn.Module, slots: Sequence[initialise.Slot]) -> frozenset[str]:
    """Names of tensors that peft begins by itself when the base weights are there."""
    return initialise.names_of(slots, initial_values.adapter_tensors(part)) if is_peft_adapted([part]) else frozenset()


def load_base_model(
    session: Session,
    model: nn.Module | Sequence[nn.Module],
    device: torch.device,
    root_dir: str | Path | None,
    model_name: str | None,
    load: bool,
) -> None:
    """Materialise a model, and fill it from its base where ``load`` is true. All ranks call.

    Parts on the meta device get memory on ``device``; what the base does not fill gets fresh values. Parts that have
    memory are moved to ``device`` and keep what the base does not fill, but for buffers that are in no file: these are
    recomputed by the module's own code, since ``to_empty`` leaves them undefined. Names, shapes and dtypes are compared
    before any memory is allocated.
    """
    parts = [model] if isinstance(model, nn.Module) else list(model)
    with session.group.together("looking at the adapters"):
        fresh = [part for part in parts if initialise.has_meta(initialise.slots_of(part))]
        for part in parts:
            if is_peft_adapted([part]):
                (initial_values.check_can_begin if part in fresh else initial_values.refuse_changed_base)([part])

    def find() -> str:
        if not model_name:
            raise MisuseError("no base model is named", hint="Pass model_name, a hub id, a directory or a file.")
        return str(find_base(root_dir, model_name, session.config.model_cache_dir))

    group = session.group
    if load:
        path = Path(group.broadcast_result(find, f"looking for the base model {model_name}"))
        fill_from_base(session, parts, path, before=lambda wanted: _materialise(group, parts, device, wanted))
    else:
        _materialise(group, parts, device, None)
    seed = group.broadcast_result(torch.initial_seed, "agreeing on a seed")
    with group.together("beginning the adapters"):  # apart, since DTensors communicate: no rank may have failed before
        for part in fresh:
            if is_peft_adapted([part]):
                initial_values.initialise_peft([part], seed=seed)
        for part in parts:
            initialise.check_attributes(part)


def _materialise(group: Group, parts: Sequence[nn.Module], device: torch.device, wanted: BaseWanted | None) -> None:
    seed = group.broadcast_result(torch.initial_seed, "agreeing on a seed")
    with group.together("materialising the model"):
        for part in parts:
            slots = initialise.slots_of(part)
            if not initialise.has_meta(slots):
                part.to(device)
                initialise.recompute_buffers(part)
                continue
            loaded = initialise.names_of(slots, wanted.filled) if wanted is not None else frozenset()
            initialise.initialise(part, device, seed, loaded | _of_adapters(part, slots), slots)
            if not is_peft_adapted([part]):
                _fresh_adapters([part], None, seed)


def fill_from_base(
    session: Session,
    parts: Sequence[nn.Module],
    path: Path,
    *,
    key_mapping: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    before: Callable[[BaseWanted], None] | None = None,
) -> None:
    """Fill a model from a base (a directory or file) in place. All ranks of the session's group call.

    ``before`` is called when all is known to fit, before anything is read; only then may ``parts`` be on the meta
    device. With ``allow_missing``, tensors that the base lacks keep their values.
    """
    group, config = session.group, session.config
    if before is None:
        with group.together("looking at the adapters"):
            for part in parts:
                if is_peft_adapted([part]):
                    initial_values.refuse_changed_base([part])
    # The base's config decides which tensors exist; beside it are the files of module state.
    told, stems = group.broadcast_result(
        lambda: (cast(dict[str, JsonValue], base_config(path)), find_module_state(path)),
        "reading the base model's config",
    )
    source = open_base_source(
        path,
        group,
        told,
        dequantize=config.dequantize_base_checkpoint,
        allow_legacy_pickle=config.allow_legacy_pickle_restore,
    )
    options = replace(session.load_options, allow_missing=allow_missing, allow_unexpected=True, allow_cast=True)
    wanted = _matched(session, parts, source, told, key_mapping)
    if before is not None:
        compare_load(lambda: _described(wanted), source, group, session.storage, options)
        before(wanted)
        wanted = _matched(session, parts, source, told, key_mapping, wanted)

    def describe() -> list[HeldTensor]:
        require_memory(((None, tensor) for tensor in wanted.tensors), "memory to load into")
        return _described(wanted)

    load = open_load(describe, source, group, session.storage, options, lambda: bool(wanted.steps))
    computed = open_computed(wanted.groups, source, group, options)
    module_load: ModuleLoad | None = None
    if load.asked or stems:
        lenient = LoadOptions(allow_missing, allow_unexpected=True)
        module_load = open_module_load(wanted.steps, stems, group, lenient, is_strict=False, skips_empty=True)
    with overwriting("the model"):
        report = load.read()
        computed.read(session.storage)
        if module_load is not None:
            with load.reading() as values:
                module_load.run(values, str(path), group)
        with group.together("copying what is held twice"), torch.no_grad():
            for first, second in wanted.copies:
                second.copy_(first)
        with group.together("setting magnitudes"):  # apart, since DTensors communicate: no rank may have failed before
            own = [part for part in parts if find_sites(part)]
            if before is not None and own:
                initial_values.initialise_magnitudes(own)
    with group.together("telling what was loaded"):
        if group.is_main:
            _tell(report, parts, _described(wanted), source)


def _described(wanted: BaseWanted) -> list[HeldTensor]:
    """What a base fills, whether or not it has to be computed."""
    return [*wanted.held, *declared(wanted.groups)]


def _matched(
    session: Session,
    parts: Sequence[nn.Module],
    source: BaseSource,
    config: Mapping[str, object],
    key_mapping: Mapping[str, str] | None,
    before: BaseWanted | None = None,
) -> BaseWanted:
    match = partial(
        match_base,
        parts,
        list(source.names()),
        base_ties=ties_head(config),
        skip_prefixes=session.config.skip_task_head_prefixes_for_base_model or [],
        key_mapping=key_mapping,
        before=before,
    )
    found = session.group.attempt(match, "matching the model with its base")
    specs = {name: spec for name in source.names() if (spec := source.stored(name)) is not None}
    own = {tensor.spec.name for tensor in found.held} | {s.name for g in found.groups for s in g.computed.hub}
    theirs = [spec for name, spec in specs.items() if name not in source.behind]
    return replace(found, held=[*in_shapes_of(found.held, specs), *claimed(found.steps, own, theirs)])


def _tell(report: LoadReport, parts: Sequence[nn.Module], wanted: Sequence[HeldTensor], source: BaseSource) -> None:
    specs = [tensor.spec for tensor in wanted]
    dequantized = [spec for spec in specs if source.dequantizes(spec)]
    cast = [spec for spec in specs if (stored := source.stored(spec.name)) and stored.dtype != spec.dtype]
    _LOG.debug(
        "loaded %s: on rank 0 %d tensors dequantized, %d cast",
        source.path,
        len(dequantized),
        len({spec.name for spec in cast} - {spec.name for spec in dequantized}),
    )
    if report.missing:
        near = listed(report.missing, report.unexpected, "it has")
        _LOG.warning("the base model lacks %s, which keep their values", near)
    known = set(expected_unused(parts, report.unexpected))
    ties = tuple(declared_ties(parts))
    strange = [name for name in report.unexpected if name not in known and not name.endswith(ties)]
    if strange:
        _LOG.warning(
            "the base model has tensors that the model lacks: %s",
            listed(strange, [spec.name for spec in specs], "the model has"),
        )
