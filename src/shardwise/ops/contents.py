"""Checks a directory without a manifest: compares each file with what other files say about it.

A safetensors file is compared with its own header, its shards with each other, an index with its files, a DCP
directory's files with ``.metadata``, a ``.bin`` with the directory at the end of its archive, and file names with each
other (``-00001-of-00003``). Links to files are followed: a hub cache consists of them. Bytes of tensors cannot be
checked, since there are no digests.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias

from shardwise.disk.guarded import open_regular
from shardwise.disk.names import exists, is_file, names_in, status
from shardwise.engine.verify import Damage, DamageKind
from shardwise.errors import (
    CheckpointNotFoundError,
    FormatError,
    MisuseError,
    ShardwiseError,
    TensorError,
    UnsafePickleError,
    UnverifiableError,
)
from shardwise.format.header import read_header, saved_offsets
from shardwise.format.index import read_index
from shardwise.format.sniff import Kind, what_is_file
from shardwise.geometry import Box, covers_once

#: Names of files of ``torch.save``.
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: Names under which libraries look for a model's weights, and nothing else stands.
WEIGHTS = re.compile(r"(pytorch_model|diffusion_pytorch_model|adapter_model|model)([-.].*)?\.(bin|pt|pth|ckpt)")
_ZIP = b"PK\x03\x04"
_LOCAL_BYTES = 30
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\.safetensors|\.bin)")
_SHARD = re.compile(r"shard-\d{5,}-(?P<stem>.+)")
_MOST_NUMBERED = 100_000
#: Where a base model's split is recorded, shards of some of its files may rightly not exist.
_SPLIT_NOTE = ".hf_metadata/fqn_to_file_index_mapping.json"


@dataclass
class Contents:
    """Results of the checks; see `VerifyReport`.

    Attributes:
        tensors: Number of tensors, pieces of one counted once.
        names: Safetensors file -> its tensors; none of a file that cannot be read.
    """

    files: int = 0
    tensors: int = 0
    damages: list[Damage] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    names: dict[str, frozenset[str]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    @property
    def checked(self) -> tuple[str, ...]:
        """What was compared, one phrase for each kind of file."""
        return tuple(f"{count} {what}" for what, count in self._counts.items())

    def count(self, what: str, number: int = 1) -> None:
        """Note that so much of a kind was compared."""
        if number:
            self._counts[what] += number

    def add(self, file: str, kind: DamageKind, message: str, tensors: Sequence[str] = ()) -> None:
        """Add a damage."""
        self.damages.append(Damage(file, kind, message, "model" if tensors else None, tuple(tensors)))

    def add_error(self, file: str, error: ShardwiseError, kind: DamageKind = "header") -> None:
        """Add a damage that a reader has found."""
        if isinstance(error, CheckpointNotFoundError):
            kind = "absent"
        self.add(file, kind, error.message, () if error.tensor is None else (error.tensor,))


def check_contents(root: Path, listed: Sequence[str], *, alone: bool = False) -> Contents:
    """Compare what is in listed files with what others say of them; ``alone``: one was named, and no directory."""
    found = Contents(files=len(listed))
    below: dict[str, list[str]] = {}
    for relative in listed:
        below.setdefault(PurePosixPath(relative).parent.as_posix(), []).append(relative)
    for directory, names in below.items():
        before = len(found.damages)
        _check_directory(root, directory, names, found)
        others = any(PurePosixPath(name).suffix in TORCH_SUFFIXES for name in names)
        if others and not alone and len(found.damages) == before:
            _check_layout(root, directory, found)
    found.damages += absent_of_sets(root, listed)
    if not found.checked:
        found.unchecked.append("no file of a format that says how long it is")
    return found


def _check_directory(root: Path, directory: str, names: Sequence[str], found: Contents) -> None:
    pieces: dict[str, list[tuple[Box, str]]] = {}
    whole: set[str] = set()
    described = any(PurePosixPath(name).name == ".metadata" for name in names)
    for relative in names:
        path = PurePosixPath(relative)
        if path.suffix == ".safetensors":
            _check_safetensors(root, relative, pieces, whole, found)
        elif path.name == ".metadata":
            _check_dcp(root, relative, names, found)
        elif path.suffix == ".distcp" and not described:
            message = f"the file is absent, and without it {path.name} and its like cannot be read"
            found.add((path.parent / ".metadata").as_posix(), "absent", message)
            described = True  # said once
        elif path.suffix in TORCH_SUFFIXES:
            _check_torch(root, relative, found)
    indices = [name for name in names if name.endswith(INDEX_SUFFIXES)]
    for relative in indices:
        found.damages += check_index(root, relative, found.names)
    found.count("weight indices", len(indices))
    found.tensors += len(whole | pieces.keys())
    _check_pieces(pieces, bool(indices), found)


def _check_safetensors(
    root: Path, relative: str, pieces: dict[str, list[tuple[Box, str]]], whole: set[str], found: Contents
) -> None:
    found.names[relative] = frozenset()
    try:
        header = read_header(root / relative)
        offsets = saved_offsets(header)
    except ShardwiseError as error:
        found.add_error(relative, error)
        return
    found.count("safetensors files: headers, and sizes against them")
    found.names[relative] = frozenset(header.names)
    if offsets is None:
        whole.update(header.names)
        return
    for entry in header.entries:
        box = Box(offsets[entry.spec.name], entry.spec.shape)
        pieces.setdefault(entry.spec.name, []).append((box, relative))


def _check_pieces(pieces: dict[str, list[tuple[Box, str]]], indexed: bool, found: Contents) -> None:
    """Compare the pieces of each tensor with each other; its full size is unknown unless an index lists one file."""
    lost: dict[str, list[str]] = {}
    for name, held in pieces.items():
        boxes = list({box: None for box, _ in held})
        if len({len(box.sizes) for box in boxes}) > 1:
            found.add(held[0][1], "header", "files disagree about this tensor's dimensions", (name,))
            continue
        shape = tuple(max(ends) for ends in zip(*(box.ends for box in boxes), strict=True))
        if not covers_once(shape, boxes):
            lost.setdefault(held[0][1], []).append(name)
    for file, names in lost.items():
        message = "the pieces in this file and those beside it do not make up the tensor: a file is absent"
        found.add(file, "incomplete", message, names)
    found.count("tensors in pieces: whether these fit together", len(pieces))
    if pieces and not indexed:
        found.unchecked.append(
            f"whether pieces are missing at the end of {'a tensor' if len(pieces) == 1 else f'{len(pieces)} tensors'}: "
            "no file says how large they were"
        )


def absent_of_sets(root: Path, listed: Sequence[str]) -> Iterator[Damage]:
    """Absent files whose existence follows from the names of others (``-00001-of-00003``)."""
    sets: dict[tuple[PurePosixPath, str, str, int], set[int]] = {}
    for relative in listed:
        path = PurePosixPath(relative)
        name = _NUMBERED.fullmatch(path.name)
        if name is None:
            continue
        shard = _SHARD.fullmatch(name["stem"])
        if shard is not None and exists(root / path.parent / _SPLIT_NOTE):
            continue
        stem = name["stem"] if shard is None else f"shard-*-{shard['stem']}"
        sets.setdefault((path.parent, stem, name["suffix"], int(name["count"])), set()).add(int(name["number"]))
    for (directory, stem, suffix, count), numbers in sets.items():
        missing = [] if count > _MOST_NUMBERED else sorted(set(range(1, count + 1)) - numbers)
        if missing:
            file = (directory / f"{stem}-{missing[0]:05d}-of-{count:05d}{suffix}").as_posix()
            more = f", and so are {len(missing) - 1} more" if len(missing) > 1 else ""
            yield Damage(file, "absent", f"the names of the files beside it say that it exists; it is absent{more}")


def check_index(root: Path, relative: str, names: Mapping[str, Collection[str]]) -> Iterator[Damage]:
    """Compare a weight index with the files that it names; of ``.bin`` files their existence alone.

    ``names`` has those of the tensors in a file, relative to ``root``, where they are known already.
    """
    directory = PurePosixPath(relative).parent
    try:
        weight_map = read_index(root / relative).weight_map
    except ShardwiseError as error:
        yield Damage(relative, "absent" if isinstance(error, CheckpointNotFoundError) else "index", error.message)
        return
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        by_file.setdefault(file, []).append(tensor)
    other = ".safetensors" if ".bin." in relative else ".bin"
    if not any(is_file(root / directory / file) for file in by_file) and any(
        name.endswith(other) for name in names_in(root / directory)
    ):
        return  # a download that left one of two forms out brings the index of both
    for file, tensors in by_file.items():
        place = (directory / file).as_posix()
        if not is_file(root / place):
            yield Damage(relative, "index", f"{file}, which it names, is absent", "model", tuple(tensors))
        elif place.endswith(".safetensors"):
            held = names[place] if place in names else _names_in(root / place)
            lost = tuple(tensor for tensor in tensors if tensor not in held)
            if lost:
                yield Damage(relative, "index", f"{file} does not hold what the index says", "model", lost)


def _names_in(path: Path) -> frozenset[str]:
    try:
        return frozenset(read_header(path).names)
    except ShardwiseError:
        return frozenset()  # its own check says what is wrong with it


def _check_dcp(root: Path, relative: str, names: Sequence[str], found: Contents) -> None:
    from shardwise.sources.dcp_extents import check_dcp_extents

    try:
        extents = check_dcp_extents((root / relative).parent)
    except (CheckpointNotFoundError, FormatError) as error:
        found.add_error(relative, error)
        return
    directory = PurePosixPath(relative).parent
    found.tensors += extents.tensors
    for wrong in extents.wrong:
        found.add((directory / (wrong.file or ".metadata")).as_posix(), wrong.kind, wrong.message, wrong.tensors)
    found.count("DCP directories: .metadata, and where each item lies in the .distcp files")
    found.count("items of .distcp files: extent, first and last bytes", extents.items)
    known = {(directory / file).as_posix() for file in extents.files}
    found.extra += [name for name in names if name.endswith(".distcp") and name not in known]


def _check_torch(root: Path, relative: str, found: Contents) -> None:
    kind, message = check_torch_file(root / relative) or (None, None)
    if kind is not None and message is not None:
        found.add(relative, kind, message)
    elif message is not None:
        what = what_is_file(root / relative)
        found.unchecked.append(f"{relative}: {message if what is None else what.name}")
    else:
        found.count("torch archives: the directory at the end, and every entry's extent")


def _check_layout(root: Path, directory: str, found: Contents) -> None:
    """Check that the files of another tool in a directory make up a model: all ranks', and all of each tensor."""
    from shardwise.sources.others.recognise import recognise  # imports torch

    place = root / directory
    try:
        layout = recognise(place)
        if layout is None or layout.dcp is not None or layout.directory != place:
            return
        opened = layout.open()
    except (MisuseError, UnsafePickleError, UnverifiableError) as error:
        found.unchecked.append(f"{directory}: {error.message}")
        return
    except (CheckpointNotFoundError, FormatError, TensorError) as error:
        file = Path(error.path or place)
        relative = file.relative_to(root).as_posix() if file.is_relative_to(root) else directory
        found.add_error(relative, error, "incomplete" if isinstance(error, TensorError) else "header")
        return
    found.tensors += len(opened.source.tensors)
    for number, what in opened.checked:
        found.count(what, number)
    found.unchecked += opened.unchecked


