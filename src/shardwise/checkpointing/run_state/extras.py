"""State beside model and optimizer: random number generators, dataloaders, values that the loop keeps.

A state that is the same on every rank is stored once and restored anywhere. One that differs is stored for each rank
and restored only on the same number of ranks; on another number it is left alone, and the caller gets its name.

Modules, and DTensors anywhere in plain containers, are spread over the ranks: each rank writes its shards, as for a
model; nothing is gathered. A module's directory is ``extra/<name>.shards/``, laid out as ``model/`` is without an
export. Other values have their DTensors in that directory, named by the keys that lead to them, and the rest in
``extra/<name>.json``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import quote, unquote

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpointing.arguments import check_stateful
from shardwise.checkpointing.lifetime import Lifetime, check_same_call
from shardwise.checkpointing.loading.foreign_optimizers import filled, read_states
from shardwise.checkpointing.loading.models import OpenedModel, open_model
from shardwise.checkpointing.loading.restoring import Stateful, Undos
from shardwise.checkpointing.run_state import data_order
from shardwise.checkpointing.run_state.generators import RandomState, as_stateful
from shardwise.checkpointing.saving.hooks import ModelRequest
from shardwise.checkpointing.saving.models import ModelSave
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.engine.load import LoadSource, OpenedLoad, open_load
from shardwise.engine.records import ComponentRecord, Step, below, local_step, write_state
from shardwise.engine.shards import shard_plan, write_shards
from shardwise.errors import CheckpointNotFoundError, MisuseError, ShardwiseError, StateFormatError
from shardwise.format.torch_archive import read_torch_value
from shardwise.plan.fragments import HeldTensor
from shardwise.settings import SaveConsolidatedMode, SerializationFormat
from shardwise.sources.sources import open_source
from shardwise.sources.state_files import has_state, joined, pack_state, read_file, read_state
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors

#: Name of the saved positions in data, beside the generators.
BATCHES = "batches"
#: How the name of a directory ends that holds a value's shards; no file of a state's ends so.
SHARDS = ".shards"


def split_tree(value: object, found: dict[str, DTensor], path: str = "") -> object:
    """A tree of containers without its DTensors, which are put into ``found`` by the keys that lead to them. Local."""
    if isinstance(value, DTensor):
        found[path] = value
        return None
    return _changed(value, lambda key, item: split_tree(item, found, _below(path, key)))


def fill_tree(rest: object, tensors: Mapping[str, torch.Tensor], path: str = "") -> object:
    """The tree with DTensors in their places again."""
    if path in tensors:
        return tensors[path]
    return _changed(rest, lambda key, item: fill_tree(item, tensors, _below(path, key)))


def _changed(value: object, change: Callable[[object, object], object]) -> object:
    """A container that can be saved with its items changed, given their keys or numbers; any other value as it is."""
    if type(value) in (dict, OrderedDict, Counter):
        mapping = cast("dict[object, object]", value)
        return type(mapping)({key: change(key, item) for key, item in mapping.items()})
    if type(value) in (list, tuple):
        items = cast("list[object]", value)
        return type(items)(change(number, item) for number, item in enumerate(items))
    return value


def _below(path: str, key: object) -> str:
    """The name of the value under a key: text keys unchanged, apart from escapes for separators and numbers."""
    own = key.replace("%", "%25").replace("/", "%2F").replace("#", "%23") if isinstance(key, str) else f"#{key!r}"
    return f"{path}/{own}" if path else own


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
            for work in save.take_closing():
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

    roster = session.agreement(component).roster(describe, f"describing the DTensors of {name!r}")
    plan = shard_plan(held, roster, session.group, own, component, "extra")

    def write(group: Group) -> ComponentRecord:
        with group.together(f"making {own}"):
            if group.is_main:
                session.storage.make_directory(own)
        return write_shards(plan, group, session.storage).below(own.name)

    return [write]


#: A module on one rank: whether it has DTensors; a digest of its state; the names in it.
_Row: TypeAlias = tuple[bool, str, list[str]]


def shared_modules(values: Mapping[str, object], group: Group) -> list[str]:
    """Names of the modules with one state, spread over the ranks or the same on all of them. All ranks call.

    Other modules have a separate state on each rank, such as metrics that a rank counts for itself.
    """

    def describe() -> dict[str, _Row]:
        rows = {name: _row(value) for name, value in values.items() if isinstance(value, nn.Module)}
        return {name: row for name, row in rows.items() if row is not None}

    everyone = group.gather(describe, "looking at modules in extra state")
    names = sorted({name for theirs in everyone for name in theirs})
    found = []
    for name in names:
        rows = [theirs[name] for theirs in everyone if name in theirs]
        is_one = any(has_shards for has_shards, _, _ in rows) or len({digest for _, digest, _ in rows}) == 1
        # Or the stages of a pipeline, each with other tensors.
        tensors = [tensor for _, _, own in rows for tensor in own]
        if len(rows) == len(everyone) and (is_one or len(tensors) == len(set(tensors))):
            found.append(name)
    return found


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


def capture_steps(session: Session, values: Mapping[str, object], directory: Path) -> list[Step]:
    """Capture named values now, and return the steps that write them. All ranks call; names may differ between them."""
    group = session.group
    packed, spread, modules = _captured(values, group)
    digests = {name: hashlib.blake2b(joined(found), digest_size=16).hexdigest() for name, found in packed.items()}
    own = {name: (digest, name in spread) for name, digest in digests.items()}
    everyone = group.gather_json(own, "comparing extra state")
    shared = {n for n, digest in digests.items() if all(theirs.get(n, ("",))[0] == digest for theirs in everyone)}

    def write() -> ComponentRecord:
        record = ComponentRecord()
        if packed:
            session.storage.make_directory(directory)
        for name, found in packed.items():
            if name not in shared:
                stem = rank_stem(directory, name, group.rank, group.world_size)
                record += write_state(session.storage, stem, found)
            elif group.is_main:
                record += write_state(session.storage, directory / quote(name, safe=""), found)
        if packed:
            session.storage.sync_directory(directory)
        return record

    steps = [local_step(f"writing {directory}", write)] if any(everyone) else []
    for name in sorted({name for theirs in everyone for name, (_, is_spread) in theirs.items() if is_spread}):
        steps += tensor_steps(session, name, spread.get(name, {}), directory)
    for name in modules:
        steps += module_steps(session, name, cast(nn.Module, values[name]), directory)
    return steps


def _captured(
    values: Mapping[str, object], group: Group
) -> tuple[dict[str, dict[str, bytes]], dict[str, dict[str, DTensor]], list[str]]:
    """Each name's encoded state, its DTensors, and the names of modules that all save together. All ranks call."""
    packed: dict[str, dict[str, bytes]] = {}
    spread: dict[str, dict[str, DTensor]] = {}

    def take(name: str, value: object) -> None:
        found: dict[str, DTensor] = {}
        rest = split_tree(state_of(as_stateful(value)), found)
        if found:
            spread[name] = found
        try:
            packed[name] = pack_state(rest)
        except StateFormatError as error:
            error.hint = f"It is part of {name!r}. {error.hint or ''}".strip()
            raise

    with group.together("capturing extra state") as has_modules:
        for name, value in values.items():
            if not isinstance(name, str) or name in ("", "."):
                raise MisuseError(f"extra_state has the name {name!r}", hint="Use a word as the name of each state.")
            if isinstance(value, nn.Module):
                has_modules.flag = True
            else:
                take(name, value)
    if not has_modules.any:
        return packed, spread, []
    modules = shared_modules(values, group)
    with group.together("capturing modules in extra state"):
        for name, value in values.items():
            if isinstance(value, nn.Module) and name not in modules:
                take(name, value)
    return packed, spread, modules


