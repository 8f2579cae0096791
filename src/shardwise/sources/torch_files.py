"""Weights in ``pytorch_model.bin`` and its like, found without loading them.

A ``.bin`` of today is a zip archive of stored, uncompressed storages. Unpickling it over fake tensors, with torch's
restricted unpickler, gives each tensor's place in the file, and from there on it is read by byte ranges like any
other. What cannot be located this way (files of torch before 1.6, tensors that are not contiguous in their storage) is
opened by ``torch.load``, memory-mapped where the format allows it, and copied slice by slice.
"""

from __future__ import annotations

import errno
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import torch

from shardwise.comm import Group, JsonValue
from shardwise.disk.guarded import open_regular
from shardwise.disk.names import file_size, is_directory, is_file, names_in
from shardwise.disk.storage import local_path
from shardwise.dtypes import dtype_code
from shardwise.errors import CheckpointNotFoundError, FormatError, UnsafePickleError, some
from shardwise.format.index import read_index
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.weight_files import TORCH, choose_weights, files_of_index
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.sources.directory_contents import torch_files
from shardwise.sources.packed_items import in_this_byte_order
from shardwise.sources.sources import Source, tell_unread
from shardwise.sources.tensor_bytes import blocks
from shardwise.upstream.torch_dispatch import place_in_archive, without_memory

_COPY_ELEMENTS = 2**20


@dataclass(frozen=True)
class BinSource:
    """The tensors of ``.bin`` files."""

    source: Source  #: The tensors that byte ranges can read.
    loose: Mapping[str, tuple[TensorSpec, Path]]  #: Name -> what it is and the file that has to be opened for it.
    legacy: bool  #: Whether unrestricted unpickling is permitted.


def open_bin(path: Path, group: Group, allow_legacy_pickle: bool = False) -> BinSource:
    """Find the tensors of a ``.bin`` file, or of a directory of them. All ranks of the group call and see the same.

    The path is a file, an index, or a directory: with an index, with ``pytorch_model.bin``, or with one file of torch.
    Each file is looked into by one rank. ``allow_legacy_pickle`` unpickles without restrictions, which runs code from
    the file; without it, what is outside torch's allow-list is an `UnsafePickleError`. A file that holds no state dict,
    several, or one rank's shards of one is a `FormatError`.
    """
    names = group.broadcast_result(lambda: [*_listing(path)], f"looking for .bin files at {path}")
    files = [(path if is_directory(path) else path.parent) / name for name in names]

    def look_into() -> JsonValue:
        return [list(_entries(file, allow_legacy_pickle)) for file in files[group.rank :: group.world_size]]

    everyone = cast(list[list[list[JsonValue]]], group.gather(look_into, f"looking into the .bin files at {path}"))
    tensors: dict[str, SourceTensor] = {}
    loose: dict[str, tuple[TensorSpec, Path]] = {}
    for number, file in enumerate(files):
        for row in everyone[number % group.world_size][number // group.world_size]:
            name, shape, code, offset = cast(tuple[str, list[int], str, int | None], row)
            spec = TensorSpec(name, tuple(shape), code)
            if offset is None:
                loose[name] = (spec, file)
            else:
                tensors[name] = SourceTensor(spec, (SourceChunk(Box.whole(spec.shape), number, offset),))
    return BinSource(Source(path, tuple(files), tensors), loose, allow_legacy_pickle)


def _listing(path: Path) -> Sequence[str]:
    """The name of a file, or of those that an index lists, or that make up the model in a directory."""
    read = cache(read_index)
    if is_file(path):
        is_list = TORCH.index_stem(path.name) is not None
        return files_of_index(path, names_in(path.parent), read).files if is_list else [path.name]
    indices = [name for name in names_in(path) if TORCH.index_stem(name) is not None]
    chosen = choose_weights(path, [*torch_files(path), *indices], TORCH, read)
    if chosen is None:
        raise CheckpointNotFoundError(
            "the directory holds no .bin weights", path=path, hint="Point at a model directory."
        )
    tell_unread(path, chosen)
    return chosen.files


def _refuse_other_formats(file: Path) -> None:
    """Refuse what is not one of torch's files, and what holds one rank's part of a model, by name."""
    found = what_is_file(file)
    if found is not None and found.kind is Kind.SAFETENSORS:
        raise FormatError(
            "the file is a safetensors file, whatever its name says", path=file, hint="Rename it to *.safetensors."
        )
    if found is not None and found.kind is not Kind.TORCH and not _is_zip(file):
        raise FormatError(f"the file is {found.name}, and none that torch.save wrote", path=file, hint=found.hint)
    shards = distributed_class(file)
    if shards is not None:
        raise FormatError(
            f"the file holds one rank's shards of a model and not its tensors: it names {shards}",
            path=file,
            hint="`shardwise consolidate` makes a model of the directory with all ranks' files. Or name the base model "
            "that the run started from, or gather its state dict where it is saved "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True); a checkpoint of "
            "shardwise or DCP is loaded from its directory.",
        )