# --- files of torch.save ---------------------------------------------------------------------------------------------


#: Kind of damage and what it is; no kind, and why the file could not be checked; or neither.
Outcome: TypeAlias = tuple[DamageKind | None, str] | None


def check_torch_file(path: Path) -> Outcome:
    """Compare a file with its archive's directory, which ``torch.save`` writes last. Imports no torch."""
    info = status(path)
    if info is None:
        return "absent", "the file is absent"
    if info.kind != "file":
        return "kind", "not a regular file"
    try:
        with open_regular(path, FormatError) as (stream, _):
            if stream.read(4) != _ZIP:
                return _no_archive(path)
            with zipfile.ZipFile(stream) as archive:
                return _check_entries(archive, stream)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, ValueError, NotImplementedError) as error:
        end = f"the archive's directory, with which such a file ends, is absent or damaged ({error}): it was cut short"
        return "size", end
    except ShardwiseError as error:
        return "unreadable", error.message


def _no_archive(path: Path) -> Outcome:
    what = what_is_file(path)
    if what is not None and what.kind is Kind.TORCH:
        return None, "of torch before 1.6, which does not say how long it is"
    if WEIGHTS.fullmatch(path.name) or (what is not None and what.kind is Kind.POINTER):
        name = "of no known format" if what is None else what.name
        return "header", f"the file is {name}; weights of torch were expected"
    return None, "of no known format"


def _check_entries(archive: zipfile.ZipFile, stream: BinaryIO) -> Outcome:
    end = archive.start_dir
    position = 0
    for entry in sorted(archive.infolist(), key=lambda each: each.header_offset):
        stream.seek(entry.header_offset)
        local = stream.read(_LOCAL_BYTES)
        if entry.header_offset < position or len(local) < _LOCAL_BYTES or local[:4] != _ZIP:
            return "header", f"no entry begins where the archive's directory puts {entry.filename}"
        name, extra = struct.unpack("<HH", local[26:30])
        position = entry.header_offset + _LOCAL_BYTES + name + extra + entry.compress_size
        if position > end:
            return "size", f"{entry.filename} reaches beyond the archive's content"
    return None