def rank_stem(directory: Path, name: str, rank: int, world_size: int) -> Path:
    """The stem of one rank's state; with the number of ranks, since the state is meaningless on another number."""
    return directory / f"{quote(name, safe='')}_rank_{rank:05d}_of_{world_size:05d}"


@dataclass(frozen=True, slots=True)
class FoundValues:
    """States of named values, read and parsed, not yet loaded.

    Attributes:
        values: The values by name; those without methods are replaced in this mapping.
        skipped: Names of states that were saved for each of another number of ranks, and stay unchanged.
        spread: Names of modules that were saved by all ranks together, and are restored by them.
        tensors: Name -> its DTensors, read after the other states have been loaded.
    """

    values: MutableMapping[str, object]
    states: Mapping[str, object]
    skipped: tuple[str, ...]
    spread: tuple[str, ...] = ()
    tensors: Mapping[str, Mapping[str, DTensor]] = field(default_factory=dict)

    def take_in(self, undos: Undos) -> None:
        """Put the states in place; an object may refuse its own (`MisuseError`). Local.

        A `Stateful` object loads its state, a mutable mapping is refilled, anything else is replaced.
        """
        for name, state in self.states.items():
            value = as_stateful(self.values[name])
            if name in self.tensors:
                if isinstance(value, Stateful):
                    continue  # when its tensors have been read
                state = fill_tree(state, self.tensors[name])
            if isinstance(value, Stateful):
                try:
                    undos.load(f"extra state {name!r}", value, cast(dict[str, object], state))
                except ShardwiseError:
                    raise
                except Exception as error:
                    raise MisuseError(
                        f"the saved extra state {name!r} does not fit: its {type(value).__name__} refuses it with "
                        f"{type(error).__name__}: {error}",
                        hint="Leave it out of extra_state, or pass what the checkpoint was saved with.",
                    ) from error
            elif isinstance(value, MutableMapping) and isinstance(state, Mapping):
                undos.add(f"extra state {name!r}", partial(_refill, value, dict(value)))
                _refill(value, state)
            else:
                undos.add(f"extra state {name!r}", partial(self.values.__setitem__, name, value))
                self.values[name] = state


