"""The ``.metadata`` of a ``torch.distributed.checkpoint`` directory, read without unpickling it.

Source: what torch 2.13's ``FileSystemWriter`` pickles. The classes it names are those of
``torch.distributed.checkpoint.metadata`` and ``.filesystem``, torch.Size, dtypes and layouts, and the path of the
checkpoint; torch before 2.3 took the tensor properties from ``torch.distributed._shard``.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch.distributed.checkpoint import metadata as dcp

from shardwise.disk.guarded import read_whole, why_not_relative
from shardwise.disk.names import is_directory
from shardwise.errors import FormatError
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.format.pickle_tree import PLAIN_GLOBALS, TORCH_DTYPES, PickledCall, PickledGlobal, read_pickle_tree
from shardwise.format.strict_json import MAX_DIMS, MAX_INT
from shardwise.upstream import torch_distributed as upstream
from shardwise.upstream.torch_distributed import LAYOUT, LEGACY_MEMORY_FORMATS, MEMORY_FORMATS, STORAGE_INFO

#: Largest metadata file that is read, in bytes.
MAX_METADATA_BYTES = 512 * 2**20

_METADATA = "torch.distributed.checkpoint.metadata"
_LEGACY = LEGACY_MEMORY_FORMATS[0]
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")
_DAMAGED = "The checkpoint's metadata is damaged or forged: restore it from a copy."
_MAX_PLANNER_DEPTH = 64

#: The enumeration of memory formats, by its two places, and its members' names in the order of their values.
_FORMAT_ENUMS = (PickledGlobal(*MEMORY_FORMATS), PickledGlobal(*LEGACY_MEMORY_FORMATS))
_FORMAT_NAMES = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")

_T = TypeVar("_T")


_NAMED = {
    _METADATA: (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        MEMORY_FORMATS[1],
    ),
    STORAGE_INFO[0]: (STORAGE_INFO[1],),
    _LEGACY: ("TensorProperties", LEGACY_MEMORY_FORMATS[1]),
    LAYOUT[0]: (LAYOUT[1],),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
_ALLOWED = PLAIN_GLOBALS.union(PickledGlobal(module, name) for module, group in _NAMED.items() for name in group)


def read_dcp_metadata(path: str | os.PathLike[str]) -> dcp.Metadata:
    """Read the metadata of a DCP checkpoint, given its directory or the ``.metadata`` file itself.

    No code named by the file runs: it is interpreted as data, checked, and then built from torch's own classes.

    Raises:
        UnsafePickleError: The file names anything but DCP's own classes.
        FormatError: The file is malformed, too large, or points outside the checkpoint.
    """
    text = os.fspath(path)
    if is_directory(Path(text)):
        text = os.path.join(text, DCP_METADATA_NAME)
    return parse_dcp_metadata(read_whole(text, MAX_METADATA_BYTES, FormatError), text)


def parse_dcp_metadata(data: bytes, path: str) -> dcp.Metadata:
    """Do what `read_dcp_metadata` does with a file that is already in memory."""
    known, digest = _known.get(), sha256(data).digest()
    if known is not None and digest in known:
        return known[digest]
    found = _Builder(path).metadata(read_pickle_tree(data, _ALLOWED, path, _FORMAT_ENUMS))
    if known is not None:
        known[digest] = found
    return found


_known: contextvars.ContextVar[dict[bytes, dcp.Metadata] | None] = contextvars.ContextVar(
    "known_metadata", default=None
)


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Parse equal metadata files once inside of the ``with`` block: each time takes seconds for 40,000 tensors.

    Files are read every time, so that one that changes is seen. What was parsed is shared and must not be changed.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


class _Builder:
    def __init__(self, path: str) -> None:
        self._path = path
        self._chunk_lists: dict[int, tuple[object, list[dcp.ChunkStorageMetadata]]] = {}
        self._properties: dict[int, tuple[object, dcp.TensorProperties]] = {}

    def _fail(self, reason: str, tensor: str | None = None) -> NoReturn:
        raise FormatError(f"the metadata {self._path!r} {reason}", path=self._path, tensor=tensor, hint=_DAMAGED)

    def _is(self, value: object, module: str, name: str) -> bool:
        return isinstance(value, PickledCall) and value.function.name == name and value.function.module == module

    def _fields(self, value: object, module: str, name: str) -> dict[object, object]:
        if not isinstance(value, PickledCall) or not self._is(value, module, name) or value.args:
            self._fail(f"has something else where a {name} belongs")
        if not isinstance(value.state, dict) and value.state is not None:
            self._fail(f"has a {name} with a malformed state")
        return value.state or {}

    def _typed(self, value: object, kind: type[_T], what: str) -> _T:
        if type(value) is not kind:
            self._fail(f"has {what} that is not of type {kind.__name__}")
        return value

    def _count(self, value: object, what: str) -> int:
        if type(value) is not int or not 0 <= value <= MAX_INT:
            self._fail(f"has {what} that is not an integer from 0 to 2**63 - 1")
        return value

    def _optional(self, value: object, build: Callable[[object], _T]) -> _T | None:
        return None if value is None else build(value)

    def _text(self, fields: dict[object, object], key: str) -> str | None:
        return self._optional(fields.get(key), lambda value: self._typed(value, str, key))

    def metadata(self, tree: object) -> dcp.Metadata:
        fields = self._fields(tree, _METADATA, "Metadata")
        items = self._typed(fields.get("state_dict_metadata"), dict, "state_dict_metadata")
        return dcp.Metadata(
            state_dict_metadata={
                self._typed(name, str, "a name"): self._item(name, item) for name, item in items.items()
            },
            planner_data=self._plain(fields.get("planner_data")),
            storage_data=self._optional(fields.get("storage_data"), self._storage_data),
            storage_meta=self._optional(fields.get("storage_meta"), self._storage_meta),
            version=self._text(fields, "version"),
        )

    def _item(self, name: str, item: object) -> dcp.TensorStorageMetadata | dcp.BytesStorageMetadata:
        if self._is(item, _METADATA, "BytesStorageMetadata"):
            return dcp.BytesStorageMetadata()
        fields = self._fields(item, _METADATA, "TensorStorageMetadata")
        size = self._size(fields.get("size"))
        chunks = self._chunks(fields.get("chunks"))
        for chunk in chunks:
            if len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size):
                self._fail("has a chunk with another number of dimensions than its tensor", name)
            if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, size, strict=True)):
                self._fail("has a chunk that reaches outside its tensor", name)
        return dcp.TensorStorageMetadata(self._tensor_properties(fields.get("properties")), size, chunks)

    def _size(self, value: object) -> torch.Size:
        if not isinstance(value, PickledCall) or not self._is(value, "torch", "Size") or value.state is not None:
            self._fail("has something else where a torch.Size belongs")
        if len(value.args) != 1 or not isinstance(value.args[0], (tuple, list)) or len(value.args[0]) > MAX_DIMS:
            self._fail("has a malformed torch.Size")
        return torch.Size([self._count(item, "a size or offset") for item in value.args[0]])

    def _chunks(self, value: object) -> list[dcp.ChunkStorageMetadata]:
        rows = self._typed(value, list, "chunks")
        if id(rows) not in self._chunk_lists:
            each = [self._fields(row, _METADATA, "ChunkStorageMetadata") for row in rows]
            chunks = [dcp.ChunkStorageMetadata(self._size(f.get("offsets")), self._size(f.get("sizes"))) for f in each]
            self._chunk_lists[id(rows)] = (rows, chunks)
        return self._chunk_lists[id(rows)][1]

    def _tensor_properties(self, value: object) -> dcp.TensorProperties:
        known = self._properties.get(id(value))
        if known is not None:
            return known[1]
        if not isinstance(value, PickledCall) or value.args or value.function.name != "TensorProperties":
            self._fail("has something else where TensorProperties belong")
        if not isinstance(value.state, tuple) or len(value.state) != 5:
            self._fail("has malformed TensorProperties")
        dtype, layout, requires_grad, memory_format, pin_memory = value.state
        if not isinstance(dtype, PickledGlobal) or dtype.module != "torch" or dtype.name not in TORCH_DTYPES:
            self._fail("has something else where a dtype belongs")
        properties = dcp.TensorProperties(
            dtype=TORCH_DTYPES[dtype.name],
            layout=self._layout(layout),
            requires_grad=self._typed(requires_grad, bool, "requires_grad"),
            memory_format=self._memory_format(memory_format),
            pin_memory=self._typed(pin_memory, bool, "pin_memory"),
        )
        self._properties[id(value)] = (value, properties)
        return properties

    def _layout(self, value: object) -> torch.layout:
        if not isinstance(value, PickledCall) or not self._is(value, *LAYOUT):
            self._fail("has something else where a layout belongs")
        # DCP writes nothing but dense tensors.
        if value.args != (str(torch.strided),):
            self._fail("names a layout other than torch.strided")
        return torch.strided

    def _memory_format(self, value: object) -> torch.memory_format:
        formats = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
        if not isinstance(value, PickledCall) or value.function not in _FORMAT_ENUMS:
            self._fail("has something else where a memory format belongs")
        number = value.args[0] if len(value.args) == 1 else None
        if number in _FORMAT_NAMES:
            number = _FORMAT_NAMES.index(number)
        if type(number) is not int or not 0 <= number < len(formats):
            self._fail("names an unknown memory format")
        return formats[number]

    def _storage_data(self, value: object) -> dict[dcp.MetadataIndex, upstream.StorageInfo]:
        rows = self._typed(value, dict, "storage_data")
        result = {self._index(key): self._storage_info(info) for key, info in rows.items()}
        if len(result) != len(rows):
            self._fail("says twice where one item lies")
        return result

    def _index(self, value: object) -> dcp.MetadataIndex:
        fields = self._fields(value, _METADATA, "MetadataIndex")
        return dcp.MetadataIndex(
            self._typed(fields.get("fqn"), str, "a name"),
            self._optional(fields.get("offset"), self._size),
            self._optional(fields.get("index"), lambda index: self._count(index, "an index")),
        )

    def _storage_info(self, value: object) -> upstream.StorageInfo:
        fields = self._fields(value, *STORAGE_INFO)
        relative = self._typed(fields.get("relative_path"), str, "a file's path")
        reason = why_not_relative(relative)
        if reason is not None:
            self._fail(f"names the file {relative[:200]!r}, which {reason}")
        transforms = fields.get("transform_descriptors")
        if transforms is not None:
            if not isinstance(transforms, (list, tuple)):
                self._fail("has malformed transform_descriptors")
            transforms = [self._typed(item, str, "a transform") for item in transforms]
        offset, length = self._count(fields.get("offset"), "an offset"), self._count(fields.get("length"), "a length")
        return upstream.storage_info(relative, offset, length, transforms)

    def _storage_meta(self, value: object) -> dcp.StorageMeta:
        fields = self._fields(value, _METADATA, "StorageMeta")
        modules = self._typed(fields.get("modules", []), list, "modules")
        return dcp.StorageMeta(
            checkpoint_id=self._optional(fields.get("checkpoint_id"), self._where),
            save_id=self._text(fields, "save_id"),
            load_id=self._text(fields, "load_id"),
            modules=[self._typed(item, str, "a module's name") for item in modules],
        )

    def _where(self, value: object) -> str:
        # The checkpoint's path when it was written; shown to the user, never opened.
        if isinstance(value, PickledCall) and value.function.module.startswith("pathlib") and value.state is None:
            return os.path.join("", *[self._typed(part, str, "a part of a path") for part in value.args])
        return self._typed(value, str, "checkpoint_id")

    def _plain(self, value: object) -> object:
        # Each container is looked at once, however often it is shared.
        seen: set[int] = set()
        level = [value]
        for _ in range(_MAX_PLANNER_DEPTH):
            inner: list[object] = []
            for item in level:
                if isinstance(item, (dict, list, tuple, set, frozenset)):
                    fresh = id(item) not in seen
                    seen.add(id(item))
                    inner += [*item, *(item.values() if isinstance(item, dict) else ())] if fresh else ()
                elif item is not None and type(item) not in (str, int, float, bool, bytes):
                    self._fail("has planner_data that are not plain values")
            level = inner
        if level:
            self._fail("has planner_data that are nested too deeply")
        return value
