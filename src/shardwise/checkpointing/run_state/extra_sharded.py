"""Extra state that is spread over the ranks: modules, and DTensors anywhere in plain containers.

Each rank writes its shards, as for a model; nothing is gathered. A module's directory is ``extra/<name>.shards/``, laid
out as ``model/`` is without an export. Other values have their DTensors in that directory, named by the keys that lead
to them, and the rest in ``extra/<name>.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import quote

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpointing.loading.models import OpenedModel, open_model
from shardwise.checkpointing.saving.hooks import ModelRequest
from shardwise.checkpointing.saving.models import ModelSave
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.engine.agreement import Agreement
from shardwise.engine.load import LoadSource, OpenedLoad, open_load
from shardwise.engine.records import ComponentRecord, Step, below
from shardwise.engine.shards import shard_plan, write_shards
from shardwise.plan.fragments import HeldTensor
from shardwise.settings import SaveConsolidatedMode, SerializationFormat
from shardwise.sources.sources import open_source
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors

#: Placeholder in a saved tree for a DTensor.
_HOLE = None
#: How the name of a directory ends that holds a value's shards; no file of a state's ends so.
SHARDS = ".shards"


def split_tree(value: object) -> tuple[object, dict[str, DTensor]]:
    """A tree of containers without its DTensors, and these by the keys that lead to them. Local."""
    found: dict[str, DTensor] = {}
    rest = _split(value, "", found)
    return (rest, found) if found else (value, found)


def _split(value: object, path: str, found: dict[str, DTensor]) -> object:
    if isinstance(value, DTensor):
        found[path] = value
        return _HOLE
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        rest = {key: _split(item, _below(path, key), found) for key, item in value.items()}
        return rest if type(value) is dict else _like(value, rest)
    if type(value) in (list, tuple):
        items = [_split(item, _below(path, number), found) for number, item in enumerate(cast(Sequence[object], value))]
        return items if type(value) is list else tuple(items)
    return value


def _like(value: Mapping[object, object], rest: dict[object, object]) -> object:
    changed = any(rest[key] is not item for key, item in value.items())
    return type(value)(rest) if changed else value  # type: ignore[call-arg]


def _below(path: str, key: object) -> str:
    """The name of the value under a key: text keys unchanged, apart from escapes for separators and numbers."""
    own = key.replace("%", "%25").replace("/", "%2F").replace("#", "%23") if isinstance(key, str) else f"#{key!r}"
    return f"{path}/{own}" if path else own


def fill_tree(rest: object, tensors: Mapping[str, torch.Tensor], path: str = "") -> object:
    """The tree with DTensors in their places again."""
    if path in tensors:
        return tensors[path]
    if isinstance(rest, dict):
        filled = {key: fill_tree(item, tensors, _below(path, key)) for key, item in rest.items()}
        return filled if type(rest) is dict else type(rest)(filled)
    if type(rest) in (list, tuple):
        items = cast(Sequence[object], rest)
        each = [fill_tree(item, tensors, _below(path, number)) for number, item in enumerate(items)]
        return each if type(rest) is list else tuple(each)
    return rest


def directory_of(directory: Path, name: str) -> Path:
    """The directory of a value's shards."""
    return directory / f"{quote(name, safe='')}{SHARDS}"


def module_session(session: Session, name: str) -> Session:
    """The session that saves and loads a module in extra state: as shards, without a base model. Local."""
    config = replace(
        session.config,
        save_consolidated=SaveConsolidatedMode.FALSE,
        model_save_format=SerializationFormat.SAFETENSORS,
        model_repo_id=None,
        original_model_root_dir=None,
        is_peft=False,
        export_merged=False,
        per_rank_state=None,
        v4_compatible=False,
    )
    return session.of_model(f"extra/{name}", config)


def module_steps(session: Session, name: str, module: nn.Module, directory: Path) -> list[Step]:
    """Capture a module now; returns the steps that write it. All ranks call."""
    own = directory_of(directory, name)
    save = ModelSave(ModelRequest(module_session(session, name), module, own))
    steps = save.steps()

    def finish(group: Group) -> ComponentRecord:
        with group.together(f"finishing {own}"):
            for work in save.closing:
                work(group)
        return ComponentRecord()

    return [*below(own.name, steps, f"extra/{name}"), finish]