def _refill(target: MutableMapping[object, object], values: Mapping[object, object]) -> None:
    target.clear()
    target.update(values)


def find_values(values: MutableMapping[str, object], directory: Path, rank: int, world_size: int) -> FoundValues:
    """Read the states of named values. Local, and changes nothing; a rank may have names that others lack."""
    states: dict[str, object] = {}
    skipped: list[str] = []
    spread: list[str] = []
    tensors: dict[str, dict[str, DTensor]] = {}
    for name, value in values.items():
        stem = directory / quote(name, safe="")
        own = rank_stem(directory, name, rank, world_size)
        found = stem if has_state(stem) else own if has_state(own) else None
        if found is not None:
            states[name] = read_state(found)
            if is_directory(directory_of(directory, name)):
                split_tree(state_of(value), tensors.setdefault(name, {}))
            continue
        if is_directory(directory_of(directory, name)) and not _of_ranks(directory, name):
            if not isinstance(value, nn.Module):
                raise MisuseError(
                    f"extra state {name!r} was saved of a module, and a {type(value).__name__} is to be restored",
                    path=directory_of(directory, name),
                    hint="Pass the module.",
                )
            spread.append(name)
            continue
        worlds = _of_ranks(directory, name)
        if not worlds or world_size in worlds:
            raise CheckpointNotFoundError(
                f"the checkpoint has no extra state {name!r}" + (f" of rank {rank}" if worlds else ""),
                path=directory,
                hint="Leave it out of extra_state, or choose a checkpoint that has it.",
            )
        skipped.append(name)
    return FoundValues(values, states, tuple(skipped), tuple(spread), tensors)


def _of_ranks(directory: Path, name: str) -> set[int]:
    """By how many ranks a state was saved for each of them."""
    return {int(match[3]) for match in _rank_files(directory) if unquote(match[1]) == name}


def state_of(value: object) -> object:
    """The state that a named value has now."""
    return value.state_dict() if isinstance(value, Stateful) else value


_RANK_FILE = re.compile(r"(.+)_rank_(\d{5,})_of_(\d{5,})\.json")


def _rank_files(directory: Path) -> list[re.Match[str]]:
    names = names_in(directory) if is_directory(directory) else []
    return [match for match in map(_RANK_FILE.fullmatch, names) if match is not None]


def saved_names(directory: Path) -> list[str]:
    """Names of the states in a directory, of whatever rank."""
    files = names_in(directory) if is_directory(directory) else []
    of_ranks = {match[0]: match[1] for match in _rank_files(directory)}
    stems = [of_ranks.get(file, file.removesuffix(".json")) for file in files if file.endswith(".json")]
    stems += [file.removesuffix(SHARDS) for file in files if file.endswith(SHARDS)]
    return list(dict.fromkeys(map(unquote, stems)))


