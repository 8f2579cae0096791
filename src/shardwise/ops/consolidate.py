"""The Hugging Face export of a checkpoint that was saved as shards: one process, bounded memory, the shards stay."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from shardwise.addons.files import as_text, read_json
from shardwise.addons.hf_config import CONFIG, CONFIG_V5, untied
from shardwise.checkpointing.config_ties import differing_ties
from shardwise.comm import Group
from shardwise.engine.absent import saved_aliases
from shardwise.errors import CheckpointExistsError, MisuseError, StateFormatError
from shardwise.format.crc import crc32c
from shardwise.format.dtypes import torch_dtype
from shardwise.format.manifest import (
    MANIFEST_NAME,
    AliasRecord,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_manifest,
)
from shardwise.format.notes import APART, FILE_DTYPES, FILE_INDEX, KEPT_OUT, LOOSE_TIES, METADATA_DIR, NOTES
from shardwise.format.strict_json import JsonValue, loads
from shardwise.io.memory import as_bytes
from shardwise.io.reader import Reader
from shardwise.io.sources import Source, open_source
from shardwise.io.statefiles import read_file, write_plain
from shardwise.io.storage import LocalStorage, Storage
from shardwise.io.stream import tensor_blocks
from shardwise.lifecycle import LATEST, LOCAL, list_checkpoints, resolve, temporary_name
from shardwise.lifecycle.filesystem import storage_errors
from shardwise.ops.verify import Progress
from shardwise.plan.layout import FileLayout, Layout, index_name, lay_out
from shardwise.types import Box, TensorSpec

__all__ = ["ConsolidateReport", "consolidate"]

_CONSOLIDATED = "consolidated"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class ConsolidateReport:
    """What was written.

    Attributes:
        path: The export's directory.
        files: Names of its tensor files.
        tensors: Number of tensors.
        nbytes: Bytes of the tensor files.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int


