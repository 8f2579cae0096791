"""Compares a directory with its manifest: kinds and sizes of files, then the digest of every byte.

Nothing here needs torch, so that the command line answers at once; offline verification shares it with restoring, where
all ranks share the work and all of them learn of what is wrong (`check_checkpoint`). A link is never followed out of
the directory, a pipe or a device is never read, and memory is one buffer per thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from shardwise.disk.crc import combine, crc32c
from shardwise.disk.guarded import is_followed, is_made_of_links, read_whole, resolve_inside
from shardwise.disk.names import is_link, real_path, status
from shardwise.disk.sequential import opened
from shardwise.disk.storage import Storage
from shardwise.errors import (
    CheckpointNotFoundError,
    FormatError,
    IntegrityError,
    ManifestError,
    MisuseError,
    ShardwiseError,
    StorageError,
    some,
)
from shardwise.format.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    TensorRecord,
    parse_manifest,
)
from shardwise.timing import phase

if TYPE_CHECKING:
    from shardwise.comm import Group

_LOG = logging.getLogger(__name__)

#: What is compared: kinds and sizes of files, or also the digest of every byte.
VerifyLevel = Literal["sizes", "digests"]

#: ``absent``: no such file. ``kind``: not a regular file, or behind a link. ``size``: shorter or longer. ``header``:
#: the header of a tensor file. ``digest``: a tensor's bytes, or any other file's. ``unreadable``: the device failed.
#: ``manifest``: the manifest itself. ``unexpected``: no save wrote it, and a load would read it. ``index``: a weight
#: index that does not describe its directory, ``incomplete``: pieces that do not make up their tensor (both looked at
#: only where there is no manifest).
DamageKind = Literal[
    "absent", "kind", "size", "header", "digest", "unreadable", "manifest", "unexpected", "index", "incomplete"
]

#: Bytes that one thread takes up at a time, and the buffer through which it reads them.
_TASK_BYTES = 32 * 2**20
_BUFFER_BYTES = 4 * 2**20

#: Called with the size of every run of bytes that was read.
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        file: The file, relative to the checkpoint's directory (POSIX).
        message: What is wrong, without the names.
        component: What the tensors belong to (``model``, ``optim``); ``None`` where there are none.
        tensors: Names of the damaged tensors. Empty for a header or a file without tensors.
    """

    file: str
    kind: DamageKind
    message: str
    component: str | None = None
    tensors: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: the file, its tensors, what is wrong."""
        shown = some(self.tensors, 4)
        what = f" ({'tensor' if len(self.tensors) == 1 else 'tensors'} {shown} of {self.component})" if shown else ""
        file = "" if self.file == "." else f"{self.file}{what}: "  # the directory itself, which is named beside
        return f"{file}{self.message}"


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes with a digest: a chunk of a tensor, the header of a tensor file, or a whole other file."""

    file: str
    offset: int
    nbytes: int
    crc32c: int
    kind: Literal["header", "digest"]
    component: str | None = None
    tensor: str | None = None

    def damage(self, kind: DamageKind, message: str) -> Damage:
        """This extent, damaged."""
        return Damage(self.file, kind, message, self.component, () if self.tensor is None else (self.tensor,))


class _Run(NamedTuple):
    """Part of an extent; ``extent`` is its number."""

    extent: int
    start: int
    nbytes: int


