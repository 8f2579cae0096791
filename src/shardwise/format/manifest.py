"""The manifest: the record that makes a directory a checkpoint, and says what every byte in it must be.

One JSON object with one record per line, so that ``grep`` and ``diff`` work on it::

    {"format":"shardwise-manifest","version":1,
    "info":{...},
    "files":[
    {"path":"model/model-00001-of-00002.safetensors","size":1104,"crc32c":"1f00d34d","header_bytes":80},
    ...],
    "tensors":[
    {"component":"model","name":"w","dtype":"F32","shape":[16,16],"crc32c":"8a9136aa","chunks":[
     ["model/model-00001-of-00002.safetensors",80,1024,[0,0],[16,16],"8a9136aa"]]},
    ...],
    "crc32c":"6a09e667"}

A chunk is [file, offset, bytes, offsets in the tensor, sizes, CRC-32C] and stands on the line of its tensor. The last
line holds the CRC-32C of everything before it, so that no flipped bit in the manifest goes unnoticed. A tensor file is
described by the digest of its header and by those of the chunks, which together cover each of its bytes once; any other
file by the digest of its whole content.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, NoReturn, Protocol

from shardwise.errors import ManifestError
from shardwise.format.crc import crc32c
from shardwise.format.files import read_whole, resolve_inside, why_not_relative
from shardwise.format.strict_json import (
    MAX_DIMS,
    MAX_NAME,
    Fail,
    JsonValue,
    as_array,
    as_count,
    as_counts,
    as_object,
    as_text,
    check_depth,
    check_magnitude,
    dumps,
    exact_keys,
    loads,
    quoted,
)
from shardwise.format.tiling import tiles
from shardwise.types import DTYPE_BYTES, Box, TensorSpec

__all__ = [
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "ChunkRecord",
    "FileRecord",
    "Manifest",
    "TensorRecord",
    "encode_manifest",
    "parse_manifest",
    "read_manifest",
    "resolve_inside",
]

#: Name of the manifest in a checkpoint's directory.
MANIFEST_NAME = "manifest.json"

#: Version of the record that this module writes, and the only one that it reads.
MANIFEST_VERSION = 1

#: Largest manifest that is read, in bytes.
MAX_MANIFEST_BYTES = 2**30

_FORMAT = "shardwise-manifest"
_MAX_DEPTH = 32
_TAIL = b'"crc32c":"%08x"}\n'
_TAIL_BYTES = len(_TAIL % 0)
_HEX = re.compile("[0-9a-f]{8}")
_TOP_KEYS = frozenset({"format", "version", "info", "files", "tensors", "crc32c"})
_FILE_KEYS = frozenset({"path", "size", "crc32c", "header_bytes"})
_TENSOR_KEYS = frozenset({"component", "name", "dtype", "shape", "crc32c", "chunks"})
_DAMAGED = "The manifest is damaged or forged: restore it from a copy, or resume from another checkpoint."


class _FailTensor(Protocol):
    def __call__(self, reason: str, /, tensor: str | None = None) -> NoReturn: ...


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


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint.

    Attributes:
        path: POSIX path relative to the checkpoint's directory.
        size: Bytes of the file.
        crc32c: CRC-32C of the first ``header_bytes`` bytes of a tensor file, of the whole content of any other.
        header_bytes: Bytes of a tensor file that no chunk covers, at its start; ``None`` for any other file.
    """

    path: str
    size: int
    crc32c: int | None
    header_bytes: int | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        files: Every file but the manifest.
        tensors: Every tensor in the tensor files.
        info: What else there is to know (epoch, step, metrics, versions), as JSON; read-only.
    """

    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    info: Mapping[str, JsonValue] = field(default_factory=dict)
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

    def tensors_of(self, component: str) -> tuple[TensorRecord, ...]:
        """Return the tensors of one component, in the manifest's order; none where it has no such component."""
        return tuple(record for record in self.tensors if record.component == component)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest.

    Raises:
        ManifestError: The manifest contradicts itself or could not be read back.
    """

    def fail(reason: str, tensor: str | None = None) -> NoReturn:
        raise ManifestError(
            f"a manifest cannot be written: it {reason}", tensor=tensor, hint="This is a bug: report it."
        )

    _check(manifest, fail)
    check_depth(manifest.info, _MAX_DEPTH, "has info that", fail)
    try:
        info = dumps(dict(manifest.info))
        lines = [
            f'{{"format":"{_FORMAT}","version":{MANIFEST_VERSION},',
            f'"info":{info},',
            '"files":[',
            ",\n".join(_file_line(record) for record in manifest.files) + "],",
            '"tensors":[',
            ",\n".join(map(_TensorLines().line, manifest.tensors)) + "],\n",
        ]
        body = "\n".join(lines).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"a manifest cannot be written: {error}",
            hint="info takes finite numbers, text, lists and dicts with text keys.",
        ) from error
    if len(body) + _TAIL_BYTES > MAX_MANIFEST_BYTES:
        fail(f"would have more than {MAX_MANIFEST_BYTES} bytes")
    return body + _TAIL % crc32c(body)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and validate the manifest at ``path``, or of the checkpoint whose directory is ``path``.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        StorageError: The file system refused.
        ManifestError: Not a regular file, too large, damaged, malformed, or of another version.
    """
    text = os.fspath(path)
    if "\0" not in text and os.path.isdir(text):
        text = os.path.join(text, MANIFEST_NAME)
    return parse_manifest(read_whole(text, MAX_MANIFEST_BYTES, ManifestError), text)


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Validate a manifest that is already in memory, in time linear in its size (but for sorting chunks).

    Args:
        data: The whole file.
        path: The file, for errors.

    Raises:
        ManifestError: Damaged, malformed, contradicting itself, pointing outside its directory, or of another version.
    """

    def fail(reason: str, tensor: str | None = None) -> NoReturn:
        raise ManifestError(f"the manifest {path!r} {reason}", path=path, tensor=tensor, hint=_DAMAGED)

    body = data[:-_TAIL_BYTES]
    if data[-_TAIL_BYTES:] != _TAIL % crc32c(body):
        fail("is damaged or incomplete: it does not match its own digest")
    table = as_object(loads(data, fail=fail), "it", fail)
    if table.get("format") != _FORMAT:
        fail(f"is not a {_FORMAT} record")
    version = as_count(table.get("version"), "version", fail)
    if version != MANIFEST_VERSION:
        raise ManifestError(
            f"the manifest {path!r} has version {version}; this shardwise reads version {MANIFEST_VERSION}",
            path=path,
            hint="Use the release of shardwise that wrote the checkpoint, or a newer one.",
        )
    exact_keys(table, _TOP_KEYS, "it", fail)
    check_depth(table["info"], _MAX_DEPTH, "info", fail)
    manifest = Manifest(
        tuple([_parse_file(value, fail) for value in as_array(table["files"], "files", fail)]),
        tuple([_parse_tensor(value, fail) for value in as_array(table["tensors"], "tensors", fail)]),
        as_object(table["info"], "info", fail),
    )
    _check(manifest, fail)
    return manifest


def _hex(crc: int | None) -> str | None:
    return None if crc is None else f"{crc:08x}"


def _file_line(record: FileRecord) -> str:
    return dumps(
        {
            "path": record.path,
            "size": record.size,
            "crc32c": _hex(record.crc32c),
            "header_bytes": record.header_bytes,
        }
    )


class _TensorLines:
    """Writes the lines of tensors; shapes and offsets, which many have in common, are put into words once."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], str] = {}

    def line(self, record: TensorRecord) -> str:
        """The line of one tensor."""
        component, (name, shape, dtype), crc, chunks = record
        return (
            f'{{"component":{quoted(component)},"name":{quoted(name)},"dtype":{quoted(dtype)},'
            f'"shape":{self._array(shape)},"crc32c":{_digits(crc)},'
            f'"chunks":[{",".join([self._chunk(chunk) for chunk in chunks])}]}}'
        )

    def _chunk(self, chunk: ChunkRecord) -> str:
        file, offset, nbytes, (offsets, sizes), crc = chunk
        region = f"{self._array(offsets)},{self._array(sizes)}"
        return f"[{quoted(file)},{offset},{nbytes},{region},{_digits(crc)}]"

    def _array(self, counts: tuple[int, ...]) -> str:
        text = self._counts.get(counts)
        if text is None:
            text = self._counts[counts] = dumps(counts)
        return text


