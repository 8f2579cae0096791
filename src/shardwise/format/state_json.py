"""State without pickle: any tree of plain Python values as JSON text, plus the tensors that it refers to.

JSON holds what it can hold exactly; everything else is an object with a single key that starts with ``$``:

    {"format":"shardwise-state","version":1,"value":{"step":7,"betas":{"$tuple":[0.9,0.999]},"m":{"$tensor":"00000.m"}}}

Nothing is ever looked up by a name from the file except in the tables below, so reading runs no foreign code.
"""

from __future__ import annotations

import base64
import binascii
import collections
import io
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, cast

import numpy as np
import torch

from shardwise.dtypes import dtype_code
from shardwise.errors import MisuseError, StateFormatError
from shardwise.format.pickle_tree import TORCH_DTYPES
from shardwise.format.strict_json import JsonValue, as_array, as_counts, as_object, as_row, as_text, exact_keys, loads
from shardwise.upstream.torch_tensors import quantized_per_channel, quantized_per_tensor

#: Version of the record that this module writes, and the only one that it reads.
STATE_VERSION = 1

#: Largest state text that is written or read, in bytes.
MAX_STATE_BYTES = 2**30

_FORMAT = "shardwise-state"
_PLAIN_INT = 2**53
_WHAT_TO_DO = (
    "State may hold numbers, text, bytes, lists, tuples, dicts, sets, tensors and numpy arrays: "
    "have state_dict() return those."
)


