"""The records of a manifest, and the check that they are sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, NoReturn, Protocol

from shardwise.disk.crc import crc32c
from shardwise.disk.guarded import why_not_relative
from shardwise.errors import ManifestError
from shardwise.format.strict_json import MAX_DIMS, MAX_NAME, Fail, JsonValue, as_count, as_counts, check_magnitude
from shardwise.geometry import Box, TensorSpec, tiles


class FailTensor(Protocol):
    """The callback for an error in a manifest."""

    def __call__(self, reason: str, /, tensor: str | None = None) -> NoReturn:
        """Raise an error that says why, and names the tensor where there is one."""
        ...


class ChunkRecord(NamedTuple):
    """A region of a tensor that lies in one run of bytes.

    Attributes:
        file: Path of a tensor file of the same manifest.
        offset: Where the run starts in that file, in bytes.
        nbytes: Length of the run.
        box: The region, whose elements the run holds in row-major order.
        crc32c: CRC-32C of the run.
    """

    file: str
    offset: int
    nbytes: int
    box: Box
    crc32c: int


class TensorRecord(NamedTuple):
    """A tensor of the checkpoint and the chunks that hold it.

    Attributes:
        component: What it belongs to: ``model``, ``optim``, ...
        spec: Name in the file, global shape, dtype.
        crc32c: CRC-32C of the whole tensor in row-major order, however it is spread over chunks; where it was computed.
        chunks: Regions that cover the tensor exactly once; those of a tensor without elements may be left out.
    """

    component: str
    spec: TensorSpec
    crc32c: int | None
    chunks: tuple[ChunkRecord, ...]


class AliasRecord(NamedTuple):
    """A further name of a saved tensor: the model had one tensor under both, and its bytes are saved under one.

    Attributes:
        component: What the tensor belongs to.
        name: The name under which nothing is saved.
        kept: The name under which the tensor is.
    """

    component: str
    name: str
    kept: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint, by its POSIX path relative to the checkpoint's directory.

    Attributes:
        size: Bytes of the file.
        crc32c: CRC-32C of the first ``header_bytes`` bytes of a tensor file, of the whole content of any other.
        header_bytes: Bytes of a tensor file that no chunk covers, at its start; ``None`` for any other file.
    """

    path: str
    size: int
    crc32c: int | None
    header_bytes: int | None

    @staticmethod
    def plain(path: str, content: bytes) -> FileRecord:
        """The record of a file that is no tensor file."""
        return FileRecord(path, len(content), crc32c(content), None)

    @staticmethod
    def of_tensors(path: str, size: int, header: bytes) -> FileRecord:
        """The record of a tensor file."""
        return FileRecord(path, size, crc32c(header), len(header))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files and tensors of a checkpoint.

    Attributes:
        files: Every file but the manifest.
        tensors: Every tensor in the tensor files.
        info: Epoch, step, metrics, versions and the like, as JSON; read-only.
        aliases: Further names of tensors, where parameters are shared.
    """

    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    info: Mapping[str, JsonValue] = field(default_factory=dict)
    aliases: tuple[AliasRecord, ...] = ()
    _by_path: Mapping[str, FileRecord] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", MappingProxyType(dict(self.info)))
        object.__setattr__(self, "_by_path", {record.path: record for record in self.files})

    def file(self, path: str) -> FileRecord:
        """Return the record of the file at ``path`` (relative, POSIX).

        Raises:
            ManifestError: The manifest has no such file.
        """
        found = self._by_path.get(path)
        if found is None:
            raise ManifestError(f"the manifest has no file {path!r}", hint="Pass a path that stands in the manifest.")
        return found


def check_manifest(manifest: Manifest, fail: FailTensor) -> None:
    """Check that a manifest does not contradict itself: names, shapes, places, and that chunks cover all bytes once."""
    runs: dict[str, list[tuple[int, int]]] = {}
    for record in manifest.files:
        _check_file(record, fail)
        if record.path in runs:
            fail(f"names the file {record.path!r} twice")
        runs[record.path] = []
    seen: set[tuple[str, str]] = set()
    shapes: set[tuple[int, ...]] = set()  # those that are known to be sound: models have few
    for tensor in manifest.tensors:
        key = (tensor.component, tensor.spec.name)
        if key in seen:
            fail(f"names the tensor twice in the component {tensor.component!r}", tensor.spec.name)
        seen.add(key)
        if tensor.spec.shape not in shapes:
            _check_shape(tensor.spec, fail)
            shapes.add(tensor.spec.shape)
        _check_tensor(tensor, manifest, fail)
        for chunk in tensor.chunks:
            if chunk.nbytes:
                runs[chunk.file].append((chunk.offset, chunk.offset + chunk.nbytes))
    _check_aliases(manifest.aliases, seen, fail)
    for record in manifest.files:
        if record.header_bytes is not None:
            _check_covered(record, record.header_bytes, runs[record.path], fail)


def _check_file(record: FileRecord, fail: Fail) -> None:
    reason = why_not_relative(record.path)
    if reason is not None:
        fail(f"names the file {record.path[:200]!r}, which {reason}")
    if record.crc32c is not None and not _is_crc(record.crc32c):
        fail(f"gives the file {record.path!r} a crc32c that is not a 32-bit number")
    as_count(record.size, f"the size of {record.path!r}", fail)
    if record.header_bytes is not None:
        as_count(record.header_bytes, f"header_bytes of {record.path!r}", fail)
        if record.header_bytes > record.size:
            fail(f"gives {record.path!r} a header longer than the file")


def _check_shape(spec: TensorSpec, fail: FailTensor) -> None:
    if len(spec.shape) > MAX_DIMS:
        fail(f"gives the tensor {len(spec.shape)} dimensions", spec.name)
    as_counts(list(spec.shape), f"the shape of {spec.name!r}", fail)
    check_magnitude(spec.shape, f"{spec.name!r}: the shape", fail)


def _check_aliases(aliases: Sequence[AliasRecord], tensors: Set[tuple[str, str]], fail: FailTensor) -> None:
    """Check further names against the tensors, each a component and a name; a DCP directory's are not in a manifest."""
    described = {component for component, _ in tensors} if aliases else set()
    seen: set[tuple[str, str]] = set()
    for component, name, kept in aliases:
        if not 0 < len(component) <= MAX_NAME or max(len(name), len(kept)) > MAX_NAME:
            fail(f"has an alias with an empty or overlong component or name, starting with {name[:80]!r}")
        if (component, name) in tensors or (component, name) in seen or name == kept:
            fail(f"has an alias of the component {component!r} that is the name of something else too", name)
        if component in described and (component, kept) not in tensors:
            fail(f"has an alias of a tensor that the component {component!r} lacks", kept)
        seen.add((component, name))


