"""What a stage of a save reports to the next: which files and tensors a component consists of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardwise.format.manifest import FileRecord, TensorRecord


@dataclass(frozen=True)
class ComponentRecord:
    """Files and tensors of one component (``model``, ``optim``), paths relative to the component's directory."""

    files: tuple[FileRecord, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()

    def below(self, prefix: str) -> ComponentRecord:
        """The same, with every path put below ``prefix``."""
        if not prefix:
            return self
        return ComponentRecord(
            tuple(replace(file, path=f"{prefix}/{file.path}") for file in self.files),
            tuple(
                replace(
                    tensor,
                    chunks=tuple(replace(chunk, file=f"{prefix}/{chunk.file}") for chunk in tensor.chunks),
                )
                for tensor in self.tensors
            ),
        )

    def __add__(self, other: ComponentRecord) -> ComponentRecord:
        return ComponentRecord(self.files + other.files, self.tensors + other.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)
