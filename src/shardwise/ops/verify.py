"""Verifies that a checkpoint is what was saved, and lists the differences by file and tensor.

Without a manifest each file is compared with what other files say about it: a safetensors file with its own header, its
shards with each other, an index with its files, a DCP directory's files with ``.metadata``, a ``.bin`` with the
directory at the end of its archive, and file names with each other (``-00001-of-00003``). Links to files are followed:
a hub cache consists of them. Bytes of tensors cannot be checked, since there are no digests.
"""

from __future__ import annotations

import os
import re
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, TypeAlias

from shardwise.disk.guarded import open_regular
from shardwise.disk.names import exists, is_directory, is_file, names_in, status
from shardwise.disk.storage import Storage, current, using
from shardwise.engine import verify as engine
from shardwise.engine.collector import without_collector
from shardwise.engine.verify import Damage, DamageKind, VerifyLevel
from shardwise.errors import (
    CheckpointNotFoundError,
    FormatError,
    ManifestError,
    MisuseError,
    ShardwiseError,
    StorageError,
    TensorError,
    UnsafePickleError,
    UnverifiableError,
)
from shardwise.format.header import read_header, saved_offsets
from shardwise.format.index import read_index
from shardwise.format.manifest import MANIFEST_NAME, FileRecord, Manifest
from shardwise.format.sniff import Kind, what_is_file
from shardwise.geometry import Box, covers_once
from shardwise.ops.targets import Target, find_targets, is_unfinished, nothing_in, with_nested

__all__ = ["Damage", "Progress", "VerifyReport", "verify"]

#: Called with the bytes read so far and the bytes to read in all; from any thread, one call at a time.
Progress = Callable[[int, int], None]

Status = Literal["whole", "damaged", "unverifiable"]

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


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The findings of a verification.

    Attributes:
        requested: The path as the caller gave it.
        path: What was verified: for a root, its newest checkpoint; for a part of a checkpoint, that part.
        level: ``sizes`` or ``digests``.
        verifiable: A manifest says what every byte must be. Without one, files are compared with what other files say
            about them, and their bytes are not checked.
        files: Number of files looked at.
        tensors: Number of tensors in them.
        bytes_read: Bytes whose digest was computed.
        seconds: How long it took.
        damages: What is wrong; paths relative to ``path`` (to its checkpoint, where ``path`` is a part of one).
        extra: Files that no save wrote and no load reads (notes, a README); not damage.
        undigested: Files of the manifest without a digest: only their size could be compared.
        checked: Without a manifest, what was compared with what.
        unchecked: Without a manifest, what could not be compared.
    """

    requested: Path
    path: Path
    level: VerifyLevel
    verifiable: bool
    files: int = 0
    tensors: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    damages: tuple[Damage, ...] = ()
    extra: tuple[str, ...] = ()
    undigested: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The verdict."""
        if self.damages:
            return "damaged"
        return "whole" if self.verifiable else "unverifiable"


def verify(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    digests: bool = True,
    storage: Storage | None = None,
) -> VerifyReport:
    """Verify a checkpoint, a part of one (``model``, ``optim``), or the newest checkpoint of a root.

    Args:
        path: Its directory. A component with a manifest of its own is judged by it.
        threads: Reads at once; the cores, at most 8, by default. Memory is 4 MiB for each.
        progress: Called with the bytes read and the bytes to read.
        digests: Read every byte; else manifest, kinds and sizes are compared.
        storage: Where it is; the mounted file systems by default.

    Raises:
        CheckpointNotFoundError: There is nothing to verify.
        IncompleteCheckpointError: The path is an interrupted save.
        StorageError: The path cannot be read.
        MisuseError: ``threads`` is below 1.

    Examples:
        >>> path = checkpointer.save(step=10, model=model)
        >>> verify(path).status
        'whole'
    """
    if threads is not None and threads < 1:
        raise MisuseError(f"threads is {threads}", hint="Use at least 1.")
    started = time.monotonic()
    level: VerifyLevel = "digests" if digests else "sizes"
    with using(storage or current()), without_collector():
        targets = with_nested(find_targets(path))
        job = _Job(level, threads or min(8, os.cpu_count() or 1), progress, {target.directory for target in targets})
        findings = [job.run(target) for target in targets]
    # Several directories have manifests of their own: components, or an export made later.
    top = Path(os.path.commonpath([target.directory for target in targets]))
    found = [(target.directory.relative_to(top), each) for target, each in zip(targets, findings, strict=True)]
    return VerifyReport(
        Path(path),
        top / targets[0].under if len(targets) == 1 else top,
        level,
        all(each.verifiable for each in findings),
        sum(each.files for each in findings),
        sum(each.tensors for each in findings),
        sum(each.bytes_read for each in findings),
        time.monotonic() - started,
        tuple(replace(each, file=(below / each.file).as_posix()) for below, own in found for each in own.damages),
        tuple((below / name).as_posix() for below, own in found for name in own.extra),
        tuple((below / name).as_posix() for below, own in found for name in own.undigested),
        tuple(dict.fromkeys(each for own in findings for each in own.checked)),
        tuple(dict.fromkeys(each for own in findings for each in own.unchecked)),
    )


