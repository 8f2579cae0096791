"""Small valid files, and ways to spoil them."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

from shardwise.disk.crc import crc32c
from shardwise.format.manifest import AliasRecord, ChunkRecord, FileRecord, Manifest, TensorRecord
from shardwise.geometry import Box, TensorSpec

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def tensor_file(header: object, data_bytes: int = 0) -> bytes:
    """A safetensors file whose header is ``header``: JSON text as bytes, or a value to dump."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sample_manifest() -> Manifest:
    spec = TensorSpec("w", (4, 2), "F32")
    chunks = (
        ChunkRecord("model/a.safetensors", 80, 16, Box((0, 0), (2, 2)), 1),
        ChunkRecord("model/b.safetensors", 96, 16, Box((2, 0), (2, 2)), 2),
    )
    return Manifest(
        (
            FileRecord("model/a.safetensors", 96, 3, 80),
            FileRecord("model/b.safetensors", 114, 4, 96),
            FileRecord("config.json", 7, 5, None),
        ),
        (
            TensorRecord("model", spec, 6, chunks),
            TensorRecord(
                "model",
                TensorSpec("b\u00e9", (1,), "BF16"),
                None,
                (ChunkRecord("model/b.safetensors", 112, 2, Box((0,), (1,)), 7),),
            ),
            TensorRecord("optim", TensorSpec("w", (0, 3), "F32"), 0, ()),
        ),
        {"epoch": 1, "metrics": {"loss": 0.5}, "tags": ["x", None, True]},
    )


def aliased_manifest() -> Manifest:
    """The same with further names, which takes another version of the record."""
    aliases = (
        AliasRecord("model", "caf\u00e9", "w"),
        AliasRecord("model", "v", "w"),
        AliasRecord("optim", "v", "w"),
        AliasRecord("elsewhere", "a", "b"),
    )
    return replace(sample_manifest(), aliases=aliases)


def sign(body: bytes) -> bytes:
    """A manifest whose own digest is right, whatever its body says."""
    return body + b'"crc32c":"%08x"}\n' % crc32c(body)


def manifest_text(record: dict[str, object]) -> bytes:
    return sign(json.dumps(record)[:-1].encode() + b",")
