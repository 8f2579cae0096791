"""The manifest: the record that makes a directory a checkpoint, with the digest of every byte in it.

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

Where parameters were shared, and so saved under one of their names, the record has version 2 and says which other names
the tensors had, behind the tensors::

    "aliases":[
    ["model","head.weight","embed.weight"],
    ...],

An alias is [component, further name, name under which the tensor is saved].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from shardwise.disk.crc import crc32c
from shardwise.disk.guarded import MANIFEST_NAME as MANIFEST_NAME  # noqa: PLC0414 - importers look for it here
from shardwise.disk.guarded import open_regular, read_whole, why_not_relative
from shardwise.disk.names import is_directory
from shardwise.errors import ManifestError
from shardwise.format import strict_json as strict
from shardwise.format.strict_json import Fail, JsonValue
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, tiles


class FailTensor(Protocol):
    """The callback for an error in a manifest."""

    def __call__(self, reason: str, /, tensor: str | None = None) -> NoReturn:
        """Raise an error that says why, and names the tensor where there is one."""


class ChunkRecord(NamedTuple):
    """A region of a tensor, in row-major order in one run of bytes of a tensor file of the same manifest."""

    file: str
    offset: int
    nbytes: int
    box: Box
    crc32c: int


class TensorRecord(NamedTuple):
    """A tensor of the checkpoint, by its component (``model``, ``optim``, ...), and the chunks that hold it."""

    component: str
    spec: TensorSpec
    #: CRC-32C of the whole tensor in row-major order, however it is spread over chunks; where it was computed.
    crc32c: int | None
    #: Regions that cover the tensor exactly once; those of a tensor without elements may be left out.
    chunks: tuple[ChunkRecord, ...]


class AliasRecord(NamedTuple):
    """A further name of a saved tensor: the model had one tensor under both, and its bytes are saved as ``kept``."""

    component: str
    name: str
    kept: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint, by its POSIX path relative to the checkpoint's directory."""

    path: str
    size: int
    #: CRC-32C of the first ``header_bytes`` bytes of a tensor file, of the whole content of any other.
    crc32c: int | None
    #: Bytes of a tensor file that no chunk covers, at its start; ``None`` for any other file.
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
    """Every file of a checkpoint but the manifest, every tensor in them, and further names of shared parameters.

    ``info`` has epoch, step, metrics, versions and the like, as JSON.
    """

    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    info: Mapping[str, JsonValue] = field(default_factory=dict)
    aliases: tuple[AliasRecord, ...] = ()


def check_manifest(manifest: Manifest, fail: FailTensor) -> None:
    """Check that a manifest does not contradict itself: names, shapes, places, and that chunks cover all bytes once."""
    files: dict[str, FileRecord] = {}
    for record in manifest.files:
        _check_file(record, fail)
        if record.path in files:
            fail(f"names the file {record.path!r} twice")
        files[record.path] = record
    runs: dict[str, list[tuple[int, int]]] = {path: [] for path in files}
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
        _check_tensor(tensor, files, fail)
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
    strict.as_count(record.size, f"the size of {record.path!r}", fail)
    if record.header_bytes is not None:
        strict.as_count(record.header_bytes, f"header_bytes of {record.path!r}", fail)
        if record.header_bytes > record.size:
            fail(f"gives {record.path!r} a header longer than the file")


def _check_shape(spec: TensorSpec, fail: FailTensor) -> None:
    if len(spec.shape) > strict.MAX_DIMS:
        fail(f"gives the tensor {len(spec.shape)} dimensions", spec.name)
    strict.as_counts(list(spec.shape), f"the shape of {spec.name!r}", fail)
    strict.check_magnitude(spec.shape, f"{spec.name!r}: the shape", fail)


def _check_aliases(aliases: Sequence[AliasRecord], tensors: Set[tuple[str, str]], fail: FailTensor) -> None:
    """Check further names against the tensors, each a component and a name; a DCP directory's are not in a manifest."""
    described = {component for component, _ in tensors} if aliases else set()
    seen: set[tuple[str, str]] = set()
    for component, name, kept in aliases:
        if not 0 < len(component) <= strict.MAX_NAME or max(len(name), len(kept)) > strict.MAX_NAME:
            fail(f"has an alias with an empty or overlong component or name, starting with {name[:80]!r}")
        if (component, name) in tensors or (component, name) in seen or name == kept:
            fail(f"has an alias of the component {component!r} that is the name of something else too", name)
        if component in described and (component, kept) not in tensors:
            fail(f"has an alias of a tensor that the component {component!r} lacks", kept)
        seen.add((component, name))


def _is_whole(box: Box, shape: tuple[int, ...]) -> bool:
    return box.sizes == shape and not any(box.offsets)


