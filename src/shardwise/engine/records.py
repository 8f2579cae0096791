"""What a stage of a save reports to the next: which files and tensors a component consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from shardwise.errors import IncompleteTensorError
from shardwise.format.manifest import AliasRecord, ChunkRecord, FileRecord, TensorRecord
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import TensorSpec
from shardwise.plan.collector import collector_paused

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