def _digits(crc: int | None) -> str:
    return "null" if crc is None else f'"{crc:08x}"'


def _parse_crc(value: JsonValue, fail: Fail) -> int:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        fail("has a crc32c that is not eight hexadecimal digits")
    return int(value, 16)


def _parse_file(value: JsonValue, fail: Fail) -> FileRecord:
    table = as_object(value, "the record of a file", fail)
    exact_keys(table, _FILE_KEYS, "the record of a file", fail)
    header = table["header_bytes"]
    return FileRecord(
        as_text(table["path"], "path", fail),
        as_count(table["size"], "size", fail),
        None if table["crc32c"] is None else _parse_crc(table["crc32c"], fail),
        None if header is None else as_count(header, "header_bytes", fail),
    )


def _parse_tensor(value: JsonValue, fail: Fail) -> TensorRecord:
    table = as_object(value, "the record of a tensor", fail)
    exact_keys(table, _TENSOR_KEYS, "the record of a tensor", fail)
    dtype = as_text(table["dtype"], "dtype", fail)
    if dtype not in DTYPE_BYTES:
        fail(f"has the unknown dtype {dtype[:40]!r}")
    spec = TensorSpec(as_text(table["name"], "name", fail), as_counts(table["shape"], "shape", fail), dtype)
    chunks = [_parse_chunk(chunk, fail) for chunk in as_array(table["chunks"], "chunks", fail)]
    crc = None if table["crc32c"] is None else _parse_crc(table["crc32c"], fail)
    return TensorRecord(as_text(table["component"], "component", fail), spec, crc, tuple(chunks))


