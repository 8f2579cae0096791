"""Checks before a call does anything: arguments, settings, places. A mistake is the same named error on every rank."""

from __future__ import annotations

import logging
import operator
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.comm import Group
from shardwise.disk.names import is_directory, names_in, real_path, status
from shardwise.disk.storage import IsLocal, Storage, why_not_writable
from shardwise.errors import AdapterError, ConfigError, MisuseError, StorageError
from shardwise.lifecycle import parse_checkpoint_name
from shardwise.peft.models import is_whole_with_adapter
from shardwise.settings import SaveConsolidatedMode, Settings
from shardwise.stateful_wrappers.units import refuse_fsdp1

_LOG = logging.getLogger(__name__)

#: The environment variable that is used where the setting ``trace`` is not given.
TRACE_VARIABLE = "SHARDWISE_TRACE"
#: What to do where ranks write below directories of their own.
SHARE_THE_ROOT = (
    "Give every rank the same checkpoint_dir on a file system that all of them share: no time stamp or rank in its "
    "name, no disk of one node's own."
)

#: Settings that may differ between ranks: paths, what a machine can do, and what only one pipeline stage has. Any other
#: setting may decide which collectives a save or load makes, or which bytes belong where.
_OWN = frozenset(
    {
        "checkpoint_dir",
        "model_cache_dir",
        "model_repo_id",
        "original_model_root_dir",
        "staging_dir",
        "io_threads",
        "collective_timeout_seconds",
        "consolidation_timeout_minutes",
        "model_state_dict_keys",
        "skip_task_head_prefixes_for_base_model",
        "log_summary",
        "trace",
    }
)


def check_arguments(model: object, optimizer: object = None, scheduler: object = None) -> None:
    """Raise `MisuseError` if an argument, or an item of one, has a wrong type, or a module is wrapped by FSDP1."""
    for part in _several(model):
        if not isinstance(part, nn.Module):
            raise _not("model", part, "an nn.Module, or the list of this rank's pipeline stages")
    for each in () if optimizer is None else _several(optimizer):
        has_methods = hasattr(each, "state_dict") and hasattr(each, "load_state_dict")
        is_other = isinstance(each, (nn.Module, LRScheduler, type))
        if not isinstance(each, Optimizer) and (not has_methods or is_other):
            raise _not("optimizer", each, "a torch.optim.Optimizer, or what has its methods, or a list of them")
    for each in () if scheduler is None else _several(scheduler):
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise _not("scheduler", each, "a learning rate scheduler, or a list of them")
    refuse_fsdp1(_several(model))


def refuse_whole_adapter(parts: Sequence[nn.Module]) -> None:
    """Raise `AdapterError` if peft has adapted a model that is exported, now or later, as if it were whole. Local."""
    if is_whole_with_adapter(parts):
        raise AdapterError(
            "the model has an adapter of peft's in it, and is_peft is false: the names of a whole export would be "
            "those of peft's layers, which no model class opens",
            hint="Set is_peft to true, which saves the adapter and resumes from it; or save the model that "
            "merge_and_unload() returns. Nothing is published.",
        )


@dataclass(frozen=True, slots=True)
class FirstExchange:
    """What the ranks exchanged at the first call.

    Whether the settings of any rank name a base model or list its parameters, where each rank's root directory is, and
    a text unique to this run.
    """

    names_base: bool
    names_keys: bool
    locations: tuple[RootLocation, ...]
    token: str


def check_same_settings(config: Settings, root: Path, group: Group) -> FirstExchange:
    """Raise `ConfigError` if ranks differ in a setting they share, or in their root on one machine. All ranks call."""
    names_base = config.model_repo_id is not None or config.original_model_root_dir is not None
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _OWN}
    values["staging_dir"] = "not given" if config.staging_dir is None else "given"
    own = {key: str(value.value if isinstance(value, Enum) else value) for key, value in values.items()}
    names = names_base, bool(config.model_state_dict_keys)
    path = real_path(root)
    found = status(path)
    identity = None if found is None or found.identity is None else list(found.identity)
    location = RootLocation(socket.gethostname(), str(path), identity)
    rows = group.gather_json((own, names, location, uuid.uuid4().hex), "comparing settings")
    for rank, (theirs, *_) in enumerate(rows):
        for key, value in rows[0][0].items():
            if theirs[key] != value:
                raise ConfigError(
                    f"{key} is {value} on rank 0 and {theirs[key]} on rank {rank}",
                    hint="Give every rank the same settings.",
                )
    locations = tuple(RootLocation(*theirs) for _, _, theirs, _ in rows)
    for rank, location in () if config.is_remote else enumerate(locations):
        # The same directory has one path or one identity on a machine; of two machines nothing is known.
        first, known = next((n, other) for n, other in enumerate(locations) if other.host == location.host)
        if location.path != known.path and (known.identity is None or known.identity != location.identity):
            raise ConfigError(
                f"checkpoint_dir is {known.path} on rank {first} and {location.path} on rank {rank}",
                hint=SHARE_THE_ROOT,
            )
    named, listed = (any(theirs) for theirs in zip(*(names for _, names, _, _ in rows), strict=True))
    return FirstExchange(named, listed, locations, rows[0][3])


