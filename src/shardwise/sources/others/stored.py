"""Tensors in the tree of a ``torch.save`` file: shape, dtype, and where their bytes lie.

Source: the functions of ``torch._utils`` and ``torch._tensor`` that torch's own pickles name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from shardwise.dtypes import CODES
from shardwise.errors import FormatError
from shardwise.format.pickle_tree import PickledCall, PickledGlobal, PickledReference
from shardwise.format.strict_json import MAX_DIMS, MAX_INT
from shardwise.format.torch_archive import TorchArchive
from shardwise.geometry import DTYPE_BYTES
from shardwise.upstream.torch_distributed import LAYOUT

#: Classes of typed storages -> dtype code.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
_UNTYPED = PickledGlobal("torch.storage", "UntypedStorage")
_REBUILD = {
    PickledGlobal("torch._utils", "_rebuild_tensor"): 4,
    PickledGlobal("torch._utils", "_rebuild_tensor_v2"): 6,
    PickledGlobal("torch._utils", "_rebuild_tensor_v3"): 7,
}
_PARAMETER = PickledGlobal("torch._utils", "_rebuild_parameter")
#: A tensor with attributes of its own, of torch's own class or a subclass.
TYPED = PickledGlobal("torch._tensor", "_rebuild_from_type_v2")
_OWN_CLASSES = (PickledGlobal("torch", "Tensor"), PickledGlobal("torch.nn.parameter", "Parameter"))
SIZE = PickledGlobal("torch", "Size")
#: What files of plain tensors name.
PLAIN_NAMES = frozenset(
    {
        *_REBUILD,
        _PARAMETER,
        TYPED,
        *_OWN_CLASSES,
        _UNTYPED,
        SIZE,
        PickledGlobal("torch", "device"),
        PickledGlobal(*LAYOUT),
        PickledGlobal("collections", "OrderedDict"),
        *(PickledGlobal("torch", name) for name in (*_STORAGES, *CODES, "complex128")),
        *(PickledGlobal(module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
    }
)
_DAMAGED = "The file is damaged or forged: restore it from a copy."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a file in row-major order, from byte ``offset`` on."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    crc32: int  #: The archive's checksum of its storage; 0 where it was written without.
    start: int  #: Where it begins in its storage, in bytes.
    storage_bytes: int  #: The length of its storage.

    @property
    def alone(self) -> bool:
        """Whether it fills its storage, so that the checksum is its own."""
        return self.start == 0 and self.numel * DTYPE_BYTES[self.dtype] == self.storage_bytes

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def fail(archive: TorchArchive, name: str, reason: str) -> NoReturn:
    """Raise the error for a value that is not of the form that its class has."""
    raise FormatError(f"this value of the file {reason}", path=archive.path, tensor=name, hint=_DAMAGED)


def is_call(value: object, names: Sequence[PickledGlobal] | frozenset[PickledGlobal]) -> bool:
    """Whether a value is made by one of these functions."""
    return isinstance(value, PickledCall) and value.function in names


def without_parameter(value: object) -> object:
    """What a parameter is made of; anything else as it is."""
    if isinstance(value, PickledCall) and value.function == _PARAMETER and value.args:
        return value.args[0]
    return value


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor of torch's own class, or a parameter."""
    return isinstance(_bare(value), PickledCall)


def _bare(value: object) -> PickledCall | None:
    """The call that makes a tensor: without what a parameter or attributes add; ``None`` of anything else."""
    for _ in range(3):
        if not isinstance(value, PickledCall):
            return None
        if value.function in _REBUILD:
            return value
        if value.function == _PARAMETER and value.args:
            value = value.args[0]
        elif value.function == TYPED and len(value.args) == 4 and value.args[1] in _OWN_CLASSES:
            function, inner = value.args[0], value.args[2]
            if not isinstance(function, PickledGlobal) or not isinstance(inner, tuple):
                return None
            value = PickledCall(function, inner)
        else:
            return None
    return None


def refuse_unread(archive: TorchArchive, value: object, name: str) -> None:
    """Refuse a tensor in a form that is not read, so that it is not taken for something else than a tensor."""
    if isinstance(value, PickledCall) and value.function.name.startswith("_rebuild"):
        fail(archive, name, f"is a tensor in a form that is not known (made by {value.function})")


