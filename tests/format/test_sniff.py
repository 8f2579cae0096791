"""Formats by their first bytes, of files that the formats' own tools write."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from shardwise.format.sniff import FIRST_BYTES, Kind, what_is, what_is_file


def _torch(new: bool) -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.ones(3)}, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def _zip(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, "x")
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_config.yaml"))
    return out.getvalue()


def _numpy(save: Callable[..., None]) -> bytes:
    out = io.BytesIO()
    save(out, np.ones(3))
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4976698672\n"
FILES: dict[str, tuple[bytes, Kind, str]] = {
    "safetensors": (save({"a": torch.ones(3)}), Kind.SAFETENSORS, "safetensors"),
    "torch zip": (_torch(True), Kind.TORCH, "zip archive as torch.save writes it"),
    "torch legacy": (_torch(False), Kind.TORCH, "before torch 1.6"),
    **{f"pickle {n}": (pickle.dumps({"a": [1, 2]}, n), Kind.TORCH, "pickle") for n in range(6)},
    "zip": (_zip("readme.txt"), Kind.ARCHIVE, "zip archive"),
    "npz": (_numpy(np.savez), Kind.FOREIGN, r"\.npz"),
    "npy": (_numpy(np.save), Kind.FOREIGN, r"\.npy"),
    "tar": (_tar(), Kind.ARCHIVE, r"tar archive.*\.nemo"),
    "gzip": (gzip.compress(b"x" * 100), Kind.ARCHIVE, "gzip"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), Kind.GGUF, "GGUF"),
    "ggml": (b"tjgg\x03\x00\x00\x00" + bytes(40), Kind.GGUF, "GGML"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), Kind.FOREIGN, "HDF5"),
    "lfs": (LFS, Kind.POINTER, "git LFS pointer"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", Kind.TEXT, "HTML"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', Kind.TEXT, "XML"),
    "json": (json.dumps({"weight_map": {}}).encode(), Kind.TEXT, "JSON"),
    "long json": (json.dumps({"ä": "ö" * 2000}, ensure_ascii=False).encode(), Kind.TEXT, "JSON"),
    "text": (b"Invalid username or password.", Kind.TEXT, "plain text, which begins 'Invalid username"),
    "empty": (b"", Kind.EMPTY, "empty"),
    "zeros": (bytes(4096), Kind.EMPTY, "zero bytes"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.9.0:", Kind.FOREIGN, "ONNX"),
    "msgpack": (b"\x82\xa5model\x81\xa6kernel\xc7", Kind.FOREIGN, "MessagePack"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    data, kind, match = FILES[name]
    (tmp_path / "file").write_bytes(data)
    found = what_is_file(tmp_path / "file")
    assert found is not None
    assert found.kind is kind
    assert re.search(match, found.name)
    assert found.hint.endswith(".")


def test_what_has_no_signature_is_not_named(tmp_path: Path) -> None:
    assert what_is(bytes(range(128, 256))) is None
    assert what_is(b"\x01\x02\x03\x04" * 200) is None
    assert what_is_file(tmp_path) is None
    assert what_is_file(tmp_path / "absent") is None
    os.mkfifo(tmp_path / "pipe")
    assert what_is_file(tmp_path / "pipe") is None


def test_any_beginning_of_a_file_is_looked_at_without_an_error() -> None:
    for data, _, _ in FILES.values():
        for length in range(min(len(data), FIRST_BYTES + 1)):
            what_is(data[:length])
