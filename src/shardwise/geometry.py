"""Values that travel between the stages: what a tensor is, and which part of it somebody holds.

Pure data, no torch, no I/O. Shapes and offsets are in elements unless a name says bytes; the element order is row-major
(C order), the order of the safetensors format. Models have tens of thousands of each, so they are tuples, which the
interpreter itself makes, hashes and compares where a frozen dataclass does all of it in Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from shardwise.errors import MisuseError

# Source: the ``Dtype`` enumeration of the safetensors format, whose order it keeps (it decides that in a file), and
# the code that its Python binding (0.8) writes for each torch dtype.
_DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "C64": (8, "complex64"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}
#: Bytes per element of every dtype of the safetensors format that a torch tensor can have.
DTYPE_BYTES = {code: nbytes for code, (nbytes, _) in _DTYPES.items()}
#: torch's names of the same.
TORCH_NAMES = {code: name for code, (_, name) in _DTYPES.items()}


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


@dataclass(frozen=True, slots=True)
class Stride:
    """How a box lies in its tensor."""

    outer: int  #: Number of leading dimensions over which the runs are enumerated.
    run: int  #: Elements in each run.
    count: int  #: Number of runs.


@lru_cache(maxsize=65536)
def stride_of(box: Box, shape: tuple[int, ...]) -> Stride:
    """Into how many runs of which length a box falls in a row-major tensor of ``shape``."""
    outer = len(shape)
    while outer > 0 and box.sizes[outer - 1] == shape[outer - 1]:
        outer -= 1
    # Dimension outer - 1 is the last one that is cut; from there on the box is contiguous.
    outer = max(outer - 1, 0)
    while outer > 0 and box.sizes[outer - 1] == 1:
        outer -= 1
    return Stride(outer, math.prod(box.sizes[outer:]), math.prod(box.sizes[:outer]))


def flat_offset(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Row-major position of an element."""
    position = 0
    for i, n in zip(index, shape, strict=True):
        position = position * n + i
    return position


@lru_cache(maxsize=65536)  # tensors of one kind have equal boxes
def only_run(box: Box, shape: tuple[int, ...]) -> int | None:
    """First element of a box that is one run of a row-major tensor of ``shape``; ``None`` for several runs or none."""
    if box.numel == 0 or stride_of(box, shape).count != 1:
        return None
    return flat_offset(box.offsets, shape)


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Enumerate the runs of a box in file order: first element in the tensor, number of elements, index of the run.

    The index is along the outer dimensions, and relative to the box.
    """
    if box.numel == 0:
        return
    how = stride_of(box, shape)
    inner = math.prod(shape[how.outer :])
    tail = flat_offset(box.offsets[how.outer :], shape[how.outer :])
    for index in product(*(range(n) for n in box.sizes[: how.outer])):
        at = tuple(i + o for i, o in zip(index, box.offsets[: how.outer], strict=True))
        yield flat_offset(at, shape[: how.outer]) * inner + tail, how.run, index


def split_rows(box: Box, parts: int, index: int) -> Box | None:
    """Part ``index`` of ``parts`` nearly equal pieces along the first dimension of several rows; ``None`` if empty."""
    for dim, size in enumerate(box.sizes):
        if size > 1:
            low, high = size * index // parts, size * (index + 1) // parts
            if low == high:
                return None
            return Box(
                (*box.offsets[:dim], box.offsets[dim] + low, *box.offsets[dim + 1 :]),
                (*box.sizes[:dim], high - low, *box.sizes[dim + 1 :]),
            )
    return box if index == 0 else None


#: Most dimensions along which one tensor may be split; real layouts use one to three.
MAX_SPLIT_DIMS = 6


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Say whether ``boxes``, each inside ``shape``, cover every element exactly once.

    Linear in the number of boxes, whatever their order. Counting the corners of the boxes with alternating signs is a
    finite difference of "how many boxes cover this element", which determines that count; so the boxes tile the tensor
    if and only if their corners add up to those of the tensor. Empty boxes count for nothing. False also where the
    boxes split more than `MAX_SPLIT_DIMS` dimensions.
    """
    whole = Box.whole(shape)
    if not whole.numel:
        return True
    if len(boxes) == 1:
        return boxes[0] == whole
    solid = [box for box in boxes if box.numel]
    split = [d for d, size in enumerate(shape) if any(box.sizes[d] != size for box in solid)]
    if not split:
        return len(solid) == 1
    if len(split) == 1:
        d, end = split[0], 0
        for box in sorted(solid, key=lambda box: box.offsets[d]):
            if box.offsets[d] != end:
                return False
            end += box.sizes[d]
        return end == shape[d]
    if len(split) > MAX_SPLIT_DIMS:
        return False
    corners: dict[tuple[int, ...], int] = {}
    for box in solid:
        _add_corners(corners, box, split, 1)
    _add_corners(corners, whole, split, -1)
    return not any(corners.values())


def overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of these boxes, which are not empty, share an element."""
    # Along the dimension with the most distinct offsets.
    dim = max(range(len(boxes[0].sizes)), key=lambda d: len({box.offsets[d] for box in boxes}))
    near: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        near = [other for other in near if other.ends[dim] > box.offsets[dim]]
        if any(other.intersect(box) is not None for other in near):
            return True
        near.append(box)
    return False


def bounding(boxes: Sequence[Box]) -> Box:
    """The smallest box around some boxes of the same tensor."""
    low = tuple(min(ns) for ns in zip(*(box.offsets for box in boxes), strict=True))
    high = tuple(max(ns) for ns in zip(*(box.ends for box in boxes), strict=True))
    return Box(low, tuple(h - n for n, h in zip(low, high, strict=True)))


def covers_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """The answer of `tiles`, and also for fine grids, which `tiles` cannot decide: those are compared box by box."""
    if tiles(shape, boxes):
        return True
    solid = [box for box in boxes if box.numel]
    return len(solid) > 1 and sum(box.numel for box in solid) == Box.whole(shape).numel and not overlap(solid)


def _add_corners(corners: dict[tuple[int, ...], int], box: Box, split: Sequence[int], weight: int) -> None:
    for upper in product((0, 1), repeat=len(split)):
        corner = tuple([box.offsets[d] + side * box.sizes[d] for d, side in zip(split, upper, strict=True)])
        corners[corner] = corners.get(corner, 0) + (-weight if sum(upper) % 2 else weight)
