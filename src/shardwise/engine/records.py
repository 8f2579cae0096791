"""A save as a value: steps that write, their records (the files and tensors of a component), and one commit at the end.

It is run at once, or in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shardwise.comm import Group
from shardwise.disk.crc import crc32c
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage
from shardwise.errors import IncompleteTensorError
from shardwise.format.manifest import (
    MANIFEST_NAME,
    AliasRecord,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_manifest,
)
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.layout import Layout

_SPREAD_DIFFERENTLY = "Two ranks describe the tensor's sharding differently; check their meshes and placements."


@dataclass(frozen=True)
class ComponentRecord:
    """One rank's record of a component (``model``, ``optim``); paths are relative to the component's directory.

    Of a tensor it has the pieces that this rank knows; see `merged`.
    """

    files: tuple[FileRecord, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    aliases: tuple[AliasRecord, ...] = ()

    def below(self, prefix: str, component: str = "") -> ComponentRecord:
        """The same, with every path put below ``prefix``.

        ``component`` is what ``model`` is called instead, also in front of ``model.exact``.
        """
        if not prefix:
            return self
        files = [FileRecord(f"{prefix}/{f.path}", f.size, f.crc32c, f.header_bytes) for f in self.files]
        tensors = [_below(tensor, prefix, component) for tensor in self.tensors]
        aliases = [AliasRecord(_renamed(own, component), name, kept) for own, name, kept in self.aliases]
        return ComponentRecord(tuple(files), tuple(tensors), tuple(aliases))

    def __add__(self, other: ComponentRecord) -> ComponentRecord:
        return ComponentRecord(self.files + other.files, self.tensors + other.tensors, self.aliases + other.aliases)

    def encoded(self) -> JsonValue:
        """The record as it travels."""
        files: list[JsonValue] = [[f.path, f.size, f.crc32c, f.header_bytes] for f in self.files]
        # Named tuples are arrays in JSON.
        return [files, cast(JsonValue, self.tensors), cast(JsonValue, self.aliases)]

    @staticmethod
    def decoded(value: JsonValue) -> ComponentRecord:
        """The inverse of `encoded`."""
        files, tensors, aliases = cast(_Encoded, value)
        return ComponentRecord(
            tuple([FileRecord(*file) for file in files]),
            tuple([_decoded(*tensor) for tensor in tensors]),
            tuple([AliasRecord(*alias) for alias in aliases]),
        )


def _renamed(own: str, component: str) -> str:
    return component + own.removeprefix("model") if component else own


def _below(tensor: TensorRecord, prefix: str, component: str) -> TensorRecord:
    own, spec, crc, chunks = tensor
    moved = [ChunkRecord(f"{prefix}/{file}", offset, nbytes, box, c) for file, offset, nbytes, box, c in chunks]
    return TensorRecord(_renamed(own, component), spec, crc, tuple(moved))


_EncodedChunk = tuple[str, int, int, tuple[list[int], list[int]], int]
_EncodedTensor = tuple[str, tuple[str, list[int], str], int | None, list[_EncodedChunk]]
_Encoded = tuple[list[tuple[str, int, int | None, int | None]], list[_EncodedTensor], list[tuple[str, str, str]]]


def _decoded(
    component: str, spec: tuple[str, list[int], str], crc: int | None, chunks: list[_EncodedChunk]
) -> TensorRecord:
    name, shape, dtype = spec
    pieces = [
        ChunkRecord(file, offset, nbytes, Box(tuple(offsets), tuple(sizes)), digest)
        for file, offset, nbytes, (offsets, sizes), digest in chunks
    ]
    return TensorRecord(component, TensorSpec(name, tuple(shape), dtype), crc, tuple(pieces))


def merged(records: Iterable[ComponentRecord]) -> ComponentRecord:
    """Merge the records of several ranks: each file and alias once, and each tensor with all its pieces.

    Records are in rank order, tensors in the order in which they are first named.
    """
    files: dict[str, FileRecord] = {}
    aliases: dict[tuple[str, str], AliasRecord] = {}
    tensors: dict[tuple[str, str], list[TensorRecord]] = {}
    for record in records:
        for file in record.files:
            files.setdefault(file.path, file)
        for alias in record.aliases:
            aliases.setdefault((alias.component, alias.name), alias)
        for tensor in record.tensors:
            tensors.setdefault((tensor.component, tensor.spec.name), []).append(tensor)
    joined = [found[0] if len(found) == 1 else _joined(found) for found in tensors.values()]
    return ComponentRecord(tuple(files.values()), tuple(joined), tuple(aliases.values()))


def _joined(found: list[TensorRecord]) -> TensorRecord:
    chunks = [chunk for tensor in found for chunk in tensor.chunks]
    chunks.sort(key=lambda chunk: chunk.box.offsets)
    return found[0]._replace(chunks=tuple(chunks))


def layout_record(
    layout: Layout, crcs: Mapping[str, int], component: str = "model", within: str = ""
) -> ComponentRecord:
    """Finished tensor files, each tensor whole in one of them.

    ``crcs`` has the CRC-32C of each tensor that has bytes; ``within`` is empty, or a directory and a slash.
    """
    files, tensors = [], []
    empty = crc32c(b"")
    for file in layout.files:
        path, head = within + file.name, len(file.header)
        files.append(FileRecord.of_tensors(path, file.size, file.header))
        for spec, begin, end in file.entries:
            crc = crcs[spec.name] if end > begin else empty
            chunk = ChunkRecord(path, head + begin, end - begin, Box.whole(spec.shape), crc)
            tensors.append(TensorRecord(component, spec, crc, (chunk,)))
    return ComponentRecord(tuple(files), tuple(tensors))


def write_state(storage: Storage, stem: Path, packed: Mapping[str, bytes]) -> ComponentRecord:
    """Write a packed state as ``stem.json`` (and ``stem.safetensors``), durable; paths in the record are names only."""
    files = []
    for suffix, content in packed.items():
        path = stem.with_name(stem.name + suffix)
        write_file(storage, path, content)
        files.append(FileRecord.plain(path.name, content))
    return ComponentRecord(tuple(files))


def write_manifest(storage: Storage, directory: Path, record: ComponentRecord, info: Mapping[str, JsonValue]) -> None:
    """Write the manifest of a directory, the last file of a save, durably. One rank calls."""
    manifest = Manifest(record.files, record.tensors, info, record.aliases)
    write_file(storage, directory / MANIFEST_NAME, encode_manifest(manifest))
    storage.sync_directory(directory)


def check_written(spec: TensorSpec, nbytes: int, path: Path, hint: str = _SPREAD_DIFFERENTLY) -> None:
    """Raise `IncompleteTensorError` unless all ranks together wrote ``nbytes``, all bytes of a tensor."""
    if nbytes != spec.nbytes:
        what = f"the ranks together wrote {nbytes} of {spec.nbytes} bytes"
        raise IncompleteTensorError(what, path=path, tensor=spec.name, hint=hint)


Step = Callable[[Group], ComponentRecord]
Commit = Callable[[Group, ComponentRecord], None]


def local_step(what: str, write: Callable[[], ComponentRecord], *, main_only: bool = False) -> Step:
    """A step without messages between ranks, of every rank or of rank 0; a failure in it is raised on all ranks."""

    def run(group: Group) -> ComponentRecord:
        return group.attempt(lambda: write() if group.is_main or not main_only else ComponentRecord(), what)

    return run


def below(prefix: str, steps: Sequence[Step], component: str = "") -> list[Step]:
    """The steps with the paths of their records put below ``prefix``; see `ComponentRecord.below`."""

    def moved(step: Step) -> Step:
        return lambda group: step(group).below(prefix, component)

    return [moved(step) for step in steps]


@dataclass(frozen=True)
class SaveJob:
    """The rest of a save once the state is captured. Every rank has one, with the same steps.

    Each step writes a component and returns a record of it; ``commit`` makes the result visible, given the records of
    all; ``abandon`` removes what was written, after a failure, and must not raise.
    """

    what: str
    steps: tuple[Step, ...]
    commit: Commit
    abandon: Callable[[Group], None]

    def run(self, group: Group) -> None:
        """Run the save; nothing becomes visible if it fails on any rank, which is raised on all. All ranks call."""
        record = ComponentRecord()
        try:
            for step in self.steps:
                record = record + step(group)
            self.commit(group, record)
        except BaseException:
            self.abandon(group)
            raise