def consolidate(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    max_file_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> ConsolidateReport:
    """Write the export of a checkpoint's shards, with the base model's file split and dtypes where they were recorded.

    It is written beside its place and renamed into it, with a manifest of its own: that of a checkpoint is never
    rewritten.

    Args:
        path: A checkpoint's ``model`` directory, the checkpoint, or a root, whose ``LATEST`` is meant.
        output: The export's directory; ``consolidated`` in the ``model`` directory by default.
        max_file_bytes: Largest file where no base model's split was recorded.
        progress: Told of bytes written and bytes to write.
        storage: Through what.

    Raises:
        CheckpointExistsError: There is an export already.
        CheckpointNotFoundError: There are no shards.
        FormatError: A shard is damaged.
    """
    top = Path(path).absolute()
    if top.is_dir() and not (top / "model").is_dir() and (list_checkpoints(top) or os.path.lexists(top / LATEST)):
        found = resolve(top)
        top = top if found is None else found.path
    directory = top / "model" if (top / "model").is_dir() else top
    target = Path(output).absolute() if output is not None else directory / _CONSOLIDATED
    if os.path.lexists(target):
        raise CheckpointExistsError(
            "the export is already there", path=target, hint="Use it, delete it, or choose another output."
        )
    if not directory.is_dir():
        raise MisuseError("not a directory", path=directory, hint="Name a checkpoint's model directory.")
    store = storage or LocalStorage()
    source = open_source(directory, Group(None))
    source = source.without(name for note in (KEPT_OUT, APART) for name in _names(directory / METADATA_DIR / note))
    layout = _layout(directory, source, max_file_bytes)
    aside = target.with_name(temporary_name(target.name))
    with storage_errors(aside):
        LOCAL.remove_tree(aside)
    try:
        store.make_directory(aside)
        _write(source, layout, aside, directory / METADATA_DIR, store, progress)
        with storage_errors(target):
            LOCAL.rename_new(aside, target)
            LOCAL.fsync_path(target.parent)
    except BaseException:
        with storage_errors(aside):
            LOCAL.remove_tree(aside)
        raise
    return ConsolidateReport(target, tuple(file.name for file in layout.files), len(source.tensors), layout.total_bytes)


def _layout(directory: Path, source: Source, max_file_bytes: int) -> Layout:
    numbers = {n: i for n, i in _mapping(directory / METADATA_DIR / FILE_INDEX).items() if isinstance(i, int)}
    dtypes = _mapping(directory / METADATA_DIR / FILE_DTYPES)
    count = max(numbers.values(), default=0)
    files = {
        name: "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        for name, number in numbers.items()
    }
    specs = [_exported(tensor.spec, dtypes.get(name)) for name, tensor in source.tensors.items()]
    return lay_out(specs, base_files=files, max_file_bytes=max_file_bytes)


def _exported(spec: TensorSpec, dtype: JsonValue) -> TensorSpec:
    if isinstance(dtype, str) and {dtype, spec.dtype} <= _FLOATS:
        return spec._replace(dtype=dtype)
    return spec


def _names(path: Path) -> list[str]:
    if not path.is_file():
        return []
    found = loads(read_file(path), fail=_failing(path))
    if not isinstance(found, list):
        raise StateFormatError("not a JSON list", path=path, hint="Restore the file.")
    return [str(name) for name in found]


def _failing(path: Path) -> Callable[[str], NoReturn]:
    def fail(reason: str) -> NoReturn:
        raise StateFormatError(f"the record {reason}", path=path, hint="Restore the file.")

    return fail


def _mapping(path: Path) -> Mapping[str, JsonValue]:
    if not path.is_file():
        return {}
    found = loads(read_file(path), fail=_failing(path))
    if not isinstance(found, dict):
        raise StateFormatError("not a JSON object", path=path, hint="Restore the file.")
    return found


def _write(
    source: Source, layout: Layout, aside: Path, metadata: Path, storage: Storage, progress: Progress | None
) -> None:
    storage.check_space(aside, layout.total_bytes)
    files: list[FileRecord] = []
    tensors: list[TensorRecord] = []
    reader = Reader(storage, source.files)
    done = 0
    try:
        for file in layout.files:
            for record in _write_file(file, aside / file.name, source, reader, storage):
                tensors.append(record)
                done += record.spec.nbytes
                if progress is not None:
                    progress(done, layout.tensor_bytes)
            files.append(FileRecord(file.name, file.size, crc32c(file.header), len(file.header)))
    finally:
        reader.close()
    plain = {index_name(): layout.index}
    loose = {name: str(kept) for name, kept in _mapping(metadata / LOOSE_TIES).items()}
    for place in sorted(p for p in metadata.rglob("*") if p.is_file()):
        relative = place.relative_to(metadata).as_posix()
        if relative not in NOTES:
            plain[relative] = read_file(place)
    if differing_ties(loose, tensors):
        for name in (CONFIG, CONFIG_V5):
            if name in plain:
                plain[name] = as_text(untied(read_json(metadata / name))).encode()
    for name, content in plain.items():
        storage.make_directory((aside / name).parent)
        write_plain(storage, aside / name, content)
        storage.sync_directory((aside / name).parent)
        files.append(FileRecord(name, len(content), crc32c(content), None))
    manifest = Manifest(tuple(files), tuple(tensors), aliases=_aliases(source))
    write_plain(storage, aside / MANIFEST_NAME, encode_manifest(manifest))
    storage.sync_directory(aside)


def _aliases(source: Source) -> tuple[AliasRecord, ...]:
    """Further names of the tensors, which the manifest of the shards tells."""
    found = saved_aliases(source)
    return tuple(
        AliasRecord("model", name, kept)
        for name, kept in found.items()
        if kept in source.tensors and name not in source.tensors
    )


def _write_file(
    file: FileLayout, path: Path, source: Source, reader: Reader, storage: Storage
) -> Iterator[TensorRecord]:
    storage.create(path, file.size, file.header)
    handle = storage.open(path, writable=True)
    try:
        offset = len(file.header)
        for entry in file.entries:
            start, crc = offset, 0
            for block in _blocks(source, entry.spec, reader):
                crc = crc32c(block, crc)
                storage.write(handle, block, offset)
                offset += len(block)
            chunk = ChunkRecord(file.name, start, entry.spec.nbytes, Box.whole(entry.spec.shape), crc)
            yield TensorRecord("model", entry.spec, crc, (chunk,))
        storage.sync(handle)
    finally:
        storage.close(handle)


def _blocks(source: Source, spec: TensorSpec, reader: Reader) -> Iterator[memoryview]:
    saved = source.tensors[spec.name]
    for block in tensor_blocks(saved, reader):
        if saved.spec.dtype == spec.dtype or math.prod(spec.shape) == 0:
            yield block
        else:
            values = torch.frombuffer(block, dtype=torch_dtype(saved.spec.dtype))
            yield as_bytes(values.to(torch_dtype(spec.dtype)))
