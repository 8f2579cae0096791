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
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from shardwise.disk.crc import crc32c
from shardwise.disk.guarded import MANIFEST_NAME, open_regular, read_whole, resolve_inside
from shardwise.disk.names import is_directory
from shardwise.errors import ManifestError
from shardwise.format.manifest_records import (
    AliasRecord,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    check_manifest,
)
from shardwise.format.strict_json import (
    Fail,
    JsonValue,
    as_array,
    as_count,
    as_counts,
    as_object,
    as_row,
    as_text,
    check_depth,
    dumps,
    exact_keys,
    loads,
    quoted,
)
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec

__all__ = [
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "AliasRecord",
    "ChunkRecord",
    "FileRecord",
    "Manifest",
    "TensorRecord",
    "encode_manifest",
    "parse_manifest",
    "read_file_records",
    "read_manifest",
    "resolve_inside",
]

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
    """Return the bytes of a manifest.

    Raises:
        ManifestError: The manifest contradicts itself or could not be read back.
    """

    def fail(reason: str, tensor: str | None = None) -> NoReturn:
        raise ManifestError(
            f"a manifest cannot be written: it {reason}", tensor=tensor, hint="This is a bug: report it."
        )

    check_manifest(manifest, fail)
    check_depth(manifest.info, _MAX_DEPTH, "has info that", fail)
    try:
        info = dumps(dict(manifest.info))
        lines = [
            f'{{"format":"{_FORMAT}","version":{2 if manifest.aliases else 1},',
            f'"info":{info},',
            '"files":[',
            ",\n".join(_file_line(record) for record in manifest.files) + "],",
            '"tensors":[',
            ",\n".join(map(_tensor_line, manifest.tensors)) + "],",
        ]
        if manifest.aliases:
            lines += ['"aliases":[', ",\n".join(map(dumps, manifest.aliases)) + "],"]
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
    """Read and validate the manifest at ``path``, or of the checkpoint whose directory is ``path``.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        StorageError: The file system refused.
        ManifestError: Not a regular file, too large, damaged, malformed, or of another version.
    """
    text = os.fspath(path)
    if is_directory(Path(text)):
        text = os.path.join(text, MANIFEST_NAME)
    return parse_manifest(read_whole(text, MAX_MANIFEST_BYTES, ManifestError), text)


def read_file_records(path: Path) -> tuple[FileRecord, ...]:
    """The files of the manifest at ``path``; its tensors, of which there are many more, are not read.

    A listing of many checkpoints takes a fraction of the time. The manifest's own digest is compared only where its
    lines are not those of `encode_manifest`; the sizes that it has may be believed for a look, not for a restore.

    Raises:
        As `read_manifest`.
    """

    def fail(reason: str) -> NoReturn:
        raise ManifestError(f"the manifest {str(path)!r} {reason}", path=path, hint=_DAMAGED)

    with open_regular(path, ManifestError) as (stream, size):
        as_written = size <= MAX_MANIFEST_BYTES and stream.readline(_HEAD_LINE).startswith(_HEAD)
        if as_written and stream.readline().startswith(b'"info":'):
            lines = [stream.readline()]
            while lines[-1].startswith(b"{") or lines[-1] == b'"files":[\n':
                if lines[-1].endswith(b"}],\n"):
                    found = as_object(loads(b"{" + b"".join(lines)[:-2] + b"}", fail=fail), "it", fail)
                    stream.seek(max(0, size - _TAIL_BYTES))
                    if _TAIL_LINE.fullmatch(stream.read()) is None:
                        fail("is incomplete: its last line is absent")
                    return tuple([_parse_file(value, fail) for value in as_array(found["files"], "files", fail)])
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
    table = as_object(loads(data, fail=fail), "it", fail)
    if table.get("format") != _FORMAT:
        fail(f"is not a {_FORMAT} record")
    version = as_count(table.get("version"), "version", fail)
    if version not in _TOP_KEYS:
        raise ManifestError(
            f"the manifest {path!r} has version {version}; this shardwise reads versions up to {MANIFEST_VERSION}",
            path=path,
            hint="Use the release of shardwise that wrote the checkpoint, or a newer one.",
        )
    exact_keys(table, _TOP_KEYS[version], "it", fail)
    check_depth(table["info"], _MAX_DEPTH, "info", fail)
    manifest = Manifest(
        tuple([_parse_file(value, fail) for value in as_array(table["files"], "files", fail)]),
        tuple([_parse_tensor(value, fail) for value in as_array(table["tensors"], "tensors", fail)]),
        as_object(table["info"], "info", fail),
        tuple([_parse_alias(value, fail) for value in as_array(table.get("aliases", []), "aliases", fail)]),
    )
    check_manifest(manifest, fail)
    return manifest


def _file_line(record: FileRecord) -> str:
    crc = None if record.crc32c is None else f"{record.crc32c:08x}"
    return dumps({"path": record.path, "size": record.size, "crc32c": crc, "header_bytes": record.header_bytes})


#: Shapes and offsets, which many tensors have in common.
_array = lru_cache(maxsize=65536)(dumps)


def _tensor_line(record: TensorRecord) -> str:
    component, (name, shape, dtype), crc, chunks = record
    head = f'{{"component":{quoted(component)},"name":{quoted(name)},"dtype":{quoted(dtype)},'
    digest = "null" if crc is None else f'"{crc:08x}"'
    places = ",".join(map(_chunk_text, chunks))
    return f'{head}"shape":{_array(shape)},"crc32c":{digest},"chunks":[{places}]}}'


def _chunk_text(chunk: ChunkRecord) -> str:
    file, offset, nbytes, (offsets, sizes), crc = chunk
    return f'[{quoted(file)},{offset},{nbytes},{_array(offsets)},{_array(sizes)},"{crc:08x}"]'


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


def _parse_alias(value: JsonValue, fail: Fail) -> AliasRecord:
    row = as_row(value, 3, "the record of an alias", fail)
    return AliasRecord(*(as_text(field, "an alias", fail) for field in row))


def _parse_chunk(value: JsonValue, fail: Fail) -> ChunkRecord:
    row = as_row(value, 6, "the record of a chunk", fail)
    return ChunkRecord(
        as_text(row[0], "the file of a chunk", fail),
        as_count(row[1], "the offset of a chunk", fail),
        as_count(row[2], "the length of a chunk", fail),
        Box(as_counts(row[3], "the offsets of a chunk", fail), as_counts(row[4], "the sizes of a chunk", fail)),
        _parse_crc(row[5], fail),
    )