def _is_whole(box: Box, shape: tuple[int, ...]) -> bool:
    return box.sizes == shape and not any(box.offsets)


def _check_tensor(tensor: TensorRecord, manifest: Manifest, fail: FailTensor) -> None:
    spec = tensor.spec
    if len(spec.name) > MAX_NAME or not 0 < len(tensor.component) <= MAX_NAME:
        fail(f"has an empty or overlong component or name, starting with {spec.name[:80]!r}")
    if not _is_crc(tensor.crc32c) and tensor.crc32c is not None:
        fail("gives the tensor a crc32c that is not a 32-bit number", spec.name)
    for chunk in tensor.chunks:
        reason = _why_bad_chunk(chunk, spec, manifest)
        if reason is not None:
            fail(f"has a chunk of the tensor in {chunk.file[:200]!r} that {reason}", spec.name)
    if len(tensor.chunks) == 1 and _is_whole(tensor.chunks[0].box, spec.shape):
        return
    if not tiles(spec.shape, [chunk.box for chunk in tensor.chunks]):
        fail("has chunks that do not cover the tensor exactly once", spec.name)


def _why_bad_chunk(chunk: ChunkRecord, spec: TensorSpec, manifest: Manifest) -> str | None:
    box, shape = chunk.box, spec.shape
    if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
        return f"has another number of dimensions than the tensor's {len(shape)}"
    if not _is_whole(box, shape) and any(
        o < 0 or s < 0 or o + s > n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)
    ):
        return f"reaches outside the shape {list(shape)}"
    if box.numel * spec.itemsize != chunk.nbytes:
        return f"takes {chunk.nbytes} bytes for {box.numel} elements of {spec.dtype}"
    if not _is_crc(chunk.crc32c):
        return "has a crc32c that is not a 32-bit number"
    record = manifest._by_path.get(chunk.file)
    if record is None or record.header_bytes is None:
        return "is not a tensor file of this manifest"
    if chunk.offset < record.header_bytes or chunk.offset + chunk.nbytes > record.size:
        return f"lies at bytes {chunk.offset} to {chunk.offset + chunk.nbytes}, outside the file's data"
    return None


def _is_crc(value: int | None) -> bool:
    return type(value) is int and 0 <= value <= 0xFFFFFFFF


def _check_covered(record: FileRecord, position: int, runs: list[tuple[int, int]], fail: Fail) -> None:
    runs.sort()
    for begin, end in runs:
        if begin != position:
            what = "overlapping chunks" if begin < position else "bytes that no chunk covers"
            fail(f"describes {record.path!r} with {what} at byte {min(begin, position)}")
        position = end
    if position != record.size:
        fail(f"leaves the last {record.size - position} bytes of {record.path!r} uncovered")