@dataclass
class _Findings:
    """What was found of one directory; see `VerifyReport`."""

    verifiable: bool = False
    files: int = 0
    tensors: int = 0
    bytes_read: int = 0
    damages: list[Damage] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    undigested: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
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


@dataclass(frozen=True)
class _Job:
    level: VerifyLevel
    threads: int
    progress: Progress | None
    #: Directories with manifests of their own, which are not looked at as parts of the ones around them.
    apart: Set[Path]

    def run(self, target: Target) -> _Findings:
        try:
            manifest = engine.load_manifest(target.directory)
        except ManifestError as error:
            # Checks that need no manifest are made all the same.
            found = self._without_manifest(target)
            found.verifiable = True
            found.damages.insert(0, Damage(MANIFEST_NAME, "manifest", error.message))
            return found
        files = () if manifest is None else engine.files_below(manifest, (target.under,) if target.under else ())
        if manifest is None or (target.under and not files):  # a file that somebody put there
            return self._without_manifest(target)
        return self._with_manifest(target, manifest, files)

    def _with_manifest(self, target: Target, manifest: Manifest, files: Sequence[FileRecord]) -> _Findings:
        root, tensors = target.directory, engine.tensors_by_file(manifest)
        found = _Findings(True, len(files), damages=engine.check_files(root, files, tensors))
        found.tensors = len({(t.component, t.spec.name) for file in files for t in tensors.get(file.path, ())})
        found.undigested += [file.path for file in files if file.crc32c is None]
        known = {file.path for file in manifest.files} | {MANIFEST_NAME}
        for relative in _walk(root, target.under, found.damages, self.apart):
            if relative not in known and _is_read(relative):
                found.add(relative, "unexpected", "no save wrote this file, and a load would read it")
            elif relative not in known:
                found.extra.append(relative)
        if self.level == "digests":
            bad = {damage.file for damage in found.damages}
            extents = engine.extents_of(manifest, [file for file in files if file.path not in bad])
            counted = Counted(sum(extent.nbytes for extent in extents), self.progress)
            found.damages += engine.check_extents(root, extents, current(), threads=self.threads, advance=counted.add)
            found.bytes_read = counted.done
        found.damages.sort(key=lambda damage: (damage.file, damage.tensors))
        return found

    def _without_manifest(self, target: Target) -> _Findings:
        found = _Findings(unchecked=["digests: there is no manifest that has them"])
        single = is_file(target.directory / target.under)
        below = [target.under] if single else _walk(target.directory, target.under, found.damages)
        listed = [relative for relative in below if relative != MANIFEST_NAME and not is_unfinished(relative)]
        if not listed and not found.damages and not target.has_manifest:
            raise nothing_in(target.directory / target.under)
        found.files = len(listed)
        directories: dict[str, list[str]] = {}
        for relative in listed:
            directories.setdefault(PurePosixPath(relative).parent.as_posix(), []).append(relative)
        for directory, names in directories.items():
            before = len(found.damages)
            _check_directory(target.directory, names, found)
            others = any(PurePosixPath(name).suffix in TORCH_SUFFIXES for name in names)
            if others and not single and len(found.damages) == before:
                _check_layout(target.directory, directory, found)
        found.damages += absent_of_sets(target.directory, listed)
        if not found.checked:
            found.unchecked.append("no file of a format that says how long it is")
        return found


@dataclass
class Counted:
    """Adds up bytes that were read or written, and passes the sum on."""

    total: int
    progress: Progress | None
    done: int = 0

    def add(self, nbytes: int) -> None:
        """Count bytes; one call at a time."""
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)


