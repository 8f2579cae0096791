"""The reading half of `shardwise.format.state_json`: a checked JSON tree and tensors in, Python values out."""

from __future__ import annotations

import base64
import binascii
import collections
import io
import math
import re
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn, cast

from shardwise.errors import StateFormatError
from shardwise.format.strict_json import JsonValue, as_array, as_counts, as_row, as_text

if TYPE_CHECKING:
    import numpy as np
    import torch

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
    """Turns the JSON tree of a state back into Python values.

    Attributes:
        used: Names of the tensors that the tree referred to so far.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.used: set[str] = set()
        self._tensors = tensors
        self._by_tag: dict[str, Callable[[JsonValue, int], object]] = {
            "$int": self._int,
            "$float": self._float,
            "$complex": self._complex,
            "$bytes": self._bytes,
            "$tuple": lambda value, depth: tuple(self._list(value, depth)),
            "$set": lambda value, depth: set(self._hashable(value, depth)),
            "$frozenset": lambda value, depth: frozenset(self._hashable(value, depth)),
            "$dict": self._pairs,
            "$ordered_dict": lambda value, depth: collections.OrderedDict(self._pairs(value, depth)),
            "$counter": self._counter,
            "$deque": self._deque,
            "$tensor": lambda value, depth: self._tensor(value),
            "$complex_tensor": self._complex_tensor,
            "$quantized": self._quantized,
            "$bytesio": lambda value, depth: io.BytesIO(self._bytes(value, depth)),
            "$size": self._size,
            "$dtype": self._dtype,
            "$npscalar": self._npscalar,
            "$ndarray": self._ndarray,
        }

    def decode(self, value: JsonValue, depth: int) -> object:
        """Return the value that ``value`` stands for, ``depth`` levels below the top.

        Raises:
            StateFormatError: The tree is malformed or does not fit the tensors.
        """
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
        if len(value) != 1 or tag not in self._by_tag:
            fail(f"has an object with the unknown tag {tag[:80]!r}")
        return self._by_tag[tag](value[tag], depth + 1)

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

    def _counter(self, value: JsonValue, depth: int) -> object:
        return collections.Counter(cast("dict[object, int]", self._pairs(value, depth)))

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

    def _float(self, value: JsonValue, depth: int) -> float:
        raw = self._unhex(value, 8, "$float")
        return cast("float", struct.unpack(">d", raw)[0])

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
        import torch

        real = self._tensor(value)
        if real.dtype != torch.float64 or real.dim() < 1 or real.shape[-1] != 2:
            fail("has $complex_tensor that is not pairs of float64")
        return torch.view_as_complex(real.contiguous())

    def _quantized(self, value: JsonValue, depth: int) -> torch.Tensor:
        import torch

        from shardwise.upstream.torch_tensors import quantized_per_channel, quantized_per_tensor

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
        import torch

        return torch.Size(as_counts(value, "$size", fail))

    def _dtype(self, value: JsonValue, depth: int) -> object:
        import torch

        name = as_text(value, "$dtype", fail)
        found = vars(torch).get(name)
        if not isinstance(found, torch.dtype):
            fail(f"names the unknown dtype {name[:80]!r}")
        return found

    def _numpy_dtype(self, value: JsonValue) -> np.dtype[np.generic]:
        import numpy as np

        code = as_text(value, "a numpy dtype", fail)
        if not NUMPY_DTYPE.fullmatch(code):
            fail(f"names the numpy dtype {code[:80]!r}, which is not allowed")
        return np.dtype(code)

    def _npscalar(self, value: JsonValue, depth: int) -> object:
        import numpy as np

        code, text = as_row(value, 2, "$npscalar", fail)
        dtype = self._numpy_dtype(code)
        return np.frombuffer(self._unhex(text, dtype.itemsize, "$npscalar"), dtype=dtype)[0]

    def _ndarray(self, value: JsonValue, depth: int) -> object:
        import numpy as np
        import torch

        code, sizes, name = as_row(value, 3, "$ndarray", fail)
        dtype, shape, data = self._numpy_dtype(code), as_counts(sizes, "$ndarray", fail), self._tensor(name)
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != dtype.itemsize * math.prod(shape):
            fail("has $ndarray whose tensor does not hold its bytes")
        try:
            return np.frombuffer(data.cpu().numpy().tobytes(), dtype=dtype).reshape(shape).copy()
        except ValueError as error:
            fail(f"has $ndarray of an impossible shape: {error}")
