"""Values that travel between the stages: what a tensor is, and which part of it somebody holds.

Pure data, no torch, no I/O. Shapes and offsets are in elements unless a name says bytes; the element order is row-major
(C order), the order of the safetensors format. Models have tens of thousands of each, so they are tuples, which the
interpreter itself makes, hashes and compares where a frozen dataclass does all of it in Python.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from shardwise.errors import MisuseError

#: Bytes per element of every dtype of the safetensors format that a torch tensor can have.
#: Source: the ``Dtype`` enumeration of the safetensors format, whose order it keeps (it decides the order in a file).
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}


class _Spec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str


class TensorSpec(_Spec):
    """What a whole tensor is, whoever holds it.

    Attributes:
        name: Name in the file (the hub's name for an exported model).
        shape: Global shape in elements; ``()`` for a scalar.
        dtype: safetensors dtype code, a key of `DTYPE_BYTES`.

    Raises:
        MisuseError: The dtype code is unknown.
    """

    __slots__ = ()

    def __new__(cls, name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:  # noqa: D102 - see the class
        if dtype not in DTYPE_BYTES:
            raise MisuseError(f"dtype {dtype!r} has no code in the safetensors format", tensor=name)
        return tuple.__new__(cls, (name, shape, dtype))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Box(NamedTuple):
    """A rectangular region of a tensor.

    ``offsets[d] <= index[d] < offsets[d] + sizes[d]`` for every dimension ``d``.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    @lru_cache(maxsize=4096)  # tensors of one kind have equal shapes
    def whole(shape: tuple[int, ...]) -> Box:
        """The region that covers all of ``shape``."""
        return Box((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements in the region (1 for a scalar)."""
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index, for each dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common region, or ``None`` where the two share no element."""
        offsets = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = tuple(min(a, b) for a, b in zip(self.ends, other.ends, strict=True))
        sizes = tuple(e - o for o, e in zip(offsets, ends, strict=True))
        return Box(offsets, sizes) if all(s > 0 for s in sizes) else None

    def relative_to(self, outer: Box) -> Box:
        """This region in the coordinates of ``outer``, which contains it."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)
