"""A long run of a coverage-guided fuzzer on the readers; the suite has a short one, with hypothesis (tests/format).

    pip install atheris
    python tests/fuzz/fuzz_readers.py header -max_total_time=3600

Readers: header, index, manifest, state, pickle. What follows the reader goes to libFuzzer. It starts from valid files
that the library's own writers made, keeps what it learns in a directory (``shardwise-fuzz/<reader>`` beside other
temporary files, or the one that is named), and continues from there the next time. Anything but a typed error within
ten seconds is a finding: the run ends, and the input is kept beside that directory.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import atheris
import torch
from torch.distributed.checkpoint import metadata as dcp

with atheris.instrument_imports():
    from shardwise.disk.crc import crc32c
    from shardwise.errors import ShardwiseError
    from shardwise.format.dcp_metadata import parse_dcp_metadata
    from shardwise.format.header import arrange, encode_header, encode_sharding_metadata, parse_header, saved_offsets
    from shardwise.format.index import encode_index, parse_index
    from shardwise.format.manifest import (
        AliasRecord,
        ChunkRecord,
        FileRecord,
        Manifest,
        TensorRecord,
        encode_manifest,
        parse_manifest,
    )
    from shardwise.format.state_json import decode_state, encode_state
    from shardwise.geometry import Box, TensorSpec

_SPECS = (TensorSpec("a", (2, 2), "F32"), TensorSpec("b", (), "BF16"), TensorSpec("c", (0, 2), "I64"))
_DATA_BYTES = sum(spec.nbytes for spec in _SPECS)
_TAIL = b'"crc32c":"%08x"}\n'
_PLAIN = {"step": 1, "lr": float("nan"), "t": (1, {2}), "raw": b"\0\1", 3: 2**80, "z": 1j, "s": torch.Size([1])}
_ARRAYS = {"random": torch.zeros(2, 2).numpy(), "d": torch.bfloat16, "t": torch.zeros(2, 2)}
_ARRAYS_TEXT, _STATE_TENSORS = encode_state(_ARRAYS)

#: Tokens that mutation of single bytes would take for ever to find.
_WORDS = (
    *("{", "}", "[", "]", ",", ":", "null", "true", "-1", "1e5", "0.5", "18446744073709551616", "9223372036854775807"),
    *('"a"', '"b"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"F4"', '"weight_map"'),
    *('"metadata"', '"total_size"', '"files"', '"tensors"', '"info"', '"chunks"', '"component"', '"../x"', "\\\\ud800"),
    *('"$tensor"', '"$dict"', '"$tuple"', '"$ndarray"', '"$size"', '"$dtype"', '"$bytes"', '"$npscalar"', '"$int"'),
)


def _read_header(data: bytes) -> None:
    # A text is given the length that belongs before it, or hardly anything would come past that number.
    framed = data.startswith(b"{")
    whole = struct.pack("<Q", len(data)) + data if framed else data
    saved_offsets(parse_header(whole, len(whole) + _DATA_BYTES * framed, "fuzz"))


def _read_index(data: bytes) -> None:
    parse_index(data, "fuzz")


def _read_manifest(data: bytes) -> None:
    # The right digest, for the same reason.
    manifest = parse_manifest(data + _TAIL % crc32c(data), "fuzz")
    assert parse_manifest(encode_manifest(manifest), "fuzz") == manifest


def _read_state(data: bytes) -> None:
    decode_state(data, {name: tensor for name, tensor in _STATE_TENSORS.items() if name.encode() in data})


def _read_pickle(data: bytes) -> None:
    parse_dcp_metadata(data, "fuzz")


def _headers() -> list[bytes]:
    metadata = {"format": "pt", **encode_sharding_metadata({spec.name: (0,) * len(spec.shape) for spec in _SPECS})}
    whole = encode_header(arrange(_SPECS), metadata)
    return [whole[8:], whole + bytes(_DATA_BYTES)]


def _indices() -> list[bytes]:
    return [encode_index({"a": "x.safetensors", "b": "y.safetensors"}, 26, total_parameters=7)]


def _manifests() -> list[bytes]:
    spec = TensorSpec("w", (4, 2), "F32")
    chunks = (
        ChunkRecord("model/a.safetensors", 80, 16, Box((0, 0), (2, 2)), 1),
        ChunkRecord("model/b.safetensors", 96, 16, Box((2, 0), (2, 2)), 2),
    )
    files = (
        FileRecord("model/a.safetensors", 96, 3, 80),
        FileRecord("model/b.safetensors", 112, 4, 96),
        FileRecord("config.json", 7, 5, None),
    )
    manifest = Manifest(files, (TensorRecord("model", spec, 6, chunks),), {"epoch": 1, "metrics": {"loss": 0.5}})
    aliased = replace(manifest, aliases=(AliasRecord("model", "v", "w"), AliasRecord("optim", "v", "w")))
    return [encode_manifest(each)[: -len(_TAIL % 0)] for each in (manifest, aliased)]


def _states() -> list[bytes]:
    return [encode_state(_PLAIN)[0], _ARRAYS_TEXT]


def _pickles() -> list[bytes]:
    properties = dcp.TensorProperties(dtype=torch.float32)
    chunk = dcp.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 2]))
    tensor = dcp.TensorStorageMetadata(properties, torch.Size([2, 2]), [chunk])
    return [pickle.dumps(dcp.Metadata({"a": tensor, "b": dcp.BytesStorageMetadata()}, {"a": ("a",)}, {}))]


@dataclass(frozen=True)
class Target:
    """A reader, and valid inputs for it."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


TARGETS = {
    "header": Target(_read_header, _headers),
    "index": Target(_read_index, _indices),
    "manifest": Target(_read_manifest, _manifests),
    "state": Target(_read_state, _states),
    "pickle": Target(_read_pickle, _pickles),
}


def main() -> None:
    """Fuzz the reader that is named first."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: fuzz_readers.py {{{','.join(TARGETS)}}} [CORPUS] [libFuzzer options]")
    name = sys.argv.pop(1)
    target = TARGETS[name]
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    corpora = [word for word in sys.argv[1:] if not word.startswith("-")]
    corpus = Path(corpora[0]) if corpora else Path(tempfile.gettempdir(), "shardwise-fuzz", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        target.read(seed)
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    words = corpus.parent / f"{name}.dict"
    words.write_text("".join(f'"{word.replace(chr(34), chr(92) + chr(34))}"\n' for word in _WORDS), encoding="ascii")

    def one(data: bytes) -> None:
        try:
            target.read(data)
        except ShardwiseError:
            return

    defaults = ["-timeout=10", f"-dict={words}", f"-artifact_prefix={corpus.parent}/{name}-"]
    atheris.Setup([sys.argv[0], *defaults, *options, str(corpus), *corpora[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