def encode_state(value: object) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Split a state into JSON text and the tensors that belong into a safetensors file beside it.

    Tensors are detached, moved to the CPU and made contiguous. They are copied only where that, or a shared storage,
    requires it; others still share memory with ``value``. Dicts keep their order. A tensor that occurs several times is
    stored, and restored, as one.

    Raises:
        StateFormatError: A value of another kind; the error names the path of keys that leads to it. Or too much text.
    """
    encoder = _Encoder()
    tree = encoder.encode(value, "", 0)
    text = json.dumps(
        {"format": _FORMAT, "version": STATE_VERSION, "value": tree}, ensure_ascii=True, separators=(",", ":")
    )
    if len(text) >= MAX_STATE_BYTES:
        raise StateFormatError(
            f"the state cannot be stored: its text has {len(text) + 1} bytes; at most {MAX_STATE_BYTES} are read",
            hint="Keep what is large in tensors or numpy arrays, which are stored beside the text.",
        )
    return text.encode("ascii") + b"\n", encoder.tensors


def decode_state(data: bytes, tensors: Mapping[str, torch.Tensor]) -> object:
    """Put a state together again; `StateFormatError` where the text is malformed or does not fit the tensors."""
    if len(data) > MAX_STATE_BYTES:
        fail(f"has {len(data)} bytes; at most {MAX_STATE_BYTES} are read")
    table = as_object(loads(data, fail=fail), "it", fail)
    if table.get("format") != _FORMAT:
        fail(f"is not a {_FORMAT} record")
    if type(table.get("version")) is not int or table["version"] != STATE_VERSION:
        raise StateFormatError(
            f"the state has version {str(table.get('version'))[:40]}; this shardwise reads version {STATE_VERSION}",
            hint="Use the release of shardwise that wrote the checkpoint, or a newer one.",
        )
    exact_keys(table, frozenset({"format", "version", "value"}), "it", fail)
    decoder = Decoder(tensors)
    value = decoder.decode(table["value"], 0)
    unused = tensors.keys() - decoder.used
    if unused:
        fail(f"does not refer to {len(unused)} of the tensors beside it, for example {min(unused)[:200]!r}")
    return value


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._storages: set[int] = set()
        # Keeps encoded tensors alive, so that no two of them can have the same id.
        self._alive: list[torch.Tensor] = []

    def encode(self, value: object, path: str, depth: int) -> JsonValue:
        if depth > MAX_DEPTH:
            self._refuse(path, f"it is nested deeper than {MAX_DEPTH} levels, or contains itself")
        if value is None or type(value) is bool:
            return value
        if type(value) is str:
            return self._text(value, path)
        if type(value) is int:
            return value if -_PLAIN_INT <= value <= _PLAIN_INT else {"$int": f"{value:x}"}
        if type(value) is float:
            return _encode_float(value)
        if type(value) is complex:
            return {"$complex": [_encode_float(value.real), _encode_float(value.imag)]}
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if type(value) is io.BytesIO:
            return {"$bytesio": base64.b64encode(value.getvalue()).decode("ascii")}
        container = self._encode_container(value, path, depth + 1)
        return container if container is not None else self._encode_array(value, path)

    def _text(self, value: str, path: str) -> str:
        if any("\ud800" <= char <= "\udfff" for char in value):
            self._refuse(path, "it is text with an unpaired surrogate")
        return value

    def _refuse(self, path: str, reason: str) -> NoReturn:
        raise StateFormatError(f"the state at {path or 'its top'} cannot be stored: {reason}", hint=_WHAT_TO_DO)

    def _items(self, values: Iterable[object], path: str, depth: int) -> list[JsonValue]:
        return [self.encode(item, f"{path}[{index}]", depth) for index, item in enumerate(values)]

    def _encode_container(self, value: object, path: str, depth: int) -> JsonValue:
        kind = type(value)
        if kind is list:
            return self._items(cast("list[object]", value), path, depth)
        if kind is tuple:
            return {"$tuple": self._items(cast("tuple[object, ...]", value), path, depth)}
        if kind is dict or kind is collections.OrderedDict or kind is collections.Counter:
            return self._encode_mapping(cast("dict[object, object]", value), path, depth)
        if kind is set or kind is frozenset:
            items = self._items(cast("set[object]", value), path, depth)
            # Sets have no order of their own; sorting makes equal states equal bytes.
            return {f"${kind.__name__}": sorted(items, key=lambda item: json.dumps(item, sort_keys=True))}
        if kind is collections.deque:
            queue = cast("collections.deque[object]", value)
            return {"$deque": [self._items(queue, path, depth), queue.maxlen]}
        return None

    def _encode_mapping(self, value: dict[object, object], path: str, depth: int) -> JsonValue:
        kind = type(value)
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            named = cast("dict[str, object]", value)
            return {self._text(key, path): self.encode(item, f"{path}.{key}", depth) for key, item in named.items()}
        pairs: list[JsonValue] = []
        for key, item in value.items():
            self._check_key(key, path)
            pairs.append([self.encode(key, f"{path} key {key!r}", depth), self.encode(item, f"{path}[{key!r}]", depth)])
        tag = {dict: "$dict", collections.OrderedDict: "$ordered_dict", collections.Counter: "$counter"}[kind]
        return {tag: pairs}

    def _check_key(self, key: object, path: str) -> None:
        if type(key) is tuple:
            for item in key:
                self._check_key(item, path)
        elif key is not None and type(key) not in (str, int, float, bool, bytes):
            self._refuse(path, f"it has a key of type {type(key).__qualname__}")

    def _encode_array(self, value: object, path: str) -> JsonValue:
        if type(value) is torch.Tensor:
            return self._encode_tensor(value, path)
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if type(value) is not np.ndarray and not isinstance(value, np.generic):
            plain = ", not a plain tensor (use .detach(), or .to_local() for a DTensor)"
            kind, more = type(value), plain if isinstance(value, torch.Tensor) else ""
            self._refuse(path, f"it is of type {kind.__module__}.{kind.__qualname__}{more}")
        return self._encode_numpy(value, path)

    def _encode_tensor(self, value: torch.Tensor, path: str) -> JsonValue:
        if value.is_quantized and value.layout is torch.strided:
            return self._encode_quantized(value, path)
        if value.layout is not torch.strided or value.device.type == "meta":
            self._refuse(path, f"it is a tensor without ordinary dense data ({value.layout}, device {value.device})")
        plain = torch.view_as_real(value.detach().resolve_conj()) if value.dtype == torch.complex128 else value
        if id(value) not in self._names:
            try:
                dtype_code(plain.dtype)
            except MisuseError as error:
                what = f"the state at {path or 'its top'} cannot be stored: {error.message}"
                raise StateFormatError(what, hint=error.hint) from error
            self._names[id(value)] = self._store(plain, path)
            self._alive.append(value)
        return {"$tensor" if plain is value else "$complex_tensor": self._names[id(value)]}

    def _encode_quantized(self, value: torch.Tensor, path: str) -> JsonValue:
        if value.dtype not in (torch.qint8, torch.quint8, torch.qint32):
            self._refuse(path, f"it is a quantized tensor of {value.dtype}")
        with torch.no_grad():
            integers = self._store(value.int_repr(), path)
            if value.qscheme() is torch.per_tensor_affine:
                return {"$quantized": [integers, _encode_float(value.q_scale()), value.q_zero_point()]}
            scales = self._store(value.q_per_channel_scales(), path)
            zeros = self._store(value.q_per_channel_zero_points(), path)
            return {"$quantized": [integers, scales, zeros, value.q_per_channel_axis()]}

    def _store(self, tensor: torch.Tensor, path: str) -> str:
        with torch.no_grad():
            stored = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            storage = stored.untyped_storage()
            # safetensors refuses two tensors on one storage; a view of a part would also drag in the whole.
            if storage.data_ptr() in self._storages or storage.nbytes() != stored.nbytes:
                stored = stored.clone()
        self._storages.add(stored.untyped_storage().data_ptr())
        readable = re.sub(r"[^0-9A-Za-z_.\-]+", ".", path).strip(".")[:200]
        name = f"{len(self.tensors):05d}" + (f".{readable}" if readable else "")
        self.tensors[name] = stored
        return name

    def _encode_numpy(self, value: np.ndarray | np.generic, path: str) -> JsonValue:
        code = value.dtype.str
        if not NUMPY_DTYPE.fullmatch(code):
            self._refuse(path, f"it is a numpy value of dtype {value.dtype}")
        if isinstance(value, np.generic):
            return {"$npscalar": [code, value.tobytes().hex()]}
        raw = bytearray(value.tobytes())
        data = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return {"$ndarray": [code, list(value.shape), self._store(data, path)]}


def _encode_float(value: float) -> JsonValue:
    # The bits, because NaN has many and JSON has none.
    if value != value or value in (float("inf"), float("-inf")):
        return {"$float": struct.pack(">d", value).hex()}
    return value


#: Deepest nesting of containers that is written or read.
MAX_DEPTH = 64

#: numpy dtypes whose bytes mean the same everywhere: no objects, no dates, no platform-dependent long double.
NUMPY_DTYPE = re.compile(r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(?:8|16)")

_DAMAGED = "The state file is damaged or forged: restore it from a copy, or resume from another checkpoint."
_HEX = re.compile("-?[0-9a-f]+")


def fail(reason: str) -> NoReturn:
    """Raise the error of a state that cannot be read."""
    raise StateFormatError(f"the state {reason}", hint=_DAMAGED)


class Decoder:
    """Turns the JSON tree of a state back into Python values."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        #: Names of the tensors that the tree referred to so far.
        self.used: set[str] = set()
        self._tensors = tensors

    def decode(self, value: JsonValue, depth: int) -> object:
        """Return the value that ``value`` stands for, ``depth`` levels below the top; raises as `decode_state`."""
        if depth > MAX_DEPTH:
            fail(f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, list):
            return self._list(value, depth + 1)
        if not isinstance(value, dict):
            if isinstance(value, float) and value in (float("inf"), float("-inf")):
                fail("holds a number too large for a float")
            return value
        tag = next((key for key in value if key.startswith("$")), None)
        if tag is None:
            return {key: self.decode(item, depth + 1) for key, item in value.items()}
        if len(value) != 1 or tag not in _BY_TAG:
            fail(f"has an object with the unknown tag {tag[:80]!r}")
        return _BY_TAG[tag](self, value[tag], depth + 1)

    def _list(self, value: JsonValue, depth: int) -> list[object]:
        return [self.decode(item, depth) for item in as_array(value, "a list", fail)]

    def _hashable(self, value: JsonValue, depth: int) -> list[object]:
        items = self._list(value, depth)
        self._check_hashes(items)
        if len(set(items)) != len(items):
            fail("has a set with an element twice")
        return items

    def _pairs(self, value: JsonValue, depth: int) -> dict[object, object]:
        rows = [as_row(pair, 2, "an item of $dict", fail) for pair in as_array(value, "$dict", fail)]
        keys = [self.decode(row[0], depth) for row in rows]
        self._check_hashes(keys)
        result = {key: self.decode(row[1], depth) for key, row in zip(keys, rows, strict=True)}
        if len(result) != len(rows):
            fail("has a dict with a key that stands twice")
        return result

    def _check_hashes(self, items: list[object]) -> None:
        try:
            distinct = len({hash(item) for item in items})
        except TypeError:
            fail("has a key of a dict or an element of a set that neither can hold")
        # Integers can be chosen so that all hashes are equal, which makes filling a dict quadratic.
        if len(items) > 100 and 2 * distinct < len(items):
            fail("has a dict or set whose keys were chosen to collide")

    def _deque(self, value: JsonValue, depth: int) -> object:
        items, limit = as_row(value, 2, "$deque", fail)
        if limit is not None and type(limit) is not int:
            fail("has a deque whose length limit is not an integer")
        decoded = self._list(items, depth)
        if limit is not None and not len(decoded) <= limit < 2**63:
            fail("has a deque longer than its limit")
        return collections.deque(decoded, limit)

    def _int(self, value: JsonValue, depth: int) -> int:
        text = as_text(value, "$int", fail)
        if not _HEX.fullmatch(text):
            fail("has $int that is not hexadecimal")
        return int(text, 16)

    def _unhex(self, value: JsonValue, count: int, tag: str) -> bytes:
        text = as_text(value, tag, fail)
        if len(text) != 2 * count or not _HEX.fullmatch(text) or text.startswith("-"):
            fail(f"has {tag} that is not {2 * count} hexadecimal digits")
        return bytes.fromhex(text)

    def _complex(self, value: JsonValue, depth: int) -> complex:
        real, imaginary = (self.decode(part, depth) for part in as_row(value, 2, "$complex", fail))
        if type(real) is not float or type(imaginary) is not float:
            fail("has $complex that is not two floats")
        return complex(real, imaginary)

    def _bytes(self, value: JsonValue, depth: int) -> bytes:
        try:
            return base64.b64decode(as_text(value, "$bytes", fail), validate=True)
        except (binascii.Error, ValueError):
            fail("has $bytes that are not base64")

    def _tensor(self, value: JsonValue) -> torch.Tensor:
        name = as_text(value, "$tensor", fail)
        found = self._tensors.get(name)
        if found is None:
            raise StateFormatError("the state refers to a tensor that is not there", tensor=name[:200], hint=_DAMAGED)
        self.used.add(name)
        return found

    def _complex_tensor(self, value: JsonValue, depth: int) -> torch.Tensor:
        real = self._tensor(value)
        if real.dtype != torch.float64 or real.dim() < 1 or real.shape[-1] != 2:
            fail("has $complex_tensor that is not pairs of float64")
        return torch.view_as_complex(real.contiguous())

    def _quantized(self, value: JsonValue, depth: int) -> torch.Tensor:
        row = as_array(value, "$quantized", fail)
        row = row if len(row) == 4 else as_row(row, 3, "$quantized", fail)
        integers = self._tensor(row[0])
        if integers.dtype not in (torch.int8, torch.uint8, torch.int32):
            fail("has $quantized whose integers are of another dtype")
        if len(row) == 3:
            scale, zero = self.decode(row[1], depth), row[2]
            if type(scale) is not float or type(zero) is not int or not -(2**31) <= zero < 2**31:
                fail("has $quantized whose scale or zero point is no number")
            return self._made(quantized_per_tensor, integers, scale, zero)
        scales, zeros, axis = self._tensor(row[1]), self._tensor(row[2]), row[3]
        length = integers.shape[axis] if type(axis) is int and 0 <= axis < integers.dim() else None
        if type(axis) is not int or not scales.shape == zeros.shape == (length,):
            fail("has $quantized whose axis, scales or zero points do not fit")
        if not scales.dtype.is_floating_point or zeros.dtype not in (torch.int32, torch.int64, torch.float32):
            fail("has $quantized whose scales or zero points are of another dtype")
        return self._made(quantized_per_channel, integers, scales, zeros, axis)

    @staticmethod
    def _made(make: Callable[..., torch.Tensor], *args: object) -> torch.Tensor:
        try:
            return make(*args)
        except RuntimeError as error:
            fail(f"has $quantized of which torch makes no tensor: {str(error)[:200]}")

    def _size(self, value: JsonValue, depth: int) -> object:
        return torch.Size(as_counts(value, "$size", fail))

    def _dtype(self, value: JsonValue, depth: int) -> object:
        name = as_text(value, "$dtype", fail)
        if name not in TORCH_DTYPES:
            fail(f"names the unknown dtype {name[:80]!r}")
        return TORCH_DTYPES[name]

    def _numpy_dtype(self, value: JsonValue) -> np.dtype[np.generic]:
        code = as_text(value, "a numpy dtype", fail)
        if not NUMPY_DTYPE.fullmatch(code):
            fail(f"names the numpy dtype {code[:80]!r}, which is not allowed")
        return np.dtype(code)

    def _npscalar(self, value: JsonValue, depth: int) -> object:
        code, text = as_row(value, 2, "$npscalar", fail)
        dtype = self._numpy_dtype(code)
        return np.frombuffer(self._unhex(text, dtype.itemsize, "$npscalar"), dtype=dtype)[0]

    def _ndarray(self, value: JsonValue, depth: int) -> object:
        code, sizes, name = as_row(value, 3, "$ndarray", fail)
        dtype, shape, data = self._numpy_dtype(code), as_counts(sizes, "$ndarray", fail), self._tensor(name)
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != dtype.itemsize * math.prod(shape):
            fail("has $ndarray whose tensor does not hold its bytes")
        try:
            return np.frombuffer(data.cpu().numpy().tobytes(), dtype=dtype).reshape(shape).copy()
        except ValueError as error:
            fail(f"has $ndarray of an impossible shape: {error}")


