"""Where every byte of an export lies. A pure function of tensor specs and the base model's file map.

The same function serves the writer, the offline tools and the tests: no rank, no memory and no file system enters it,
so every rank computes the same layout by itself, and a checkpoint written by eight ranks has the bytes of one written
by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from shardwise.errors import MisuseError, NameCollisionError
from shardwise.format.header import TensorEntry, arrange, encode_header
from shardwise.format.index import encode_index
from shardwise.geometry import TensorSpec

#: An inode is locked while it is written, so ranks that share one file take turns. Models above this size are split
#: into several files even where one would do, and each rank starts in another file.
SPLIT_ABOVE_BYTES = 512 * 2**20
SMALLEST_SPLIT_BYTES = 256 * 2**20
SPLIT_WAYS = 8
#: The largest file, where nothing else is asked for.
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class FileLayout:
    """One file of the export: its name, the bytes before the data, and the tensors in file order."""

    name: str
    header: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + (self.entries[-1].end if self.entries else 0)


class Place(NamedTuple):
    """Where a tensor's bytes lie: ``file`` is an index into `Layout.files`, ``offset`` counts from the file's start."""

    file: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """All files of an export."""

    files: tuple[FileLayout, ...]

    @cached_property
    def places(self) -> dict[str, Place]:
        """Place of each tensor, by name."""
        return {
            spec.name: Place(number, len(file.header) + begin)
            for number, file in enumerate(self.files)
            for spec, begin, _ in file.entries
        }

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name to file name, as the index has it."""
        return {entry.spec.name: file.name for file in self.files for entry in file.entries}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors (the index's ``total_size``)."""
        return sum(entry.spec.nbytes for file in self.files for entry in file.entries)

    @cached_property
    def index(self) -> bytes:
        """The weight index of these files."""
        return encode_index(self.weight_map, self.tensor_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def lay_out(
    specs: Iterable[TensorSpec],
    *,
    base_files: Mapping[str, str] | None = None,
    max_file_bytes: int | None = MAX_FILE_BYTES,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Assign every tensor, given in the model's order, a file and an offset.

    Args:
        specs: All tensors.
        base_files: File of each tensor in the base model; its split and names are kept, and tensors that it does not
            know go to its last file. Without it, files are filled in order up to a limit.
        max_file_bytes: Largest data size of a file without a base; a larger tensor has a file of its own. ``None`` puts
            everything into one file.
        stem: What file names start with.
        metadata: ``__metadata__`` of every file; ``{"format": "pt"}`` if not given.

    Raises:
        NameCollisionError: Two tensors have the same name.
        MisuseError: ``max_file_bytes`` is not positive.
    """
    ordered = list(specs)
    if max_file_bytes is not None and max_file_bytes <= 0:
        raise MisuseError(f"max_file_bytes is {max_file_bytes}; it must be positive")
    seen = {spec.name for spec in ordered}
    if len(seen) != len(ordered):
        [(twice, _)] = Counter([spec.name for spec in ordered]).most_common(1)
        raise NameCollisionError("two tensors have this name", tensor=twice, hint="Rename one of them.")
    known = {name: file for name, file in (base_files or {}).items() if name in seen}
    groups = (
        _split_as_base(ordered, known, base_files or {}) if known else _split_by_size(ordered, max_file_bytes, stem)
    )
    info = {"format": "pt"} if metadata is None else dict(metadata)
    files = []
    for name, members in groups.items():
        entries = arrange(members)
        files.append(FileLayout(name, encode_header(entries, info), entries))
    return Layout(tuple(files))


def _split_as_base(
    specs: Sequence[TensorSpec], known: Mapping[str, str], base_files: Mapping[str, str]
) -> dict[str, list[TensorSpec]]:
    last = max(base_files.values())
    groups: dict[str, list[TensorSpec]] = {name: [] for name in sorted(set(base_files.values()))}
    for spec in specs:
        groups[known.get(spec.name, last)].append(spec)
    return {name: members for name, members in groups.items() if members}


def file_limit(total_bytes: int, max_file_bytes: int) -> int:
    """Largest data size of a file when ``total_bytes`` are split without a base model to follow."""
    if total_bytes <= SPLIT_ABOVE_BYTES:
        return max_file_bytes
    return min(max_file_bytes, max(SMALLEST_SPLIT_BYTES, -(-total_bytes // SPLIT_WAYS)))


def _split_by_size(specs: Sequence[TensorSpec], max_file_bytes: int | None, stem: str) -> dict[str, list[TensorSpec]]:
    if max_file_bytes is None:
        return {f"{stem}.safetensors": list(specs)}
    sizes = [spec.nbytes for spec in specs]
    limit = file_limit(sum(sizes), max_file_bytes)
    bins: list[list[TensorSpec]] = []
    used = 0
    for spec, nbytes in zip(specs, sizes, strict=True):
        if not bins or (used and used + nbytes > limit):
            bins.append([])
            used = 0
        bins[-1].append(spec)
        used += nbytes
    if len(bins) <= 1:
        return {f"{stem}.safetensors": bins[0] if bins else []}
    return {f"{stem}-{i:05d}-of-{len(bins):05d}.safetensors": members for i, members in enumerate(bins, start=1)}


def index_name(stem: str = "model") -> str:
    """Name of the weight index beside files of this stem."""
    return f"{stem}.safetensors.index.json"


def shard_name(shard: int, file: int, files: int, stem: str = "model") -> str:
    """Name of a shard file, as torch's Hugging Face writer names them; all numbers count from 1."""
    return f"shard-{shard:05d}-{stem}-{file:05d}-of-{files:05d}.safetensors"


def is_tensor_file(name: str, stem: str = "model") -> bool:
    """Whether a save under ``stem`` may have given a file this name: whole, one of several, or a shard."""
    numbered, stem = r"-\d{5,}-of-\d{5,}", re.escape(stem)
    return bool(re.fullmatch(rf"({stem}({numbered})?|shard-\d{{5,}}-{stem}{numbered})\.safetensors", name))
