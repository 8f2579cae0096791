"""The data of the page about a checkpoint: tables and columns of numbers, as JSON that may stand in HTML. Pure.

Columns instead of one object for each tensor: a model has tens of thousands, and a browser reads a column of numbers as
fast as it comes. Names and shapes that many have in common stand once, in a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from shardwise.geometry import DTYPE_BYTES
from shardwise.ops.modules import layer_of, module_of

if TYPE_CHECKING:
    from shardwise.ops.diff import DiffReport, TensorDifference
    from shardwise.ops.inspect import CheckpointDescription, TensorDescription

#: What became of a tensor: not compared; equal; its values differ by so much; they differ, and nobody read by how much;
#: its shape differs, or its dtype and nobody read the values; the other lacks it. As in ``html/data.js``.
UNKNOWN, EQUAL, CHANGED, DIFFERS, ANOTHER, ADDED = range(6)

#: Markup cannot begin without the first, end without the second, nor an entity without the third.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


class _Table:
    """Distinct values by number, in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def number(self, value: Hashable) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[Hashable]:
        return list(self._numbers)


def page_data(found: CheckpointDescription, change: DiffReport | None = None) -> str:
    """The page's data, as JSON without a ``<``, ``>`` or ``&``; of a change, what is shown is the second of both."""
    data = {
        "name": found.path.name or str(found.path),
        "path": str(found.path),
        "facts": _facts(found),
        "manifest": found.verifiable,
        "files": [[f.path, f.size, f.header_bytes, f.format, f.writer, f.crc32c] for f in found.files],
        "unread": found.unread,
        **_columns(found),
        "change": None if change is None else _change(found, change),
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _facts(found: CheckpointDescription) -> list[tuple[str, str]]:
    facts = {
        "Step": found.step,
        "Epoch": found.epoch,
        "Ranks": found.ranks or "not recorded",
        "Written by": found.saved_by or "not recorded",
        "Format": ", ".join(found.formats) or None,
        "Manifest": "yes, with digests" if found.verifiable else "none: no digests",
    }
    facts |= {f"Metric {name}": f"{value:g}" for name, value in found.metrics.items()}
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _columns(found: CheckpointDescription) -> dict[str, object]:
    dtypes, shapes, components, modules, layers = (_Table() for _ in range(5))
    numbers = {file.path: number for number, file in enumerate(found.files)}
    tensors: list[tuple[object, ...]] = []
    pieces: list[tuple[object, ...]] = []
    for number, tensor in enumerate(found.tensors):
        name, shape, dtype = tensor.spec
        component = components.number(tensor.component)
        module, layer = modules.number(module_of(name)), layers.number((component, layer_of(name)))
        tensors.append((name, component, module, layer, dtypes.number(dtype), shapes.number(shape), tensor.crc32c))
        for file, offset, nbytes, crc in tensor.pieces:
            if file in numbers:
                pieces.append((number, numbers[file], offset, nbytes, crc))
    return {
        "dtypes": [[code, DTYPE_BYTES[str(code)]] for code in dtypes.values],
        "shapes": shapes.values,
        "components": components.values,
        "modules": modules.values,
        "layers": layers.values,
        "tensors": _by_column(("name", "component", "module", "layer", "dtype", "shape", "crc"), tensors),
        "pieces": _by_column(("tensor", "file", "offset", "nbytes", "crc"), pieces),
    }


def _by_column(names: Sequence[str], rows: Sequence[tuple[object, ...]]) -> dict[str, list[object]]:
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def _change(found: CheckpointDescription, change: DiffReport) -> dict[str, object]:
    place = _component_of(found, change)
    equal, added, unread = set(change.equal), set(change.only_b), set(change.uncompared)
    differing = {(each.component, each.b.name): each for each in change.tensors}

    def status(key: tuple[str, str]) -> int:
        if key in differing:
            return _kind(differing[key])
        if key in unread:
            return UNKNOWN
        return EQUAL if key in equal else ADDED if key in added else UNKNOWN

    keys = [(place(tensor), tensor.spec.name) for tensor in found.tensors]
    rows = [(number, differing[key]) for number, key in enumerate(keys) if key in differing]
    return {
        "against": str(change.a),
        "status": [status(key) for key in keys],
        "tensor": [number for number, _ in rows],
        "relative": [_number(each.relative) for _, each in rows],
        "largest": [_number(each.largest) for _, each in rows],
        "elements": [each.elements for _, each in rows],
        "was": [f"{each.a.dtype} {list(each.a.shape)}" for _, each in rows],
        "gone": change.only_a,
        "configs": [[each.file, each.key, _shown(each.a), _shown(each.b)] for each in change.configs],
        "notes": change.notes,
    }


def _kind(difference: TensorDifference) -> int:
    if difference.relative is not None:
        return CHANGED
    return DIFFERS if difference.a == difference.b else ANOTHER


def _component_of(found: CheckpointDescription, change: DiffReport) -> Callable[[TensorDescription], str]:
    """The component under which a report has a tensor: of a directory without a manifest, folders are components."""
    known = {name for name, _ in (*change.equal, *change.only_b, *change.uncompared)}
    known |= {each.component for each in change.tensors}
    one = len(found.components) == 1 or any(file.path == ".metadata" for file in found.files)  # DCP is compared whole
    alone = next(iter(known)) if len(known) == 1 and one else None

    def place(tensor: TensorDescription) -> str:
        own = tensor.component
        if own in known:
            return own
        return alone if alone is not None else next((name for name in known if own.startswith(f"{name}/")), own)

    return place


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "infinite"


def _shown(value: object) -> str:
    return "absent" if value is None else json.dumps(value)