def refuse_tensors_inside(archive: TorchArchive, value: object, name: str) -> None:
    """Refuse a container with tensors in it, so that they are not passed over."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if any(isinstance(each, PickledCall) and each.function.name.startswith("_rebuild") for each in inside):
        fail(archive, name, f"is a {type(value).__name__} with tensors in it, beside the model's tensors")


def storage_of(value: object) -> object:
    """What identifies a tensor's storage in its file; ``None`` where it is no tensor."""
    call = _bare(value)
    reference = call.args[0] if call is not None and call.args else None
    key = reference.key if isinstance(reference, PickledReference) else None
    return key[2] if isinstance(key, tuple) and len(key) == 5 and isinstance(key[2], str) else None


def counts(archive: TorchArchive, value: object, name: str, what: str) -> tuple[int, ...]:
    """A shape, strides or offsets: a tuple, a list or a ``torch.Size`` of numbers from 0 on."""
    if isinstance(value, PickledCall) and value.function == SIZE and len(value.args) == 1 and value.state is None:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS:
        fail(archive, name, f"has something else where {what} belong")
    if not all(type(each) is int and 0 <= each <= MAX_INT for each in value):
        fail(archive, name, f"has {what} that are not numbers from 0 on")
    return tuple(value)


def dtype_of(archive: TorchArchive, value: object, name: str) -> str:
    """The code of a dtype."""
    if not isinstance(value, PickledGlobal) or value.module != "torch":
        fail(archive, name, "has something else where a dtype belongs")
    code = CODES.get(value.name)
    if code is None:
        raise FormatError(
            f"the dtype {value} cannot be stored in a safetensors file",
            path=archive.path,
            tensor=name,
            hint="Convert the tensor with the tool that wrote it.",
        )
    return code


def stored_tensor(archive: TorchArchive, value: object, name: str) -> StoredTensor:
    """Where a plain tensor, or a parameter, lies; `FormatError` for another form, and where it is not row by row."""
    value = _bare(value)
    if value is None or value.state is not None:
        fail(archive, name, "has something else where a tensor belongs")
    fewest = _REBUILD[value.function]
    if not fewest <= len(value.args) <= fewest + 1:
        fail(archive, name, "has a malformed tensor")
    if len(value.args) > max(fewest, 6) and value.args[fewest]:
        raise FormatError(
            "the tensor has the conjugate or negative bit, which safetensors files do not have",
            path=archive.path,
            tensor=name,
            hint="Save it with resolve_conj() and resolve_neg().",
        )
    start, shape = value.args[1], counts(archive, value.args[2], name, "a shape's sizes")
    strides = counts(archive, value.args[3], name, "strides")
    if type(start) is not int or not 0 <= start <= MAX_INT or len(strides) != len(shape):
        fail(archive, name, "has a malformed tensor")
    code = dtype_of(archive, value.args[6], name) if fewest == 7 else None
    key, code = _storage(archive, value.args[0], code, name)
    if not _row_major(shape, strides):
        raise FormatError(
            f"the tensor of {list(shape)} lies in its storage with the strides {list(strides)}, and not row by row",
            path=archive.path,
            tensor=name,
            hint="Save it with contiguous().",
        )
    stored, item = archive.storages[key], DTYPE_BYTES[code]
    nbytes = math.prod(shape) * item
    if nbytes and start * item + nbytes > stored.nbytes:
        fail(archive, name, f"lies outside of its storage of {stored.nbytes} bytes")
    return StoredTensor(shape, code, stored.offset + start * item, stored.crc32, start * item, stored.nbytes)


def _storage(archive: TorchArchive, value: object, code: str | None, name: str) -> tuple[str, str]:
    """The key of a tensor's storage, and the tensor's dtype."""
    parts = value.key if isinstance(value, PickledReference) else None
    if not isinstance(parts, tuple) or len(parts) != 5 or parts[0] != "storage":
        fail(archive, name, "has something else where a storage belongs")
    kind, key, numel = parts[1], parts[2], parts[4]
    if code is None and isinstance(kind, PickledGlobal) and kind.module == "torch":
        code = _STORAGES.get(kind.name)
    elif kind != _UNTYPED:
        fail(archive, name, "has a storage of an unknown kind")
    if code is None or type(key) is not str or type(numel) is not int:
        fail(archive, name, "has a malformed storage")
    stored = archive.storages.get(key)
    if stored is None:
        fail(archive, name, f"refers to the storage {key!r}, which the file does not have")
    if numel < 0 or numel * (1 if kind == _UNTYPED else DTYPE_BYTES[code]) != stored.nbytes:
        fail(archive, name, f"says that its storage has {numel} elements, where the file has {stored.nbytes} bytes")
    return key, code


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    inner = 1
    for size, stride in reversed(list(zip(shape, strides, strict=True))):
        if size != 1 and stride != inner and 0 not in shape:
            return False
        inner *= size
    return True