def refuse_alone(group: Group) -> None:
    """Raise `MisuseError` where a launcher started several processes and this one has no process group."""
    started = os.environ.get("WORLD_SIZE", "1")
    if group.process_group is None and started.isdecimal() and int(started) > 1:
        raise MisuseError(
            f"WORLD_SIZE is {started} and torch.distributed is not initialised: each process would save and load by "
            "itself, to the same names",
            hint="Call torch.distributed.init_process_group before the first call of the checkpointer; or, for a "
            "process that is to act by itself, remove WORLD_SIZE from its environment.",
        )


def whole_number(value: int) -> int:
    """Convert any library's integer to Python's ``int``; return anything else unchanged, for the caller to refuse."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_mapping(key: str, value: object, kind: type = Mapping) -> None:
    """Raise `MisuseError` unless an argument is a mapping or not given."""
    if value is not None and not isinstance(value, kind):
        raise _not(key, value, "a dictionary")


def check_tokenizer(value: object) -> None:
    """Raise `MisuseError` unless what is passed as tokenizer can be saved, or nothing is."""
    if value is not None and not hasattr(value, "save_pretrained"):
        raise _not("tokenizer", value, "a tokenizer or processor, which has save_pretrained()")


def check_stateful(value: object) -> str:
    """Return "a state"; `MisuseError` unless an object has ``state_dict`` and ``load_state_dict``."""
    if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
        raise _not("state", value, "an object with state_dict() and load_state_dict()")
    return "a state"


def _several(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _not(label: str, value: object, wanted: str) -> MisuseError:
    return MisuseError(f"what was passed as {label} is a {type(value).__name__}", hint=f"Pass {wanted}.")


def check_building(config: Settings, storage: Storage | None) -> Path | None:
    """Check when a checkpointer is built that it may write: not after an hour of training; returns where traces go.

    Nothing is made. A storage that keeps its files elsewhere is not asked. A ``checkpoint_dir`` with checkpoints may be
    there to be restored from, so that this is only a warning.
    """
    if config.is_remote and storage is None:
        raise ConfigError(
            "checkpoint_dir is a URL, which the mounted file systems cannot reach",
            path=config.checkpoint_dir,
            hint="Set checkpoint_dir to a local or mounted directory, or pass a storage.",
        )
    if config.model_save_format == "torch_save" and config.consolidated_mode is SaveConsolidatedMode.EVERY:
        raise ConfigError(
            "save_consolidated is 'every', and model_save_format 'torch_save' writes no Hugging Face export",
            hint="Set model_save_format to 'safetensors' for an export with every save, or save_consolidated to "
            "'false' for DCP's files alone; `shardwise consolidate` makes an export of these later.",
        )
    if config.enabled and not config.is_remote and (storage is None or isinstance(storage, IsLocal)):
        root = Path(config.checkpoint_dir).absolute()
        local = root if storage is None else storage.local_path(root)
        unwritable = _refusal(
            "checkpoint_dir",
            local,
            "Set checkpoint_dir to a directory that this user may write to, or set enabled to false in a program that "
            "only restores.",
        )
        if unwritable is not None:
            if not is_directory(local) or not any(parse_checkpoint_name(name) for name in names_in(local)):
                raise unwritable
            _LOG.warning("no checkpoint can be saved: %s", unwritable)
    trace = config.trace or os.environ.get(TRACE_VARIABLE)
    trace_dir = Path(trace).absolute() if trace else None
    if trace_dir is not None:
        hint = f"Name another directory in the setting trace or in {TRACE_VARIABLE}."
        if (no_trace := _refusal("trace", trace_dir, hint)) is not None:
            raise no_trace
    return trace_dir


def _refusal(setting: str, directory: Path, hint: str) -> StorageError | None:
    reason = why_not_writable(directory)
    if reason is None:
        return None
    error = StorageError(f"{setting} is {directory}, and {reason.strerror}", path=directory, hint=hint)
    error.errno = reason.errno
    return error


class RootLocation(NamedTuple):
    """Where a rank's root directory is: resolved, with device and number as that machine counts them."""

    host: str
    path: str
    identity: Sequence[int] | None

    def __str__(self) -> str:
        return f"{self.path} on {self.host}"