def _entries(file: Path, legacy: bool) -> Iterator[JsonValue]:
    """Name, shape, dtype code and byte offset of every tensor; no offset for one that has to be loaded."""
    found, is_placed = _looked_into(file, legacy)
    size = file_size(file)
    for name, tensor in _tensors(found, file).items():
        start = place_in_archive(tensor) if is_placed else None
        offset: int | None = None
        if start is not None and tensor.is_contiguous():
            offset = start + int(tensor.storage_offset()) * tensor.element_size()
            if offset < 0 or offset + tensor.numel() * tensor.element_size() > size:
                raise FormatError("the tensor lies outside of the file", path=file, tensor=name, hint="Fetch it again.")
        yield [name, list(tensor.shape), dtype_code(tensor.dtype, name), offset]


def _looked_into(file: Path, legacy: bool) -> tuple[Mapping[object, object], bool]:
    """What a file holds, and whether its tensors have no memory and know their places in the file."""
    _refuse_other_formats(file)
    with open_regular(file, FormatError) as (stream, _):
        try:
            is_placed = zipfile.is_zipfile(stream) and in_this_byte_order(stream)
        except zipfile.BadZipFile:
            is_placed = True  # torch says what is wrong with it
    if not is_placed:
        return _load(file, legacy), False
    with without_memory():
        return _load(file, legacy, mmap=False), True


def _is_zip(file: Path) -> bool:
    with open_regular(file, FormatError) as (stream, _):
        return zipfile.is_zipfile(stream)


def load_file(file: Path, legacy: bool) -> dict[str, torch.Tensor]:
    """The state dict of a ``.bin`` file, memory-mapped where its format allows."""
    return _tensors(_load(file, legacy), file)


def _tensors(found: Mapping[object, object], file: Path) -> dict[str, torch.Tensor]:
    state = unwrapped(found, file, lambda value: value.numel() if isinstance(value, torch.Tensor) else None)
    return {str(name): value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}


def entries_of(file: Path) -> Mapping[str, bool]:
    """The entries of a file beside or around its state dict, and whether each holds anything."""
    found, _ = _looked_into(file, legacy=False)
    return {str(name): bool(value) for name, value in found.items() if not isinstance(value, torch.Tensor)}


def _load(file: Path, legacy: bool, mmap: bool | None = None) -> Mapping[object, object]:
    """What a file holds, which is a mapping."""
    from pickle import UnpicklingError

    mapped = _is_zip(file) if mmap is None else mmap
    place = local_path(file)
    try:
        if place is not None:
            found: object = torch.load(place, map_location="cpu", mmap=mapped, weights_only=not legacy)
        else:
            with open_regular(file, FormatError) as (stream, _):
                found = torch.load(stream, map_location="cpu", weights_only=not legacy)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafePickleError(
            f"the file does more than hold tensors: it names {named[1] if named else 'something forbidden'}",
            path=file,
            hint="If you trust whoever wrote it, set allow_legacy_pickle_restore, which runs the code in it.",
        ) from error
    except (
        RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError, OSError
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # A file that is cut short makes torch seek to before its beginning.
        raise FormatError(f"the file is not a torch checkpoint: {error}", path=file, hint="Fetch it again.") from error
    if not isinstance(found, Mapping):
        raise FormatError(f"the file holds a {type(found).__name__}", path=file, hint="It has to hold a state dict.")
    return found


def fill_from_file(file: Path, legacy: bool, wanted: Sequence[HeldTensor]) -> int:
    """Fill fragments from tensors of a file that byte ranges cannot read; returns the bytes copied.

    A memory-mapped file adds nothing to this rank's memory but pages that the system may drop; one of torch before
    1.6 is loaded whole.
    """
    copied = 0
    state = load_file(file, legacy)
    for tensor in wanted:
        whole = state[tensor.spec.name].view(tensor.grid)
        for fragment in tensor.fragments:
            box = fragment.box
            part = whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
            copied += part.numel() * part.element_size()
            with torch.no_grad():
                pairs = (blocks(data, _COPY_ELEMENTS) for data in (fragment.data, part))
                for ours, theirs in zip(*pairs, strict=True):
                    ours.copy_(theirs)
    return copied


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


def unwrapped(
    found: Mapping[object, object], file: Path, elements: Callable[[object], int | None]
) -> Mapping[object, object]:
    """The state dict in what a file holds: the mapping itself, or that under the entry of a training loop.

    ``elements`` gives how many elements a value has that is a tensor, and ``None`` for anything else. `FormatError`
    where no entry holds tensors, or several do and nothing shows which is meant.
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
