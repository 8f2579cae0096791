"""The state dict in a file of ``torch.save``: below which entry it is, and whether it is one rank's part of one."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from shardwise.disk.guarded import open_regular
from shardwise.errors import FormatError, some

#: Entries under which training loops keep a model's state dict.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "model_state",
    "model_states",
    "net",
    "network",
    "weights",
    "params",
)
#: Entries that hold tensors and are no model's: those of optimizers, schedules and random number generators.
_BESIDE = re.compile(
    r"optim|sched|scaler|rng|random|loss|metric|stat(istic)?s$|sampler|dataloader|history", re.IGNORECASE
)
_SHOWN = 8
_DISTRIBUTED = re.compile(r"^torch\.distributed\.\S* (DTensor|ShardedTensor|ShardedTensorMetadata)$")
_PICKLES_BEFORE = 3  # magic number, protocol version and system information, before torch 1.6
_MOST_PICKLE = 2**28


def elements_of(value: object) -> int | None:
    """The number of elements of a tensor; ``None`` of anything else."""
    return value.numel() if isinstance(value, torch.Tensor) else None


def unwrapped(
    found: Mapping[object, object], file: Path, elements: Callable[[object], int | None] = elements_of
) -> Mapping[object, object]:
    """The state dict in what a file holds: the mapping itself, or that under the entry of a training loop.

    ``elements`` gives how many elements a value has that is a tensor, where tensors are not torch's own.

    Raises:
        FormatError: No entry holds tensors, or several do and nothing shows which is meant.
    """
    own = {name: count for name, value in found.items() if (count := elements(value)) is not None}
    inner = {
        str(name): value
        for name, value in found.items()
        if isinstance(value, Mapping)
        and any(elements(each) is not None for each in value.values())
        and not _BESIDE.search(str(name))
    }
    wrappers = [name for name in inner if name in WRAPPERS]
    if not wrappers and own:
        return found
    if not inner:
        if not found:
            return found
        raise FormatError(
            f"the file holds no state dict; its entries are {some(map(repr, map(str, found)), _SHOWN)}",
            path=file,
            hint="Save the model's state dict, and pass that file.",
        )
    # A step count may be a tensor too.
    weights = [str(name) for name, count in own.items() if count > 1]
    if len(inner) > 1 or weights or not wrappers:
        several = some(map(repr, [*inner, *weights]), _SHOWN)
        raise FormatError(
            f"the file holds tensors under {several}, and nothing says which of them is the model",
            path=file,
            hint="Save the state dict that is meant by itself, and pass that file.",
        )
    return inner[wrappers[0]]


def distributed_class(file: Path) -> str | None:
    """The class of distributed tensors that a file's pickle names, or ``None``; nothing is unpickled.

    A file that cannot be recognised, such as a damaged one, is left to the reader.
    """
    try:
        with open_regular(file, FormatError) as (stream, _):
            if not zipfile.is_zipfile(stream):
                return _named_in_legacy(stream)
            with zipfile.ZipFile(stream) as archive:
                name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
                if name is None or archive.getinfo(name).file_size > _MOST_PICKLE:
                    return None
                data = archive.read(name)
            return _scan(data) if b"torch.distributed" in data else None
    except (OSError, ValueError, zipfile.BadZipFile, KeyError, IndexError):
        return None


def _named_in_legacy(stream: BinaryIO) -> str | None:
    stream.seek(0)
    if b"torch.distributed" not in stream.read(2**20):
        return None
    stream.seek(0)
    for _ in range(_PICKLES_BEFORE + 1):
        found = _scan(stream)
        if found is not None:
            return found
    return None


def _scan(pickle: bytes | BinaryIO) -> str | None:
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL" and isinstance(argument, str):
            named = argument
        elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
            named = f"{texts[-2]} {texts[-1]}"
        else:
            if isinstance(argument, str):
                texts = [*texts[-1:], argument]
            continue
        if _DISTRIBUTED.match(named):
            return named.replace(" ", ".")
    return None
