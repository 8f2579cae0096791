"""Files of ``torch.save`` made entry by entry: what no installed torch writes, and what nobody should."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from shardwise.format.pickle_tree import PickledCall, PickledGlobal, PickledReference


def pickled(tree: object) -> bytes:
    """The pickle, of protocol 2, of a tree as `read_pickle_tree` gives it."""
    return b"\x80\x02" + _encoded(tree) + b"."


def _encoded(tree: object) -> bytes:
    match tree:
        case None:
            return b"N"
        case bool():
            return b"\x88" if tree else b"\x89"
        case int():
            raw = tree.to_bytes(16, "little", signed=True)
            return b"\x8a\x10" + raw
        case str():
            raw = tree.encode()
            return b"X" + len(raw).to_bytes(4, "little") + raw
        case PickledGlobal():
            return f"c{tree.module}\n{tree.name}\n".encode()
        case PickledReference():
            return _encoded(tree.key) + b"Q"
        case PickledCall():
            state = b"" if tree.state is None else _encoded(tree.state) + b"b"
            return _encoded(tree.function) + _encoded(tree.args) + b"R" + state
        case tuple():
            return b"(" + b"".join(map(_encoded, tree)) + b"t"
        case list():
            return b"](" + b"".join(map(_encoded, tree)) + b"e"
        case dict():
            return b"}(" + b"".join(_encoded(each) for pair in tree.items() for each in pair) + b"u"
    raise TypeError(type(tree))


def write_archive(
    path: Path,
    tree: object,
    storages: Mapping[str, bytes],
    *,
    more: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a file as ``torch.save`` does; ``more`` are further entries, or others than these."""
    entries = {"file/data.pkl": pickled(tree), "file/byteorder": b"little"}
    entries |= {f"file/data/{key}": content for key, content in storages.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (entries | dict(more or {})).items():
            archive.writestr(name, content, compression if "/data/" in name else zipfile.ZIP_STORED)
    return path


def named(path: str) -> PickledGlobal:
    """A global by its dotted path."""
    module, _, name = path.rpartition(".")
    return PickledGlobal(module, name)


def tensor(
    key: str,
    shape: tuple[int, ...],
    *,
    numel: int | None = None,
    start: int = 0,
    strides: tuple[int, ...] | None = None,
) -> PickledCall:
    """A float32 tensor in a storage, row by row unless strides are given."""
    count = 1
    own: list[int] = []
    for size in reversed(shape):
        own.insert(0, count)
        count *= size
    storage = PickledReference(
        ("storage", named("torch.FloatStorage"), key, "cpu", count + start if numel is None else numel)
    )
    args = (storage, start, shape, tuple(own) if strides is None else strides, False, {})
    return PickledCall(named("torch._utils._rebuild_tensor_v2"), args)