def _walk(root: Path, under: str, damages: list[Damage], apart: Set[Path] = frozenset()) -> Iterator[str]:
    """Every entry below ``root/under`` that is not a directory, relative to ``root``; links are not followed."""
    if not is_directory(root / under, follows=False):
        return
    try:
        entries = current().entries(root / under)
    except StorageError as error:
        damages.append(Damage(under, "unreadable", error.message))
        return
    for name, kind in sorted(entries, key=lambda entry: (entry.kind == "directory", entry.name)):
        relative = (PurePosixPath(under) / name).as_posix()
        if kind != "directory":
            yield relative
        elif root / relative not in apart:
            yield from _walk(root, relative, damages, apart)


def _is_read(relative: str) -> bool:
    """Whether a load takes in a file of this name though no manifest lists it: tensor files are found by listing."""
    path = PurePosixPath(relative)
    if is_unfinished(relative):
        return False
    top = path.parts[0] if len(path.parts) > 1 else ""
    if path.name.endswith((".safetensors", ".safetensors.index.json", ".distcp")) or path.name == ".metadata":
        return top in ("model", "model_ema", "optim", "rng", "extra", "consolidated", "")
    return top in ("optim", "rng", "extra") and path.suffix == ".json"


# --- without a manifest ----------------------------------------------------------------------------------------------


def _check_directory(root: Path, names: Sequence[str], found: _Findings) -> None:
    """Compare the files of one directory with what others there say of them."""
    pieces: dict[str, list[tuple[Box, str]]] = {}
    whole: set[str] = set()
    described = any(PurePosixPath(name).name == ".metadata" for name in names)
    for relative in names:
        path = PurePosixPath(relative)
        if path.suffix == ".safetensors":
            try:
                header = read_header(root / relative)
                offsets = saved_offsets(header)
            except ShardwiseError as error:
                found.add_error(relative, error)
                continue
            found.count("safetensors files: headers, and sizes against them")
            for spec, _, _ in header.entries:
                if offsets is None:
                    whole.add(spec.name)
                else:
                    pieces.setdefault(spec.name, []).append((Box(offsets[spec.name], spec.shape), relative))
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
        found.damages += check_index(root, relative)
    found.count("weight indices", len(indices))
    found.tensors += len(whole | pieces.keys())
    _check_pieces(pieces, bool(indices), found)


def _check_pieces(pieces: dict[str, list[tuple[Box, str]]], indexed: bool, found: _Findings) -> None:
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


def check_index(root: Path, relative: str) -> Iterator[Damage]:
    """Compare a weight index with the files that it names; of ``.bin`` files their existence alone."""
    directory = (root / relative).parent
    try:
        weight_map = read_index(root / relative).weight_map
    except ShardwiseError as error:
        yield Damage(relative, "absent" if isinstance(error, CheckpointNotFoundError) else "index", error.message)
        return
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        by_file.setdefault(file, []).append(tensor)
    other = ".safetensors" if ".bin." in relative else ".bin"
    if not any(is_file(directory / file) for file in by_file) and any(
        name.endswith(other) for name in names_in(directory)
    ):
        return  # a download that left one of two forms out brings the index of both
    for file, tensors in by_file.items():
        if not is_file(directory / file):
            yield Damage(relative, "index", f"{file}, which it names, is absent", "model", tuple(tensors))
        elif file.endswith(".safetensors"):
            try:
                held = frozenset(read_header(directory / file).names)
            except ShardwiseError:
                held = frozenset()  # its own check says what is wrong with it
            lost = tuple(tensor for tensor in tensors if tensor not in held)
            if lost:
                yield Damage(relative, "index", f"{file} does not hold what the index says", "model", lost)


def _check_dcp(root: Path, relative: str, names: Sequence[str], found: _Findings) -> None:
    from shardwise.sources.dcp_values import check_dcp_extents

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


def _check_torch(root: Path, relative: str, found: _Findings) -> None:
    kind, message = check_torch_file(root / relative) or (None, None)
    if kind is not None and message is not None:
        found.add(relative, kind, message)
    elif message is not None:
        found.unchecked.append(f"{relative}: {message}")
    else:
        found.count("torch archives: the directory at the end, and every entry's extent")


def _check_layout(root: Path, directory: str, found: _Findings) -> None:
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
    name, kind = ("of no known format", None) if what is None else (what.name, what.kind)
    if kind is Kind.POINTER or (kind is not Kind.TORCH and WEIGHTS.fullmatch(path.name)):
        return "header", f"the file is {name}; weights of torch were expected"
    return None, name  # a file of torch before 1.6 does not say how long it is


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