def _check_tensor(tensor: TensorRecord, files: Mapping[str, FileRecord], fail: FailTensor) -> None:
    spec = tensor.spec
    if len(spec.name) > strict.MAX_NAME or not 0 < len(tensor.component) <= strict.MAX_NAME:
        fail(f"has an empty or overlong component or name, starting with {spec.name[:80]!r}")
    if not _is_crc(tensor.crc32c) and tensor.crc32c is not None:
        fail("gives the tensor a crc32c that is not a 32-bit number", spec.name)
    for chunk in tensor.chunks:
        reason = _why_bad_chunk(chunk, spec, files)
        if reason is not None:
            fail(f"has a chunk of the tensor in {chunk.file[:200]!r} that {reason}", spec.name)
    if len(tensor.chunks) == 1 and _is_whole(tensor.chunks[0].box, spec.shape):
        return
    if not tiles(spec.shape, [chunk.box for chunk in tensor.chunks]):
        fail("has chunks that do not cover the tensor exactly once", spec.name)


def _why_bad_chunk(chunk: ChunkRecord, spec: TensorSpec, files: Mapping[str, FileRecord]) -> str | None:
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
    record = files.get(chunk.file)
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


#: Newest version of the record. A record is written in the oldest one that can say what there is to say.
MANIFEST_VERSION = 2

#: Largest manifest that is read, in bytes.
MAX_MANIFEST_BYTES = 2**30

_FORMAT = "shardwise-manifest"
_MAX_DEPTH = 32
_TAIL = b'"crc32c":"%08x"}\n'
_TAIL_BYTES = len(_TAIL % 0)
_TAIL_LINE = re.compile(rb'"crc32c":"[0-9a-f]{8}"}\n')
_HEAD = f'{{"format":"{_FORMAT}","version":'.encode()
_HEAD_LINE = 128
_HEX = re.compile("[0-9a-f]{8}")
_TOP_KEYS = {
    1: frozenset({"format", "version", "info", "files", "tensors", "crc32c"}),
    2: frozenset({"format", "version", "info", "files", "tensors", "aliases", "crc32c"}),
}
_FILE_KEYS = frozenset({"path", "size", "crc32c", "header_bytes"})
_TENSOR_KEYS = frozenset({"component", "name", "dtype", "shape", "crc32c", "chunks"})
_DAMAGED = "The manifest is damaged or forged: restore it from a copy, or resume from another checkpoint."


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest; `ManifestError` if it contradicts itself or could not be read back."""

    def fail(reason: str, tensor: str | None = None) -> NoReturn:
        what = f"a manifest cannot be written: it {reason}"
        raise ManifestError(what, tensor=tensor, hint="This is a bug: report it.")

    check_manifest(manifest, fail)
    strict.check_depth(manifest.info, _MAX_DEPTH, "has info that", fail)
    try:
        info = strict.dumps(dict(manifest.info))
        lines = [
            f'{{"format":"{_FORMAT}","version":{2 if manifest.aliases else 1},',
            f'"info":{info},',
            '"files":[',
            ",\n".join(_file_line(record) for record in manifest.files) + "],",
            '"tensors":[',
            ",\n".join(map(_tensor_line, manifest.tensors)) + "],",
        ]
        if manifest.aliases:
            lines += ['"aliases":[', ",\n".join(map(strict.dumps, manifest.aliases)) + "],"]
        body = "\n".join([*lines, ""]).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"a manifest cannot be written: {error}",
            hint="info takes finite numbers, text, lists and dicts with text keys.",
        ) from error
    if len(body) + _TAIL_BYTES > MAX_MANIFEST_BYTES:
        fail(f"would have more than {MAX_MANIFEST_BYTES} bytes")
    return body + _TAIL % crc32c(body)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest at ``path``, or of the checkpoint whose directory it is; raises as `parse_manifest`."""
    text = os.fspath(path)
    if is_directory(Path(text)):
        text = os.path.join(text, MANIFEST_NAME)
    return parse_manifest(read_whole(text, MAX_MANIFEST_BYTES, ManifestError), text)