def _parse_chunk(value: JsonValue, fail: Fail) -> ChunkRecord:
    row = as_array(value, "the record of a chunk", fail)
    if len(row) != 6:
        fail(f"has the record of a chunk with {len(row)} fields where six belong")
    return ChunkRecord(
        as_text(row[0], "the file of a chunk", fail),
        as_count(row[1], "the offset of a chunk", fail),
        as_count(row[2], "the length of a chunk", fail),
        Box(as_counts(row[3], "the offsets of a chunk", fail), as_counts(row[4], "the sizes of a chunk", fail)),
        _parse_crc(row[5], fail),
    )


def _check(manifest: Manifest, fail: _FailTensor) -> None:
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
    for record in manifest.files:
        if record.header_bytes is not None:
            _check_covered(record, record.header_bytes, runs[record.path], fail)


def _check_file(record: FileRecord, fail: Fail) -> None:
    reason = why_not_relative(record.path)
    if reason is not None:
        fail(f"names the file {record.path[:200]!r}, which {reason}")
    if not _is_crc(record.crc32c) and record.crc32c is not None:
        fail(f"gives the file {record.path!r} a crc32c that is not a 32-bit number")
    as_count(record.size, f"the size of {record.path!r}", fail)
    if record.header_bytes is not None:
        as_count(record.header_bytes, f"header_bytes of {record.path!r}", fail)
        if record.header_bytes > record.size:
            fail(f"gives {record.path!r} a header longer than the file")


def _check_shape(spec: TensorSpec, fail: _FailTensor) -> None:
    if len(spec.shape) > MAX_DIMS:
        fail(f"gives the tensor {len(spec.shape)} dimensions", spec.name)
    as_counts(list(spec.shape), f"the shape of {spec.name!r}", fail)
    check_magnitude(spec.shape, f"{spec.name!r}: the shape", fail)


def _is_whole(box: Box, shape: tuple[int, ...]) -> bool:
    return box.sizes == shape and not any(box.offsets)


def _check_tensor(tensor: TensorRecord, manifest: Manifest, fail: _FailTensor) -> None:
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