#: How the value of an object with one of these tags is read.
_BY_TAG: dict[str, Callable[[Decoder, JsonValue, int], object]] = {
    "$int": Decoder._int,
    "$float": lambda self, value, depth: struct.unpack(">d", self._unhex(value, 8, "$float"))[0],
    "$complex": Decoder._complex,
    "$bytes": Decoder._bytes,
    "$tuple": lambda self, value, depth: tuple(self._list(value, depth)),
    "$set": lambda self, value, depth: set(self._hashable(value, depth)),
    "$frozenset": lambda self, value, depth: frozenset(self._hashable(value, depth)),
    "$dict": Decoder._pairs,
    "$ordered_dict": lambda self, value, depth: collections.OrderedDict(self._pairs(value, depth)),
    "$counter": lambda self, value, depth: collections.Counter(cast("dict[object, int]", self._pairs(value, depth))),
    "$deque": Decoder._deque,
    "$tensor": lambda self, value, depth: self._tensor(value),
    "$complex_tensor": Decoder._complex_tensor,
    "$quantized": Decoder._quantized,
    "$bytesio": lambda self, value, depth: io.BytesIO(self._bytes(value, depth)),
    "$size": Decoder._size,
    "$dtype": Decoder._dtype,
    "$npscalar": Decoder._npscalar,
    "$ndarray": Decoder._ndarray,
}