def read_file_records(path: Path) -> tuple[FileRecord, ...]:
    """The files of the manifest at ``path``; its tensors, of which there are many more, are not read.

    A listing of many checkpoints takes a fraction of the time. The manifest's own digest is compared only where its
    lines are not those of `encode_manifest`; the sizes that it has may be believed for a look, not for a restore.
    """

    def fail(reason: str) -> NoReturn:
        raise ManifestError(f"the manifest {str(path)!r} {reason}", path=path, hint=_DAMAGED)

    with open_regular(path, ManifestError) as (stream, size):
        as_written = size <= MAX_MANIFEST_BYTES and stream.readline(_HEAD_LINE).startswith(_HEAD)
        if as_written and stream.readline().startswith(b'"info":'):
            lines = [stream.readline()]
            while lines[-1].startswith(b"{") or lines[-1] == b'"files":[\n':
                if lines[-1].endswith(b"}],\n"):
                    found = strict.as_object(strict.loads(b"{" + b"".join(lines)[:-2] + b"}", fail=fail), "it", fail)
                    stream.seek(max(0, size - _TAIL_BYTES))
                    if _TAIL_LINE.fullmatch(stream.read()) is None:
                        fail("is incomplete: its last line is absent")
                    return tuple([_parse_file(value, fail) for value in strict.as_array(found["files"], "files", fail)])
                lines.append(stream.readline())
    return read_manifest(path).files


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Validate a manifest that is already in memory, in time linear in its size (but for sorting chunks).

    Raises:
        ManifestError: Damaged, malformed, contradicting itself, pointing outside its directory, or of another version.
    """

    def fail(reason: str, tensor: str | None = None) -> NoReturn:
        raise ManifestError(f"the manifest {path!r} {reason}", path=path, tensor=tensor, hint=_DAMAGED)

    body = data[:-_TAIL_BYTES]
    if data[-_TAIL_BYTES:] != _TAIL % crc32c(body):
        fail("is damaged or incomplete: it does not match its own digest")
    table = strict.as_object(strict.loads(data, fail=fail), "it", fail)
    if table.get("format") != _FORMAT:
        fail(f"is not a {_FORMAT} record")
    version = strict.as_count(table.get("version"), "version", fail)
    if version not in _TOP_KEYS:
        raise ManifestError(
            f"the manifest {path!r} has version {version}; this shardwise reads versions up to {MANIFEST_VERSION}",
            path=path,
            hint="Use the release of shardwise that wrote the checkpoint, or a newer one.",
        )
    strict.exact_keys(table, _TOP_KEYS[version], "it", fail)
    strict.check_depth(table["info"], _MAX_DEPTH, "info", fail)
    manifest = Manifest(
        tuple([_parse_file(value, fail) for value in strict.as_array(table["files"], "files", fail)]),
        tuple([_parse_tensor(value, fail) for value in strict.as_array(table["tensors"], "tensors", fail)]),
        strict.as_object(table["info"], "info", fail),
        tuple([_parse_alias(value, fail) for value in strict.as_array(table.get("aliases", []), "aliases", fail)]),
    )
    check_manifest(manifest, fail)
    return manifest


def _file_line(record: FileRecord) -> str:
    crc = None if record.crc32c is None else f"{record.crc32c:08x}"
    return strict.dumps({"path": record.path, "size": record.size, "crc32c": crc, "header_bytes": record.header_bytes})


#: Shapes and offsets, which many tensors have in common.
_array = lru_cache(maxsize=65536)(strict.dumps)


def _tensor_line(record: TensorRecord) -> str:
    component, (name, shape, dtype), crc, chunks = record
    head = f'{{"component":{strict.quoted(component)},"name":{strict.quoted(name)},"dtype":{strict.quoted(dtype)},'
    digest = "null" if crc is None else f'"{crc:08x}"'
    places = ",".join(map(_chunk_text, chunks))
    return f'{head}"shape":{_array(shape)},"crc32c":{digest},"chunks":[{places}]}}'


def _chunk_text(chunk: ChunkRecord) -> str:
    file, offset, nbytes, (offsets, sizes), crc = chunk
    return f'[{strict.quoted(file)},{offset},{nbytes},{_array(offsets)},{_array(sizes)},"{crc:08x}"]'


def _parse_crc(value: JsonValue, fail: Fail) -> int:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        fail("has a crc32c that is not eight hexadecimal digits")
    return int(value, 16)


def _parse_file(value: JsonValue, fail: Fail) -> FileRecord:
    table = strict.as_object(value, "the record of a file", fail)
    strict.exact_keys(table, _FILE_KEYS, "the record of a file", fail)
    header = table["header_bytes"]
    return FileRecord(
        strict.as_text(table["path"], "path", fail),
        strict.as_count(table["size"], "size", fail),
        None if table["crc32c"] is None else _parse_crc(table["crc32c"], fail),
        None if header is None else strict.as_count(header, "header_bytes", fail),
    )


def _parse_tensor(value: JsonValue, fail: Fail) -> TensorRecord:
    table = strict.as_object(value, "the record of a tensor", fail)
    strict.exact_keys(table, _TENSOR_KEYS, "the record of a tensor", fail)
    dtype = strict.as_text(table["dtype"], "dtype", fail)
    if dtype not in DTYPE_BYTES:
        fail(f"has the unknown dtype {dtype[:40]!r}")
    spec = TensorSpec(
        strict.as_text(table["name"], "name", fail), strict.as_counts(table["shape"], "shape", fail), dtype
    )
    chunks = [_parse_chunk(chunk, fail) for chunk in strict.as_array(table["chunks"], "chunks", fail)]
    crc = None if table["crc32c"] is None else _parse_crc(table["crc32c"], fail)
    return TensorRecord(strict.as_text(table["component"], "component", fail), spec, crc, tuple(chunks))


def _parse_alias(value: JsonValue, fail: Fail) -> AliasRecord:
    row = strict.as_row(value, 3, "the record of an alias", fail)
    return AliasRecord(*(strict.as_text(field, "an alias", fail) for field in row))


def _parse_chunk(value: JsonValue, fail: Fail) -> ChunkRecord:
    row = strict.as_row(value, 6, "the record of a chunk", fail)
    return ChunkRecord(
        strict.as_text(row[0], "the file of a chunk", fail),
        strict.as_count(row[1], "the offset of a chunk", fail),
        strict.as_count(row[2], "the length of a chunk", fail),
        Box(
            strict.as_counts(row[3], "the offsets of a chunk", fail),
            strict.as_counts(row[4], "the sizes of a chunk", fail),
        ),
        _parse_crc(row[5], fail),
    )
