"""Files that somebody made to do harm, or that a disk spoilt: each is one typed error, soon, in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.format.builders import entry, manifest_text, sample_manifest, sign, tensor_file

from shardwise.disk.guarded import resolve_inside
from shardwise.disk.storage import LocalStorage
from shardwise.errors import (
    CheckpointNotFoundError,
    FormatError,
    HeaderError,
    ManifestError,
    ShardwiseError,
    UnsafePickleError,
    WeightIndexError,
)
from shardwise.format.dcp_metadata import parse_dcp_metadata
from shardwise.format.header import MAX_HEADER_BYTES, parse_header, read_header
from shardwise.format.index import MAX_INDEX_BYTES, parse_index, read_index
from shardwise.format.manifest import encode_manifest, parse_manifest, read_manifest
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.reads import PackedRead, SourceChunk
from shardwise.sources.reader import Reader

BIG = 2**63


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length only": struct.pack("<Q", 16),
    "length of petabytes": struct.pack("<Q", 2**60) + b"{}",
    "length 2**64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length over the limit": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
    "length one too long": struct.pack("<Q", 3) + b"{}",
    "length zero": struct.pack("<Q", 0),
    "length cuts the text": struct.pack("<Q", 5) + b'{"w":{}}',
    "not JSON": tensor_file(b"{hello}"),
    "nothing but NULs": tensor_file(bytes(64)),
    "array": tensor_file([]),
    "string": tensor_file("w"),
    "null": tensor_file(None),
    "number": tensor_file(1),
    "leading space": tensor_file(b" {}"),
    "byte order mark": tensor_file(b"\xef\xbb\xbf{}"),
    "UTF-16": tensor_file("{}".encode("utf-16")),
    "trailing text": tensor_file(b"{} x"),
    "trailing NUL": tensor_file(b"{}\0"),
    "two objects": tensor_file(b"{}{}"),
    "trailing comma": tensor_file(b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]},}', 4),
    "comment": tensor_file(b"{/* */}"),
    "bad UTF-8": tensor_file(b'{"\xff":1}'),
    "overlong UTF-8": tensor_file(b'{"\xc0\xaf":1}'),
    "surrogate bytes": tensor_file(b'{"\xed\xa0\x80":1}'),
    "surrogate escape in a name": tensor_file(b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', 4),
    "surrogate escape in metadata": tensor_file(b'{"__metadata__":{"a":"\\udfff"}}'),
    "raw newline in a name": tensor_file(b'{"a\n":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1),
    "duplicate name": tensor_file(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1
    ),
    "duplicate name, one escaped": tensor_file(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0077":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
    ),
    "duplicate dtype": tensor_file(b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1),
    "duplicate metadata": tensor_file(b'{"__metadata__":{},"__metadata__":{}}'),
    "duplicate metadata key": tensor_file(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "metadata array": tensor_file({"__metadata__": []}),
    "metadata number": tensor_file({"__metadata__": {"a": 1}}),
    "metadata nested": tensor_file({"__metadata__": {"a": {"b": "c"}}}),
    "deep JSON": tensor_file(b'{"w":' + nested(500) + b"}"),
    "very deep JSON": tensor_file(b'{"w":' + nested(300_000) + b"}"),
    "very deep and never closed": tensor_file(b'{"w":' + b"[" * 1_000_000),
    "deep objects": tensor_file(b'{"a":' * 100_000),
    "deep shape": tensor_file({"w": entry(shape=[[[[]]]])}),
    "NaN": tensor_file(b'{"w":NaN}'),
    "Infinity in offsets": tensor_file(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}', 1),
    "entry null": tensor_file({"w": None}),
    "entry string": tensor_file({"w": "x"}),
    "entry empty": tensor_file({"w": {}}),
    "entry without dtype": tensor_file({"w": {"shape": [], "data_offsets": [0, 4]}}, 4),
    "entry without shape": tensor_file({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "entry without offsets": tensor_file({"w": {"dtype": "F32", "shape": []}}, 4),
    "entry with another key": tensor_file({"w": {**entry(), "extra": 1}}, 16),
    "dtype unknown": tensor_file({"w": entry("F31")}, 16),
    "dtype lower case": tensor_file({"w": entry("f32")}, 16),
    "dtype F4": tensor_file({"w": entry("F4", [32], [0, 16])}, 16),
    "dtype F6_E2M3": tensor_file({"w": entry("F6_E2M3", [4], [0, 3])}, 3),
    "dtype F6_E3M2": tensor_file({"w": entry("F6_E3M2", [4], [0, 3])}, 3),
    "dtype number": tensor_file({"w": entry(1)}, 16),
    "dtype null": tensor_file({"w": entry(None)}, 16),
    "dtype array": tensor_file({"w": entry(["F32"])}, 16),
    "dtype of a megabyte": tensor_file({"w": entry("F" * 1_000_000)}, 16),
    "shape null": tensor_file({"w": entry(shape=None)}, 16),
    "shape number": tensor_file({"w": entry(shape=4)}, 16),
    "shape string": tensor_file({"w": entry(shape="22")}, 16),
    "shape object": tensor_file({"w": entry(shape={})}, 16),
    "shape of bools": tensor_file({"w": entry(shape=[True, 4])}, 16),
    "shape of floats": tensor_file({"w": entry(shape=[2.0, 2.0])}, 16),
    "shape of strings": tensor_file({"w": entry(shape=["2", "2"])}, 16),
    "shape with exponent": tensor_file(b'{"w":{"dtype":"U8","shape":[1e1],"data_offsets":[0,10]}}', 10),
    "shape negative": tensor_file({"w": entry(shape=[-2, -2])}, 16),
    "shape 2**63": tensor_file({"w": entry("U8", [BIG], [0, BIG])}),
    "shape of 4000 digits": tensor_file(
        b'{"w":{"dtype":"U8","shape":[1' + b"0" * 4000 + b'],"data_offsets":[0,1]}}', 1
    ),
    "shape of 100000 digits": tensor_file(
        b'{"w":{"dtype":"U8","shape":[1' + b"0" * 100_000 + b'],"data_offsets":[0,1]}}', 1
    ),
    "shape wraps to 16 bytes": tensor_file({"w": entry(shape=[2**32, 2**32, 4], offsets=[0, 16])}, 16),
    "shape wraps to zero": tensor_file({"w": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
    "shape empty yet absurd": tensor_file({"w": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}),
    "shape of petabytes": tensor_file({"w": entry("U8", [2**50], [0, 2**50])}),
    "shape of 65 dimensions": tensor_file({"w": entry("U8", [1] * 65, [0, 1])}, 1),
    "shape of a million dimensions": tensor_file({"w": entry("U8", [1] * 1_000_000, [0, 1])}, 1),
    "shape larger than offsets": tensor_file({"w": entry(shape=[2, 3])}, 16),
    "shape smaller than offsets": tensor_file({"w": entry(shape=[2, 1])}, 16),
    "offsets null": tensor_file({"w": entry(offsets=None)}, 16),
    "offsets one": tensor_file({"w": entry(offsets=[16])}, 16),
    "offsets three": tensor_file({"w": entry(offsets=[0, 8, 16])}, 16),
    "offsets none": tensor_file({"w": entry(offsets=[])}, 16),
    "offsets reversed": tensor_file({"w": entry(offsets=[16, 0])}, 16),
    "offsets negative": tensor_file({"w": entry(offsets=[-16, 0])}, 16),
    "offsets bools": tensor_file({"w": entry("U8", [1], [False, True])}, 1),
    "offsets floats": tensor_file({"w": entry(offsets=[0.0, 16.0])}, 16),
    "offsets strings": tensor_file({"w": entry(offsets=["0", "16"])}, 16),
    "offsets 2**64": tensor_file({"w": entry(offsets=[2**64, 2**64 + 16])}, 16),
    "offsets past the end": tensor_file({"w": entry(offsets=[16, 32])}, 16),
    "hole at the start": tensor_file({"w": entry(offsets=[4, 20])}, 20),
    "hole between": tensor_file({"a": entry(), "b": entry(offsets=[20, 36])}, 36),
    "same bytes twice": tensor_file({"a": entry(), "b": entry()}, 16),
    "overlap by one": tensor_file({"a": entry(), "b": entry(offsets=[15, 31])}, 31),
    "one inside another": tensor_file({"a": entry(), "b": entry("U8", [4], [4, 8])}, 16),
    "empty tensor inside another": tensor_file({"a": entry(), "b": entry("U8", [0], [4, 4])}, 16),
    "empty tensor past the end": tensor_file({"a": entry(), "b": entry("U8", [0], [17, 17])}, 16),
    "file one short": tensor_file({"w": entry()}, 15),
    "file one long": tensor_file({"w": entry()}, 17),
    "no tensors but data": tensor_file({}, 8),
    "name of a megabyte": tensor_file({"n" * 1_000_000: entry()}, 16),
    "a million duplicates": tensor_file(b"{" + b",".join([b'"w":1'] * 1_000_000) + b"}"),
    "a million junk lists": tensor_file(b'{"w":[' + b",".join([b"[]"] * 1_000_000) + b"]}"),
}

FILE_NAMES = {
    "absolute": "/etc/passwd",
    "parent": "..",
    "parent's file": "../model.safetensors",
    "below": "sub/model.safetensors",
    "hidden parent": "a/../../b.safetensors",
    "empty": "",
    "dot": ".",
    "dot slash": "./model.safetensors",
    "NUL": "model.safetensors\0.txt",
    "newline": "a\nb",
    "backslash": "..\\model.safetensors",
    "too long": "x" * 300,
    "escape": "\x1b[2J",
    "delete": "\x7f",
}

INDEXES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"hello",
    "array": b"[]",
    "null": b"null",
    "no weight_map": b'{"metadata":{"total_size":1}}',
    "weight_map null": b'{"weight_map":null}',
    "weight_map array": b'{"weight_map":[]}',
    "weight_map string": b'{"weight_map":"a"}',
    "file null": b'{"weight_map":{"w":null}}',
    "file number": b'{"weight_map":{"w":1}}',
    "file list": b'{"weight_map":{"w":["a"]}}',
    "duplicate tensor": b'{"weight_map":{"w":"a","w":"b"}}',
    "duplicate weight_map": b'{"weight_map":{},"weight_map":{}}',
    "bad UTF-8": b'{"weight_map":{"\xff":"a"}}',
    "surrogate name": b'{"weight_map":{"\\ud800":"a"}}',
    "surrogate file": b'{"weight_map":{"w":"\\udc00"}}',
    "metadata array": b'{"metadata":[],"weight_map":{}}',
    "metadata string": b'{"metadata":"x","weight_map":{}}',
    "total_size negative": b'{"metadata":{"total_size":-1},"weight_map":{}}',
    "total_size bool": b'{"metadata":{"total_size":true},"weight_map":{}}',
    "total_size string": b'{"metadata":{"total_size":"1"},"weight_map":{}}',
    "total_size fraction": b'{"metadata":{"total_size":1.5},"weight_map":{}}',
    "total_size NaN": b'{"metadata":{"total_size":NaN},"weight_map":{}}',
    "total_size infinite": b'{"metadata":{"total_size":1e999},"weight_map":{}}',
    "total_size 2**64": b'{"metadata":{"total_size":18446744073709551616},"weight_map":{}}',
    "total_parameters list": b'{"metadata":{"total_parameters":[]},"weight_map":{}}',
    "deep metadata": b'{"metadata":{"a":' + nested(100) + b'},"weight_map":{}}',
    "very deep": b'{"weight_map":' + nested(300_000) + b"}",
    "never closed": b'{"weight_map":' * 300_000,
    "trailing garbage": b'{"weight_map":{}} x',
    "long tensor name": json.dumps({"weight_map": {"n" * 100_000: "a"}}).encode(),
    "a million duplicates": b'{"weight_map":{' + b",".join([b'"w":"a"'] * 1_000_000) + b"}}",
    **{f"file {key}": json.dumps({"weight_map": {"w": name}}).encode() for key, name in FILE_NAMES.items()},
}
del INDEXES["file below"]
INDEXES["file below"] = json.dumps({"weight_map": {"w": FILE_NAMES["below"]}}).encode()


def record(**changes: object) -> dict[str, object]:
    """The sample manifest as a dict, with some top-level fields replaced."""
    table = json.loads(encode_manifest(sample_manifest()))
    del table["crc32c"]
    return {**table, **changes}


def with_file(**changes: object) -> bytes:
    table = record()
    files = table["files"]
    assert isinstance(files, list)
    files[2] = {**files[2], **changes}
    return manifest_text(table)


def with_tensor(**changes: object) -> bytes:
    table = record()
    tensors = table["tensors"]
    assert isinstance(tensors, list)
    tensors[0] = {**tensors[0], **changes}
    return manifest_text(table)


def with_chunk(position: int, value: object) -> bytes:
    table = record()
    tensors = table["tensors"]
    assert isinstance(tensors, list)
    tensors[0]["chunks"][0][position] = value
    return manifest_text(table)


CHUNK = ["model/a.safetensors", 80, 16, [0, 0], [2, 2], "00000001"]

MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "digest only": sign(b""),
    "not JSON": sign(b"hello"),
    "array": sign(b"[{") + b"]",
    "no digest": json.dumps(record()).encode(),
    "wrong format": manifest_text(record(format="other")),
    "no format": manifest_text({key: value for key, value in record().items() if key != "format"}),
    "version 0": manifest_text(record(version=0)),
    "version 2": manifest_text(record(version=2)),
    "version 3": manifest_text(record(version=3, aliases=[])),
    "aliases in version 1": manifest_text(record(aliases=[])),
    "aliases null": manifest_text(record(version=2, aliases=None)),
    "alias null": manifest_text(record(version=2, aliases=[None])),
    "alias of two": manifest_text(record(version=2, aliases=[["model", "v"]])),
    "alias of four": manifest_text(record(version=2, aliases=[["model", "v", "w", "w"]])),
    "alias number": manifest_text(record(version=2, aliases=[["model", 1, "w"]])),
    "alias twice": manifest_text(record(version=2, aliases=[["model", "v", "w"]] * 2)),
    "alias of nothing": manifest_text(record(version=2, aliases=[["model", "v", "u"]])),
    "alias of itself": manifest_text(record(version=2, aliases=[["nothing", "v", "v"]])),
    "alias is a tensor": manifest_text(record(version=2, aliases=[["model", "w", "b\u00e9"]])),
    "alias overlong": manifest_text(record(version=2, aliases=[["model", "v" * 100_000, "w"]])),
    "alias without component": manifest_text(record(version=2, aliases=[["", "v", "w"]])),
    "version true": manifest_text(record(version=True)),
    "version text": manifest_text(record(version="1")),
    "version absent": manifest_text({key: value for key, value in record().items() if key != "version"}),
    "another key": manifest_text(record(other=1)),
    "files absent": manifest_text({key: value for key, value in record().items() if key != "files"}),
    "files object": manifest_text(record(files={})),
    "files empty": manifest_text(record(files=[])),
    "tensors null": manifest_text(record(tensors=None)),
    "tensors empty": manifest_text(record(tensors=[])),
    "info array": manifest_text(record(info=[])),
    "info deep": manifest_text(record(info={"a": json.loads(nested(60))})),
    "info very deep": sign(b'{"format":"shardwise-manifest","version":1,"info":{"a":' + nested(300_000) + b"},"),
    "info NaN": sign(b'{"format":"shardwise-manifest","version":1,"info":{"a":NaN},"files":[],"tensors":[],'),
    "info twice": sign(b'{"format":"shardwise-manifest","version":1,"info":{},"info":{},"files":[],"tensors":[],'),
    "bad UTF-8": sign(b'{"format":"\xff",'),
    "file null": manifest_text(record(files=[None])),
    "file twice": manifest_text(record(files=[*json.loads(json.dumps(record()["files"]))] * 2)),
    "file size negative": with_file(size=-1),
    "file size bool": with_file(size=True),
    "file size float": with_file(size=1.0),
    "file size 2**63": with_file(size=BIG),
    "file size null": with_file(size=None),
    "file path null": with_file(path=None),
    "file digest number": with_file(crc32c=5),
    "file digest short": with_file(crc32c="5"),
    "file digest upper case": with_file(crc32c="ABCDEF00"),
    "file header too long": with_file(header_bytes=8),
    "file header negative": with_file(header_bytes=-1),
    "file header without chunks": with_file(header_bytes=3),
    "file with another key": with_file(mode=7),
    **{f"path {key}": with_file(path=path) for key, path in FILE_NAMES.items() if key != "below"},
    "path double slash": with_file(path="a//b"),
    "path trailing slash": with_file(path="a/"),
    "path of 5000 characters": with_file(path="a/" * 2500 + "a"),
    "tensor null": manifest_text(record(tensors=[None])),
    "tensor twice": manifest_text(record(tensors=[*json.loads(json.dumps(record()["tensors"]))] * 2)),
    "tensor dtype unknown": with_tensor(dtype="F31"),
    "tensor dtype null": with_tensor(dtype=None),
    "tensor dtype narrower": with_tensor(dtype="F16"),
    "tensor shape larger": with_tensor(shape=[5, 2]),
    "tensor shape smaller": with_tensor(shape=[3, 2]),
    "tensor shape flat": with_tensor(shape=[8]),
    "tensor shape negative": with_tensor(shape=[-4, -2]),
    "tensor shape bool": with_tensor(shape=[4, True]),
    "tensor shape overflowing": with_tensor(shape=[2**40, 2**40], chunks=[]),
    "tensor shape 65 dimensions": with_tensor(shape=[1] * 65),
    "tensor name null": with_tensor(name=None),
    "tensor name of 5000": with_tensor(name="n" * 5000),
    "tensor component empty": with_tensor(component=""),
    "tensor component number": with_tensor(component=1),
    "tensor digest missing": with_tensor(crc32c=7),
    "tensor with another key": with_tensor(x=1),
    "chunks absent": with_tensor(chunks=[]),
    "chunks object": with_tensor(chunks={}),
    "chunks one of two": with_tensor(chunks=[CHUNK]),
    "chunks the same twice": with_tensor(chunks=[CHUNK, CHUNK]),
    "chunk null": with_tensor(chunks=[None]),
    "chunk short": with_tensor(chunks=[CHUNK[:5]]),
    "chunk long": with_tensor(chunks=[[*CHUNK, 1]]),
    "chunk in an unknown file": with_chunk(0, "model/c.safetensors"),
    "chunk in a plain file": with_chunk(0, "config.json"),
    "chunk outside": with_chunk(0, "../a.safetensors"),
    "chunk file number": with_chunk(0, 0),
    "chunk in the header": with_chunk(1, 79),
    "chunk past the end": with_chunk(1, 81),
    "chunk offset negative": with_chunk(1, -1),
    "chunk offset huge": with_chunk(1, BIG - 1),
    "chunk offset float": with_chunk(1, 80.0),
    "chunk length short": with_chunk(2, 15),
    "chunk length zero": with_chunk(2, 0),
    "chunk length huge": with_chunk(2, BIG),
    "chunk box elsewhere": with_chunk(3, [1, 0]),
    "chunk box outside": with_chunk(3, [3, 0]),
    "chunk box negative": with_chunk(3, [-1, 0]),
    "chunk box of one dimension": with_chunk(3, [0]),
    "chunk sizes of one dimension": with_chunk(4, [4]),
    "chunk sizes transposed": with_chunk(4, [4, 1]),
    "chunk sizes huge": with_chunk(4, [BIG - 1, BIG - 1]),
    "chunk digest null": with_chunk(5, None),
    "chunk digest of 9 digits": with_chunk(5, "000000001"),
}


def fails_cleanly(call: Callable[[], object], kind: type[ShardwiseError]) -> ShardwiseError:
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert error.hint
    assert len(str(error)) < 10_000
    return error


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_header(name: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(HEADERS[name])
    error = fails_cleanly(lambda: read_header(path), HeaderError)
    assert error.path == str(path)
    fails_cleanly(lambda: parse_header(HEADERS[name], len(HEADERS[name]), "p"), HeaderError)


@pytest.mark.parametrize("name", INDEXES)
def test_hostile_index(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(INDEXES[name])
    assert fails_cleanly(lambda: read_index(path), WeightIndexError).path == str(path)


@pytest.mark.parametrize("name", MANIFESTS)
def test_hostile_manifest(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFESTS[name])
    error = fails_cleanly(lambda: read_manifest(tmp_path), ManifestError)
    assert error.path == str(tmp_path / "manifest.json")


def test_the_unspoilt_manifest_is_accepted() -> None:
    assert parse_manifest(manifest_text(record()), "m") == sample_manifest()


def test_header_claims_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62))
    os.truncate(path, 2**40)
    fails_cleanly(lambda: read_header(path), HeaderError)


@pytest.mark.parametrize("reader", [read_index, read_manifest])
def test_oversized_records_are_refused(reader: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b"{}")
    os.truncate(path, 2**40)
    assert MAX_INDEX_BYTES < 2**40
    error = fails_cleanly(lambda: reader(path), FormatError)
    assert "at most" in str(error)


@pytest.mark.parametrize("reader", [read_index, read_manifest])
def test_special_and_absent_files(reader: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    fails_cleanly(lambda: reader(tmp_path / "fifo"), FormatError)
    fails_cleanly(lambda: reader(Path("/dev/zero")), FormatError)
    fails_cleanly(lambda: reader(tmp_path / "absent"), CheckpointNotFoundError)
    fails_cleanly(lambda: reader(tmp_path), ShardwiseError)


@pytest.mark.parametrize("relative", [path for key, path in FILE_NAMES.items() if key != "below"])
def test_paths_that_lead_elsewhere(relative: str, tmp_path: Path) -> None:
    fails_cleanly(lambda: resolve_inside(tmp_path, relative, ManifestError), ManifestError)


def test_links_that_lead_elsewhere(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "root-other"
    (root / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "f").write_bytes(b"")
    (root / "sub" / "out").symlink_to(other)
    (root / "file").symlink_to(other / "f")
    (root / "inside").symlink_to(root / "sub")
    (tmp_path / "alias").symlink_to(root)
    for relative in ("sub/out/f", "file", "sub/out"):
        fails_cleanly(lambda relative=relative: resolve_inside(root, relative), FormatError)
    assert resolve_inside(tmp_path / "alias", "inside/x") == (root / "sub" / "x").resolve()
    assert resolve_inside(root, "new/file") == (root / "new" / "file").resolve()


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, ("touch pwned",)


def global_call(module: str, name: str, *args: str) -> bytes:
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, args)) + b"tR."


def patched_class(name: str) -> bytes:
    """Sets an attribute on one of the allowed classes itself through BUILD."""
    return (
        f"\x80\x02ctorch.distributed.checkpoint.metadata\n{name}\n".encode("latin-1")
        + b"N}X\x01\x00\x00\x00xK\x01s\x86b."
    )


PICKLES: dict[str, bytes] = {
    "os.system": pickle.dumps(Runs()),
    "os.system protocol 0": pickle.dumps(Runs(), protocol=0),
    "builtins.eval": global_call("builtins", "eval", "1"),
    "builtins.exec": global_call("builtins", "exec", "1"),
    "builtins.getattr": global_call("builtins", "getattr", "a", "b"),
    "builtins.__import__": global_call("builtins", "__import__", "os"),
    "operator.attrgetter": global_call("operator", "attrgetter", "x"),
    "functools.partial": global_call("functools", "partial"),
    "torch.load": global_call("torch", "load", "x"),
    "torch.hub.load": global_call("torch.hub", "load", "x"),
    "torch._utils._rebuild_tensor": global_call("torch._utils", "_rebuild_tensor"),
    "dotted name": global_call("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    "dotted dtype": global_call("torch", "float32.to_complex"),
    "other class of the module": global_call("torch.distributed.checkpoint.metadata", "Enum"),
    "module itself": global_call("torch.distributed.checkpoint.metadata", "os"),
    "pathlib.os": global_call("pathlib", "os"),
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02Px\n.",
    "binary persistent id": b"\x80\x02K\x01Q.",
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\no.",
    "BUILD on a class": patched_class("Metadata"),
    "memo index 2**32-1": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo never stored": b"\x80\x02h\x07.",
    "text of 2**63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
    "bytes of 2**32 bytes": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b".",
    "frame longer than the file": b"\x80\x04\x95" + struct.pack("<I", 2**31)[:4] + b".",
    "empty": b"",
    "stop only": b".",
    "no stop": b"\x80\x02N",
    "mark left": b"\x80\x02(.",
    "two values": b"\x80\x02NN.",
    "pops a mark": b"\x80\x02(R.",
    "underflow": b"\x80\x02\x85.",
    "protocol 9": b"\x80\x09N.",
    "call of a number": b"\x80\x02K\x01)R.",
    "append to None": b"\x80\x02NNa.",
    "odd dict": b"\x80\x02}(Nu.",
    "list as a key": b"\x80\x02}]Ns.",
    "deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"Ns.",
    "deep list": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "bad UTF-8": b"\x80\x04\x8c\x01\xff.",
    "plain None": pickle.dumps(None),
    "plain dict": pickle.dumps({"a": 1}),
    "a size": pickle.dumps(torch.Size([1])),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails_cleanly(lambda: parse_dcp_metadata(PICKLES[name], "p"), FormatError)
    assert list(tmp_path.iterdir()) == []


def test_unsafe_pickle_names_the_global() -> None:
    error = fails_cleanly(lambda: parse_dcp_metadata(PICKLES["os.system"], "p"), UnsafePickleError)
    assert "system" in error.message


def read_item(content: bytes, file: Path) -> torch.Tensor:
    """Read what is to be a serialised tensor of two elements."""
    file.write_bytes(content)
    dest = torch.zeros(2)
    chunk = SourceChunk(Box.whole((2,)), 0, 0, len(content))
    with contextlib.closing(Reader(LocalStorage(), [file])) as reader:
        reader.execute([PackedRead(chunk, chunk.box, (2,), dest, TensorSpec("x", (2,), "F32"))])
    return dest


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_items_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    item = tmp_path / "item"
    assert read_item(saved(torch.tensor([1.0, 2.0])), item).tolist() == [1, 2]
    hostile = (saved({"x": Runs()}), saved(Runs()), saved(torch.ones(3)), saved(5), b"", b"PK\x03\x04", b"garbage" * 10)
    for content in hostile:
        error = fails_cleanly(lambda content=content: read_item(content, item), FormatError)  # type: ignore[misc]
        assert error.path == str(item)
    assert [path.name for path in tmp_path.iterdir()] == ["item"]


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from shardwise.errors import FormatError
from shardwise.format.header import read_header
from shardwise.format.index import parse_index
from shardwise.format.manifest import parse_manifest
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    for call in (lambda: read_header(path), lambda: parse_index(data, "i"), lambda: parse_manifest(data, "m")):
        try:
            call()
        except FormatError:
            continue
        sys.exit(f"{path} was accepted")
"""


def test_whole_corpus_fits_into_little_memory(tmp_path: Path) -> None:
    corpus = [*HEADERS.values(), *INDEXES.values(), *MANIFESTS.values()]
    for number, data in enumerate(corpus):
        (tmp_path / f"{number:04d}").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 2**30


def test_parsing_an_index_in_memory_equals_reading_it() -> None:
    assert parse_index(b'{"weight_map":{"w":"a.safetensors"}}', "i").files == ("a.safetensors",)