def load_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory, or ``None`` where there is none.

    Raises `ManifestError`: it is damaged, forged, not a regular file, or of another version.
    """
    try:
        return parse_manifest(manifest_bytes(directory), str(directory / MANIFEST_NAME))
    except CheckpointNotFoundError:
        return None


def manifest_bytes(directory: Path) -> bytes:
    """The bytes of a directory's manifest.

    Raises:
        CheckpointNotFoundError: There is none.
        ManifestError: Something else stands in its place.
    """
    path = directory / MANIFEST_NAME
    if is_link(path) and not is_made_of_links(directory):
        raise ManifestError(
            "a link stands in the manifest's place", path=path, hint="Replace the link by the file, if you trust it."
        )
    return read_whole(path, MAX_MANIFEST_BYTES, ManifestError)


def files_below(manifest: Manifest, prefixes: Collection[str] = ()) -> tuple[FileRecord, ...]:
    """The files whose path is, or is below, one of ``prefixes``; all where there are none."""
    if not prefixes:
        return manifest.files
    heads = tuple(f"{prefix}/" for prefix in prefixes)
    return tuple(file for file in manifest.files if file.path in prefixes or file.path.startswith(heads))


def tensors_by_file(manifest: Manifest) -> dict[str, list[TensorRecord]]:
    """The tensors that have a chunk in each file."""
    found: dict[str, list[TensorRecord]] = {}
    for tensor in manifest.tensors:
        for file in dict.fromkeys([chunk.file for chunk in tensor.chunks]):
            found.setdefault(file, []).append(tensor)
    return found


def check_files(
    directory: Path, files: Iterable[FileRecord], tensors: Mapping[str, Sequence[TensorRecord]]
) -> list[Damage]:
    """Compare existence, kind and size of files with their records. Nothing is opened.

    Where the manifest is a link, or a link leads into the store of a tool that keeps content by its digest (git-annex,
    a hub cache), what the link leads to is the file. Any other link is one that no save wrote.

    ``tensors`` has those of each file, to name what a short file lacks. Raises `StorageError`: the file system refused
    for another reason than that a file is absent.
    """
    links = is_made_of_links(directory)
    looks = (_check_file(directory, record, tensors.get(record.path, ()), links) for record in files)
    return list(chain.from_iterable(looks))


def _check_file(directory: Path, record: FileRecord, tensors: Sequence[TensorRecord], links: bool) -> list[Damage]:
    path = directory / record.path
    try:
        if is_link(path) and is_followed(path, links):
            parent = PurePosixPath(record.path).parent.as_posix()
            above = real_path(directory) if parent == "." else resolve_inside(directory, parent)
            place = above / path.name
            info = status(path)
        else:
            place = resolve_inside(directory, record.path)
            info = status(path, follows=False)
    except FormatError as error:
        return _concerned(record, tensors, "kind", error.message, 0)
    except StorageError as error:
        return _concerned(record, tensors, "unreadable", error.message, 0)
    if info is None:
        return _concerned(record, tensors, "absent", "the file is absent", 0)
    if info.kind != "file" or place != real_path(directory) / record.path:
        kind = "a link" if info.kind in ("file", "symbolic link") else "something else"
        return _concerned(record, tensors, "kind", f"{kind} stands where a regular file was written", 0)
    if info.size < record.size:
        message = f"the file has {info.size} of {record.size} bytes: it was cut short"
        return _concerned(record, tensors, "size", message, info.size)
    if info.size > record.size:
        return [Damage(record.path, "size", f"the file has {info.size} bytes where {record.size} were written")]
    return []


def _concerned(
    record: FileRecord, tensors: Sequence[TensorRecord], kind: DamageKind, message: str, size: int
) -> list[Damage]:
    """One damage for each component with a chunk that ends beyond ``size``; at least one."""
    lost: dict[str, list[str]] = {}
    for tensor in tensors:
        if any(
            chunk.nbytes and chunk.file == record.path and chunk.offset + chunk.nbytes > size for chunk in tensor.chunks
        ):
            lost.setdefault(tensor.component, []).append(tensor.spec.name)
    if not lost:
        return [Damage(record.path, kind, message)]
    return [Damage(record.path, kind, message, component, tuple(names)) for component, names in lost.items()]


def extents_of(manifest: Manifest, files: Iterable[FileRecord]) -> tuple[Extent, ...]:
    """Every run of bytes of ``files`` that has a digest, in file order."""
    wanted = {file.path: file for file in files}
    found = []
    for file in wanted.values():
        if file.crc32c is not None and file.header_bytes is not None:
            found.append(Extent(file.path, 0, file.header_bytes, file.crc32c, "header"))
        elif file.crc32c is not None:
            found.append(Extent(file.path, 0, file.size, file.crc32c, "digest"))
    for tensor in manifest.tensors:
        name = tensor.spec.name
        found += [
            Extent(chunk.file, chunk.offset, chunk.nbytes, chunk.crc32c, "digest", tensor.component, name)
            for chunk in tensor.chunks
            if chunk.file in wanted and chunk.nbytes
        ]
    return tuple(sorted(found, key=lambda extent: (extent.file, extent.offset)))


def check_extents(
    directory: Path, extents: Sequence[Extent], storage: Storage, *, threads: int = 1, advance: Advance | None = None
) -> list[Damage]:
    """Read runs of bytes and compare their digests. Files must have passed `check_files`.

    Each thread has one buffer of at most 4 MiB; ``advance`` is called with the size of every run that was read, in
    order.
    """
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="shardwise-verify") as pool:
        tasks = list(_tasks(extents))
        results = pool.map(lambda task: _read_task(directory, extents, task, storage), tasks)
        return _judge(extents, tasks, results, advance)


def _tasks(extents: Sequence[Extent]) -> Iterator[list[_Run]]:
    """Runs of one file each, of about the same size; a large extent is cut, small ones stay together."""
    task: list[_Run] = []
    room = _TASK_BYTES
    for number, extent in enumerate(extents):
        start = 0
        while start < extent.nbytes or (start == 0 and extent.nbytes == 0):
            if task and (room == 0 or extents[task[-1].extent].file != extent.file):
                yield task
                task, room = [], _TASK_BYTES
            nbytes = min(room, extent.nbytes - start)
            task.append(_Run(number, start, nbytes))
            room -= nbytes
            start += max(nbytes, 1)
    if task:
        yield task


def _read_task(
    directory: Path, extents: Sequence[Extent], task: Sequence[_Run], storage: Storage
) -> list[int | ShardwiseError]:
    """For each run of one task its digest, or what kept it from being read."""
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(run.nbytes for run in task))))
    try:
        with opened(storage, directory / extents[task[0].extent].file) as handle:
            places = ((extents[run.extent].offset + run.start, run.nbytes) for run in task)
            return [_read_run(handle, offset, nbytes, storage, buffer) for offset, nbytes in places]
    except ShardwiseError as error:
        return [error] * len(task)


def _read_run(handle: int, offset: int, nbytes: int, storage: Storage, buffer: memoryview) -> int | ShardwiseError:
    crc, done = 0, 0
    while done < nbytes:
        part = buffer[: min(len(buffer), nbytes - done)]
        try:
            got = storage.read(handle, part, offset + done)
        except ShardwiseError as error:
            return error
        crc = crc32c(part[:got], crc)
        done += got
        if got < len(part):
            return IntegrityError(f"the file ends {nbytes - done} bytes before the end of this run of bytes")
    return crc


def _judge(
    extents: Sequence[Extent],
    tasks: Sequence[list[_Run]],
    results: Iterable[list[int | ShardwiseError]],
    advance: Advance | None,
) -> list[Damage]:
    crcs: dict[int, int] = {}
    failures: dict[int, ShardwiseError] = {}
    for task, result in zip(tasks, results, strict=True):
        for run, crc in zip(task, result, strict=True):
            if isinstance(crc, ShardwiseError):
                failures[run.extent] = crc
                continue
            crcs[run.extent] = combine(crcs.get(run.extent, 0), crc, run.nbytes) if run.start else crc
            if advance is not None:
                advance(run.nbytes)
    found = []
    for number, extent in enumerate(extents):
        if number in failures:
            found.append(extent.damage("unreadable", failures[number].message))
        elif crcs[number] != extent.crc32c:
            what = "the header" if extent.kind == "header" else "its bytes" if extent.tensor else "the content"
            message = f"{what} changed since the save (CRC-32C {crcs[number]:08x} instead of {extent.crc32c:08x})"
            found.append(extent.damage(extent.kind, message))
    return found


@phase("verify")
def check_checkpoint(
    path: Path,
    level: VerifyLevel,
    group: Group,
    storage: Storage,
    *,
    components: Collection[str] = (),
    threads: int = 1,
) -> bool:
    """Check that a checkpoint is what was saved, before anything is read from it. All ranks of the group call.

    The work is shared: every rank looks at some of the files, and reads about the same number of bytes.
    ``components`` are the directories that are to be restored (``model``, ``optim``); all where empty.

    Returns:
        Whether the checkpoint could be checked: one without a manifest (another tool's) is let through, with a warning.

    Raises:
        IntegrityError: Something differs, on any rank; the same error on every rank, naming file and tensor.
        ManifestError: The manifest is damaged.
        MisuseError: There is no such level.
    """
    data = b""
    with group.together(f"reading the manifest of {path}"):
        if level not in ("sizes", "digests"):
            raise MisuseError(f"verify is {level!r}", hint="Use 'sizes' or 'digests'.")
        if group.is_main:
            try:
                data = manifest_bytes(path)
            except CheckpointNotFoundError:
                _LOG.warning("%s has no %s: it cannot be verified and is restored as it is", path, MANIFEST_NAME)
    data = group.broadcast_bytes(data, 0, f"sharing the manifest of {path}")
    if not data:
        return False
    with group.together(f"verifying {path}"):
        manifest = parse_manifest(data, str(path / MANIFEST_NAME))
        files = files_below(manifest, components)
        own = [file for number, file in enumerate(files) if number % group.world_size == group.rank]
        _raise(path, check_files(path, own, tensors_by_file(manifest)))
    if level == "digests":
        with group.together(f"verifying the digests of {path}"):
            extents = _share(extents_of(manifest, files), group.rank, group.world_size)
            _raise(path, check_extents(path, extents, storage, threads=threads))
    return True


def _share(extents: Sequence[Extent], rank: int, world_size: int) -> list[Extent]:
    """A rank's part: consecutive extents of about the same number of bytes as everyone else's."""
    total = sum(extent.nbytes + 1 for extent in extents)
    own, position = [], 0
    for extent in extents:
        if position * world_size // max(total, 1) == rank:
            own.append(extent)
        position += extent.nbytes + 1
    return own


def _raise(path: Path, damages: Sequence[Damage]) -> None:
    if not damages:
        return
    first = damages[0]
    more = f"; {len(damages) - 1} more are damaged" if len(damages) > 1 else ""
    raise IntegrityError(
        f"the checkpoint is damaged: {first.describe()}{more}",
        path=path / first.file,
        tensor=first.tensors[0] if first.tensors else None,
        hint="`shardwise verify` lists everything; restore the file from a copy, or resume from another checkpoint.",
    )