def tensor_steps(session: Session, name: str, tensors: Mapping[str, DTensor], directory: Path) -> list[Step]:
    """Capture DTensors now; returns the step that writes them. All ranks call, also those without any."""
    own, component = directory_of(directory, name), f"extra/{name}"
    held: list[HeldTensor] = []

    def describe() -> list[HeldTensor]:
        found = held_tensors(tensors.items(), MeshRegister(session.may_differ.of_state([])))
        held.extend(session.staged(component, found))
        return held

    agreement = session.extra_agreements.setdefault(name, Agreement(session.group, session.stage))
    roster = agreement.roster(describe, f"describing the DTensors of {name!r}")
    plan = shard_plan(held, roster, session.group, own, component, "extra")

    def write(group: Group) -> ComponentRecord:
        with group.together(f"making {own}"):
            if group.is_main:
                session.storage.make_directory(own)
        return write_shards(plan, group, session.storage).below(own.name)

    return [write]


@dataclass(frozen=True, slots=True)
class OpenedSharded:
    """Values that are spread over the ranks, opened and not read; ``then`` loads objects' states when they are."""

    modules: Sequence[OpenedModel]
    tensors: Sequence[OpenedLoad]
    then: Callable[[], None]

    def fill(self, group: Group) -> None:
        """Read everything. All ranks call."""
        for module in self.modules:
            module.fill()
        for load in self.tensors:
            load.read()
        if self.tensors:
            with group.together("loading extra state"):
                self.then()


def open_module(session: Session, name: str, module: nn.Module, directory: Path) -> OpenedModel:
    """Compare a module with what was saved. All ranks call; nothing is changed."""
    own = module_session(session, name)
    return open_model(own, module, directory_of(directory, name), key_mapping=None, options=own.load_options)


def open_tensors(session: Session, name: str, tensors: Mapping[str, DTensor], directory: Path) -> OpenedLoad:
    """Compare DTensors with what was saved. All ranks call, also those without any; nothing is changed."""
    source = open_source(directory_of(directory, name), session.group, spread=True)
    describe = partial(held_tensors, tensors.items(), MeshRegister())
    return open_load(describe, LoadSource(source), session.group, session.storage, session.load_options)


#: A module on one rank: whether it has DTensors; a digest of its state; the names in it.
_Row: TypeAlias = tuple[bool, str, list[str]]


def shared_modules(values: Mapping[str, object], group: Group) -> list[str]:
    """Names of the modules with one state, spread over the ranks or the same on all of them. All ranks call.

    Other modules have a separate state on each rank, such as metrics that a rank counts for itself.
    """

    def describe() -> JsonValue:
        rows = {name: _row(value) for name, value in values.items() if isinstance(value, nn.Module)}
        return cast(JsonValue, {name: row for name, row in rows.items() if row is not None})

    everyone = cast(list[dict[str, _Row]], group.gather(describe, "looking at modules in extra state"))
    names = sorted({name for theirs in everyone for name in theirs})
    return [name for name in names if _is_one([theirs.get(name) for theirs in everyone])]


def _is_one(rows: Sequence[_Row | None]) -> bool:
    there = [row for row in rows if row is not None]
    if len(there) < len(rows):
        return False
    if any(has_shards for has_shards, _, _ in there) or len({digest for _, digest, _ in there}) == 1:
        return True
    # Stages of a pipeline, each with other tensors.
    names = [name for _, _, own in there for name in own]
    return len(names) == len(set(names))


def _row(module: nn.Module) -> _Row | None:
    """A module's row; ``None`` where its state has other values than tensors."""
    state = module.state_dict()
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None
    if any(isinstance(value, DTensor) for value in state.values()):
        return True, "", []
    hasher = hashlib.blake2b(digest_size=16)
    for name, value in state.items():
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        if value.device.type == "meta" or value.layout is not torch.strided or value.is_quantized:
            return True, "", []  # saving the module describes it, or refuses it
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            hasher.update(memoryview(flat.view(torch.uint8).numpy()))
    return False, hasher.hexdigest(), list(state)
