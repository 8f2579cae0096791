"""What a stage of a save reports to the next: which files and tensors a component consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from shardwise.disk.crc import crc32c
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage
from shardwise.errors import IncompleteTensorError
from shardwise.format.manifest import (
    MANIFEST_NAME,
    AliasRecord,
    ChunkRecord,
    FileRecord,
    KnownManifest,
    Manifest,
    TensorRecord,
    encode_manifest,
)
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.collector import collector_paused
from shardwise.plan.layout import Layout

#: A file's record as it travels between ranks.
FileRow: TypeAlias = tuple[str, int, int | None, int | None]


def file_row(file: FileRecord) -> JsonValue:
    """A file's record to be told, of which ``FileRecord(*row)`` makes one again."""
    return [file.path, file.size, file.crc32c, file.header_bytes]


@dataclass(frozen=True, slots=True)
class Told:
    """What ranks tell rank 0 of a component at the end of a save, all components in one exchange.

    Attributes:
        own: What this rank has to tell. Local.
        read: What rank 0 makes of what all have told, in rank order. Local.
    """

    own: Callable[[], JsonValue]
    read: Callable[[Sequence[JsonValue]], ComponentRecord]


@dataclass(frozen=True)
class ComponentRecord:
    """Files and tensors of one component (``model``, ``optim``), paths relative to the component's directory.

    Attributes:
        files: The files.
        tensors: The tensors in them.
        aliases: Further names of tensors.
        told: What is yet to be told of further files and tensors; on every rank alike.
    """

    files: tuple[FileRecord, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    aliases: tuple[AliasRecord, ...] = ()
    told: tuple[Told, ...] = ()

    @collector_paused()
    def below(self, prefix: str, component: str = "") -> ComponentRecord:
        """The same, with every path put below ``prefix``.

        Args:
            prefix: A directory.
            component: What a component called ``model`` is called instead, and in front of ``model.exact``.
        """
        if not prefix:
            return self
        # Built by hand: dataclasses.replace took a third of the time of putting a manifest together.
        files = [FileRecord(f"{prefix}/{f.path}", f.size, f.crc32c, f.header_bytes) for f in self.files]
        tensors = [_below(tensor, prefix, component) for tensor in self.tensors]
        aliases = self.aliases
        if component:
            aliases = tuple(AliasRecord(_renamed(a.component, component), *a[1:]) for a in aliases)
        told = tuple(_told(t, prefix, component) for t in self.told)
        return ComponentRecord(tuple(files), tuple(tensors), aliases, told)

    def __add__(self, other: ComponentRecord) -> ComponentRecord:
        return ComponentRecord(
            self.files + other.files,
            self.tensors + other.tensors,
            self.aliases + other.aliases,
            self.told + other.told,
        )

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)


def _renamed(own: str, component: str) -> str:
    return component + own.removeprefix("model") if component else own


def _below(tensor: TensorRecord, prefix: str, component: str) -> TensorRecord:
    own, spec, crc, chunks = tensor
    moved = [ChunkRecord(f"{prefix}/{file}", offset, nbytes, box, c) for file, offset, nbytes, box, c in chunks]
    return TensorRecord(_renamed(own, component), spec, crc, tuple(moved))


def _told(told: Told, prefix: str, component: str) -> Told:
    return Told(told.own, lambda rows: told.read(rows).below(prefix, component))


@collector_paused()
def layout_record(
    layout: Layout, crcs: Mapping[str, int], component: str = "model", within: str = ""
) -> ComponentRecord:
    """Finished tensor files, each tensor whole in one of them.

    Args:
        layout: The files.
        crcs: CRC-32C of each tensor that has bytes.
        component: Name of the component in the manifest.
        within: What paths begin with: empty, or a directory and a slash.
    """
    files, tensors = [], []
    empty = crc32c(b"")
    boxes: dict[tuple[int, ...], Box] = {}
    for file in layout.files:
        path, head = within + file.name, len(file.header)
        files.append(FileRecord.of_tensors(path, file.size, file.header))
        for spec, begin, end in file.entries:
            box = boxes.get(spec.shape)
            if box is None:
                box = boxes[spec.shape] = Box.whole(spec.shape)
            crc = crcs[spec.name] if end > begin else empty
            chunk = ChunkRecord(path, head + begin, end - begin, box, crc)
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


def write_manifest(
    storage: Storage,
    directory: Path,
    record: ComponentRecord,
    info: Mapping[str, JsonValue],
    known: KnownManifest | None = None,
) -> None:
    """Write the manifest of a directory, the last file of a save, durably. One rank calls.

    Args:
        storage: Through what.
        directory: Which.
        record: Every file but the manifest, and the tensors.
        info: What else there is to know.
        known: See `encode_manifest`.
    """
    manifest = Manifest(record.files, record.tensors, info, record.aliases)
    write_file(storage, directory / MANIFEST_NAME, encode_manifest(manifest, known))
    storage.sync_directory(directory)


def check_written(spec: TensorSpec, nbytes: int, path: Path) -> None:
    """Check that all ranks together wrote a tensor whole.

    Args:
        spec: The tensor.
        nbytes: Bytes that were written of it, over all ranks.
        path: Where it was written, for the error.

    Raises:
        IncompleteTensorError: They did not.
    """
    if nbytes != spec.nbytes:
        raise IncompleteTensorError(
            f"the ranks together wrote {nbytes} of {spec.nbytes} bytes",
            path=path,
            tensor=spec.name,
            hint="Two ranks describe the tensor's sharding differently; check their meshes and placements.",
        )