def _open_spread(
    session: Session, found: FoundValues, directory: Path
) -> tuple[Sequence[OpenedModel], Sequence[OpenedLoad]]:
    """Open and compare modules and DTensors that are spread over the ranks. All ranks call; nothing is changed."""
    group = session.group
    everyone = group.gather_json((found.spread, list(found.tensors)), "comparing extra state")
    modules = sorted({name for names, _ in everyone for name in names})
    tensors = sorted({name for _, names in everyone for name in names})
    for name in modules:
        lacking = [rank for rank, (names, _) in enumerate(everyone) if name not in names]
        if lacking:
            raise MisuseError(
                f"extra state {name!r} is a module that all ranks restore together, and rank {lacking[0]} passed none",
                path=directory_of(directory, name),
                hint="Pass the module on every rank.",
            )
    opened: list[OpenedModel] = []
    for name in modules:
        own, module = module_session(session, name), cast(nn.Module, found.values[name])
        place = directory_of(directory, name)
        opened.append(open_model(own, module, place, key_mapping=None, options=own.load_options))
    loads: list[OpenedLoad] = []
    for name in tensors:  # also on ranks without any
        source = open_source(directory_of(directory, name), group, spread=True)
        describe = partial(held_tensors, found.tensors.get(name, {}).items(), MeshRegister())
        loads.append(open_load(describe, LoadSource(source), group, session.storage, session.load_options))
    return opened, loads


def _check_generators(state: object) -> None:
    """Raise `StateFormatError` unless the generators can load ``state``; they stay unchanged. Local."""
    generators = RandomState()
    had = generators.state_dict()
    try:
        generators.load_state_dict(cast(dict[str, object], state))
    except Exception as error:
        raise StateFormatError(
            f"the saved state of the random number generators cannot be used ({type(error).__name__}: {error})",
            hint="Choose another checkpoint, or set save_rng to false to go on with fresh generators.",
        ) from error
    finally:
        generators.load_state_dict(had)


def _stem(path: Path, state_name: str, rank: str) -> Path:
    if not state_name or "/" in state_name or state_name.startswith("."):
        raise MisuseError(f"{state_name!r} cannot be the name of a state", hint="Use a plain word.")
    return path / state_name / f"{state_name}_{rank}"


def _begin_of_ranks(life: Lifetime, call: str, state: Stateful, by_dp: bool) -> tuple[Session, str, bool]:
    """Begin a call about one state per rank; returns what this rank is called, and whether it writes. All ranks call.

    With ``by_dp`` ranks are data-parallel ones, whose TP 0, PP 0 peers write.
    """
    session = life.begin(call)
    group = session.group
    check_same_call(call, lambda: check_stateful(state), {}, group)
    if not by_dp:
        return session, f"rank_{group.global_rank}", True
    coordinates = life.ranks.all_coordinates(group)
    own = coordinates[group.rank]
    # Ranks that share a sequence (context parallelism) have the same coordinates: one of them writes.
    return session, f"dp_rank_{own.dp}", (own.tp, own.pp) == (0, 0) and coordinates.index(own) == group.rank


def save_rank_state(life: Lifetime, state: Stateful, state_name: str, path: str | Path, *, by_dp: bool) -> None:
    """Write ``path/state_name/state_name_<rank>.json``. All ranks call."""
    call = f"save_on_{'dp' if by_dp else 'global'}_ranks({state_name})"
    session, rank, writes = _begin_of_ranks(life, call, state, by_dp)
    with session.group.together(f"writing {state_name} of every rank"):
        stem = _stem(Path(path).absolute(), state_name, rank)
        if writes:
            session.storage.make_directory(stem.parent)
            write_state(session.storage, stem, pack_state(state.state_dict()))
            session.storage.sync_directory(stem.parent)


def load_rank_state(life: Lifetime, state: Stateful, state_name: str, path: str | Path, *, by_dp: bool) -> None:
    """Read what `save_rank_state` wrote for this rank, or another tool by ``torch.save`` (``.pt``). All ranks call."""
    call = f"load_on_{'dp' if by_dp else 'global'}_ranks({state_name})"
    session, rank, _ = _begin_of_ranks(life, call, state, by_dp)
    with session.group.together(f"reading {state_name} of every rank"):
        stem = _stem(Path(path).absolute(), state_name, rank)
        theirs = stem.with_name(f"{stem.name}.pt")
        if has_state(stem):
            found = read_state(stem)
        elif is_file(theirs):
            legacy = session.config.allow_legacy_pickle_restore
            found = read_torch_value(read_file(theirs), str(theirs), state_name, legacy=legacy)
        else:
            raise CheckpointNotFoundError(
                f"no {state_name} was saved for {rank.replace('_', ' ')}",
                path=stem.with_name(stem.name + ".json"),
                hint="It was saved on fewer ranks; restore on the same number, or start this state afresh.",
            )
        state.load_state_dict(cast("dict[str, object]", found))


