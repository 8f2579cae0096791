"""Weights in ``pytorch_model.bin`` and its like, found without loading them.

A ``.bin`` of today is a zip archive of stored, uncompressed storages. Unpickling it over fake tensors, with torch's
restricted unpickler, tells each tensor's place in the file, and from there on it is read by byte ranges like any
other. What cannot be told this way (files of torch before 1.6, tensors that are not contiguous in their storage) is
opened by ``torch.load``, memory-mapped where the format allows it, and copied slice by slice.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from shardwise.comm import Group, JsonValue
from shardwise.errors import CheckpointNotFoundError, FormatError, UnsafePickleError, WeightIndexError
from shardwise.format.dtypes import dtype_code
from shardwise.format.index import read_index
from shardwise.io.memory import blocks
from shardwise.io.sources import Source
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.types import Box, TensorSpec

_LOG = logging.getLogger(__name__)

_TORCH_FILE = re.compile(r"^(pytorch_model|model|diffusion_pytorch_model)(-\d+-of-\d+)?\.bin$")
_SUFFIXES = (".bin", ".pt", ".pth")
_COPY_ELEMENTS = 2**20


@dataclass(frozen=True)
class BinSource:
    """The tensors of ``.bin`` files.

    Attributes:
        source: Those that byte ranges can read.
        loose: Name -> what it is and the file that has to be opened for it.
        legacy: Whether unrestricted unpickling is permitted.
    """

    source: Source
    loose: Mapping[str, tuple[TensorSpec, Path]]
    legacy: bool


def has_torch_files(path: Path) -> bool:
    """Whether there are ``.bin`` weights at a path, which may be a file."""
    if path.is_file():
        return path.suffix in _SUFFIXES
    return path.is_dir() and any(_TORCH_FILE.match(name) for name in os.listdir(path))


def open_bin(path: Path, group: Group, allow_legacy_pickle: bool = False) -> BinSource:
    """Find the tensors of a ``.bin`` file, or of a directory of them. All ranks of the group call and see the same.

    Args:
        path: A file, or a directory with ``pytorch_model.bin``, with several of them, or with an index.
        group: The ranks that load together; each file is looked into by one of them.
        allow_legacy_pickle: Unpickle without restrictions, which runs code from the file.

    Raises:
        CheckpointNotFoundError: There is no such file.
        UnsafePickleError: A file names something outside torch's allow-list.
        FormatError: A file is damaged, or holds no state dict.
    """
    listed = group.tell(
        lambda: cast(JsonValue, [path.name] if path.is_file() else _listing(path)), f"looking for .bin files at {path}"
    )
    names = cast(list[str], listed)
    files = [path if path.is_file() else path / name for name in names]
    own: dict[str, JsonValue] = {}
    with group.together(f"looking into the .bin files at {path}"):
        for number, file in enumerate(files):
            if number % group.world_size == group.rank:
                own[str(number)] = list(_entries(file, allow_legacy_pickle))
    everyone = cast(list[dict[str, list[JsonValue]]], group.gather_json(cast(JsonValue, own), "sharing headers"))
    merged = {int(number): rows for theirs in everyone for number, rows in theirs.items()}
    tensors: dict[str, SourceTensor] = {}
    loose: dict[str, tuple[TensorSpec, Path]] = {}
    for number, file in enumerate(files):
        for row in merged[number]:
            name, shape, code, offset = cast(tuple[str, list[int], str, int | None], row)
            spec = TensorSpec(name, tuple(shape), code)
            if offset is None:
                loose[name] = (spec, file)
            else:
                tensors[name] = SourceTensor(spec, (SourceChunk(Box.whole(spec.shape), number, offset),))
    return BinSource(Source(path, tuple(files), tensors), loose, allow_legacy_pickle)


def _listing(directory: Path) -> list[str]:
    names = sorted(os.listdir(directory))
    plain = [name for name in names if _TORCH_FILE.match(name)]
    for index in ("pytorch_model.bin.index.json", *(n for n in names if n.endswith(".bin.index.json"))):
        if index not in names:
            continue
        listed = sorted(set(read_index(directory / index).weight_map.values()))
        absent = [f for f in listed if f not in names]
        if absent:
            raise WeightIndexError(
                f"the index names {absent[0]}, which is absent",
                path=directory / index,
                hint="Fetch or restore the missing file; the model is not whole without it.",
            )
        return listed
    if not plain:
        raise CheckpointNotFoundError(
            "the directory holds no .bin weights", path=directory, hint="Point at a model directory."
        )
    return plain


def _entries(file: Path, legacy: bool) -> Iterator[JsonValue]:
    """Name, shape, dtype code and byte offset of every tensor; no offset for one that has to be loaded."""
    if not zipfile.is_zipfile(file):
        for name, tensor in load_file(file, legacy).items():
            yield [name, list(tensor.shape), dtype_code(tensor.dtype, name), None]
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = file.stat().st_size
    with FakeTensorMode():
        state = load_file(file, legacy, mmap=False)
    for name, tensor in state.items():
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        offset: int | None = None
        if isinstance(start, int) and tensor.is_contiguous():
            offset = start + int(tensor.storage_offset()) * tensor.element_size()
            if offset < 0 or offset + tensor.numel() * tensor.element_size() > size:
                raise FormatError("the tensor lies outside of the file", path=file, tensor=name, hint="Fetch it again.")
        yield [name, list(tensor.shape), dtype_code(tensor.dtype, name), offset]


def load_file(file: Path, legacy: bool, mmap: bool | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a ``.bin`` file, memory-mapped where its format allows.

    Raises:
        UnsafePickleError: It names something outside torch's allow-list, and ``legacy`` is not set.
        FormatError: It is damaged, or not a state dict.
    """
    from pickle import UnpicklingError

    mapped = zipfile.is_zipfile(file) if mmap is None else mmap
    try:
        found: object = torch.load(file, map_location="cpu", mmap=mapped, weights_only=not legacy)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafePickleError(
            f"the file does more than hold tensors: it names {named[1] if named else 'something forbidden'}",
            path=file,
            hint="If you trust whoever wrote it, set allow_legacy_pickle_restore, which runs the code in it.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # A file that is cut short makes torch seek to before its beginning.
        raise FormatError(f"the file is not a torch checkpoint: {error}", path=file, hint="Fetch it again.") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise FormatError(f"the file holds a {type(found).__name__}", path=file, hint="It has to hold a state dict.")
    return {str(name): value.detach() for name, value in found.items() if isinstance(value, torch.Tensor)}


def fill_loose(source: BinSource, wanted: Sequence[HeldTensor]) -> int:
    """Fill fragments from tensors that byte ranges cannot read, file by file; returns the bytes copied.

    A memory-mapped file adds nothing to this rank's memory but pages that the system may drop; one of torch before
    1.6 is loaded whole, one file at a time.
    """
    copied = 0
    for file, tensors in _by_file(source, wanted):
        state = load_file(file, source.legacy)
        for tensor in tensors:
            whole = state[tensor.spec.name].view(tensor.grid)
            for fragment in tensor.fragments:
                box = fragment.box
                part = whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
                copied += part.numel() * part.element_size()
                _copy(fragment.data, part)
        del state
    return copied


def _by_file(source: BinSource, wanted: Iterable[HeldTensor]) -> Iterator[tuple[Path, list[HeldTensor]]]:
    found: dict[Path, list[HeldTensor]] = {}
    for tensor in wanted:
        found.setdefault(source.loose[tensor.spec.name][1], []).append(tensor)
    yield from found.items()


def _copy(into: torch.Tensor, part: torch.Tensor) -> None:
    with torch.no_grad():
        if into.dim() == 0:
            into.copy_(part)
            return
        for ours, theirs in zip(blocks(into, _COPY_ELEMENTS), blocks(part, _COPY_ELEMENTS), strict=True):
            ours.copy_(theirs)