@dataclass(frozen=True, slots=True)
class FoundExtras:
    """Extra state and generators that were found, read and looked at, on every rank.

    What is spread over the ranks is only opened: ``modules``, and ``tensors`` in other values.
    """

    extra: FoundValues
    generators: FoundValues
    modules: Sequence[OpenedModel]
    tensors: Sequence[OpenedLoad]

    def fill(self, group: Group) -> None:
        """Read what is spread over the ranks, and load the objects that have DTensors. All ranks call."""
        for module in self.modules:
            module.fill()
        for load in self.tensors:
            load.read()
        if not self.tensors:
            return
        with group.together("loading extra state"):
            for name, tensors in self.extra.tensors.items():
                value = self.extra.values[name]
                if isinstance(value, Stateful):
                    state = fill_tree(self.extra.states[name], tensors)
                    value.load_state_dict(cast(dict[str, object], state))

    def set_generators(self, order: data_order.DataOrder) -> None:
        """Set the generators, after everything else, since other code may draw numbers. Local."""
        state = cast("dict[str, object] | None", self.generators.states.get("rng"))
        if state is not None:
            RandomState().load_state_dict(state)
        positions = self.generators.states.get(BATCHES)
        found = {} if positions is None else order.parsed(positions)
        order.resume(state, found, [self.extra.values[name] for name in self.extra.states])


def find_extras(session: Session, directory: Path, extra_state: MutableMapping[str, object]) -> FoundExtras:
    """Read generators and extra state; nothing is changed. All ranks call; a rank may have names that others lack."""
    group = session.group
    # For other tools' checkpoints; ours have a directory of extra state.
    foreign: Mapping[str, object] = {}
    with group.together("looking for extra state") as vote:
        vote.flag = bool(extra_state) and not is_directory(directory / "extra")
    if vote.any:
        legacy = session.config.allow_legacy_pickle_restore
        foreign = read_states(directory, extra_state, group, legacy)

    def find() -> tuple[FoundValues, FoundValues]:
        own = {name: value for name, value in extra_state.items() if name not in foreign}
        extra = find_values(own, directory / "extra", group.rank, group.world_size)
        states = {name: filled(state_of(extra_state[name]), foreign[name]) for name in extra_state if name in foreign}
        extra = replace(extra, values=extra_state, states={**extra.states, **states})
        saved = saved_names(directory / "rng") if session.config.save_rng else []
        wanted: dict[str, object] = dict.fromkeys(name for name in saved if name in ("rng", BATCHES))
        generators = find_values(wanted, directory / "rng", group.rank, group.world_size)
        if group.world_size > 1 and has_state(directory / "rng" / BATCHES):  # not of each rank: there was only one
            states = {name: state for name, state in generators.states.items() if name != BATCHES}
            generators = replace(generators, states=states, skipped=(*generators.skipped, BATCHES))
        if "rng" in generators.states:
            _check_generators(generators.states["rng"])
        if BATCHES in generators.states:
            data_order.DataOrder.parsed(generators.states[BATCHES])
        return extra, generators

    extra, generators = group.attempt(find, "looking for extra state")
    return FoundExtras(extra, generators, *_open_spread(session, extra, directory / "extra"))


def require_position(found: FoundExtras, loader: object, directory: Path, group: Group) -> None:
    """Raise `MisuseError` if a loader's position cannot be restored on some rank, and why. All ranks call."""
    with group.together("looking for the position in the data"):
        name, where = (
            (data_order.DATALOADER, found.extra) if data_order.has_position(loader) else (BATCHES, found.generators)
        )
        if name in where.skipped:
            raise MisuseError(
                f"the position of the {type(loader).__name__} was saved for each rank, on another number of ranks than "
                f"{group.world_size}",
                path=directory,
                hint=data_order.RESUME_ON_AS_MANY,
            )
        if name not in where.states:
            raise MisuseError(
                f"the checkpoint has no position of the {type(loader).__name__} passed as dataloader",
                path=directory,
                hint="Choose a checkpoint that was saved with dataloader=..., or leave it out: the epoch's data then "
                "begin afresh.",
            )
