"""Writes what `inspect` tells as one page: a map of the files with every tensor in its place.

The page is one HTML file that fetches nothing. Its style and program are ``html/`` beside this file; what comes from
the checkpoint stands in it as JSON alone, in which no markup can be, and a policy in its head lets the browser run this
program and no other.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.disk.names import is_directory, is_there
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage, current, storage_errors, using
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.format.sniff import what_is_file
from shardwise.geometry import DTYPE_BYTES
from shardwise.ops.inspect import inspect
from shardwise.ops.modules import layer_of, module_of
from shardwise.ops.targets import refuse_inside

if TYPE_CHECKING:
    from shardwise.ops.diff import DiffReport
    from shardwise.ops.inspect import CheckpointDescription, TensorDescription
    from shardwise.ops.verify import Progress

__all__ = ["PageReport", "write_page"]

#: The program's parts, in the order in which they stand in the page.
_SCRIPTS = ("data.js", "colours.js", "map.js", "list.js", "panels.js", "page.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, slots=True)
class PageReport:
    """The page that was written.

    Attributes:
        html: The file.
        nbytes: Its bytes.
        path: The checkpoint that it shows.
        against: The one that it is compared with.
        tensors: Number of tensors on it.
        damaged: Files that are not what their format promises: their tensors are not on it, the reason is.
    """

    html: Path
    nbytes: int
    path: Path
    against: Path | None
    tensors: int
    damaged: tuple[str, ...] = ()


def write_page(
    path: str | os.PathLike[str],
    html: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    values: bool = True,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> PageReport:
    """Write a page about a checkpoint, or about anything else that `inspect` describes.

    Args:
        path: What to show: a checkpoint, a part of one, a model; of a root its newest checkpoint.
        html: The file to write. A page that is there is replaced, and nothing else.
        against: A checkpoint or model from which the changes are shown.
        values: Read the tensors whose digests differ or that have none; otherwise digests alone are compared.
        progress: Called with the bytes read of both and the bytes to read.
        storage: Where all of them are; the mounted file systems by default.

    Raises:
        MisuseError: Something else than a page is at ``html``, or it is inside of a checkpoint.
        ShardwiseError: As `inspect`, and with ``against`` as `diff`.
    """
    with using(storage or current()):
        target = Path(html).absolute()
        _check_target(target)
        found = inspect(path)
        change = None
        if against is not None:
            from shardwise.ops.diff import diff  # with torch, which the page alone does not need

            change = diff(against, path, values=values, progress=progress)
        content = _page(found.path.name or str(found.path), page_data(found, change))
        _write(target, content)
        compared = None if change is None else change.a
        return PageReport(target, len(content), found.path, compared, len(found.tensors), found.damaged)


def _check_target(target: Path) -> None:
    """Refuse to write where something else than a page would be lost, or a checkpoint would get a file too many."""
    hint = "Name another file for the page."
    if not is_directory(target.parent):
        raise MisuseError("the directory that the page is to be in does not exist", path=target, hint="Make it first.")
    if is_directory(target):
        raise MisuseError("the page is to be written where a directory is", path=target, hint=hint)
    if is_there(target):
        there = what_is_file(target)
        if there is None or there.name != "an HTML page":
            raise MisuseError("the page would replace a file that is no page", path=target, hint=hint)
    refuse_inside(target)


def _write(target: Path, content: bytes) -> None:
    storage = current()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    with storage_errors(target):
        try:
            write_file(storage, beside, content)
            storage.rename(beside, target)
        except BaseException as error:
            storage.remove_file(beside)
            if isinstance(error, ShardwiseError):
                error.path = str(target)  # the file beside it is gone
            raise


def _page(title: str, data: str) -> bytes:
    style, script = _asset("page.css"), "\n".join(_asset(name) for name in _SCRIPTS)
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'",
        "style": style,
        "data": data,
        "script": script,
    }
    # In one pass, so that nothing that was put in is looked at.
    page = _PLACE.sub(lambda place: parts[place[1]], _asset("page.html"))
    return page.encode("utf-8", "backslashreplace")  # names of files may have bytes that are no text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    found = pkgutil.get_data(__package__ or "", f"html/{name}")
    assert found is not None  # our own loader has it
    return found.decode()


# --- its data, as JSON that may stand in HTML; pure ------------------------------------------------------------------


#: What became of a tensor: not compared; equal; its values differ by so much; they differ, and nobody read by how much;
#: its shape differs, or its dtype and nobody read the values; the other lacks it. As in ``html/data.js``.
UNKNOWN, EQUAL, CHANGED, DIFFERS, ANOTHER, ADDED = range(6)

#: Markup cannot begin without the first, end without the second, nor an entity without the third.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def page_data(found: CheckpointDescription, change: DiffReport | None = None) -> str:
    """The page's data, as JSON without a ``<``, ``>`` or ``&``; of a change, what is shown is the second of both."""
    facts = {
        "Step": found.step,
        "Epoch": found.epoch,
        "Ranks": found.ranks or "not recorded",
        "Written by": found.saved_by or "not recorded",
        "Format": ", ".join(found.formats) or None,
        "Manifest": "yes, with digests" if found.verifiable else "none: no digests",
        **{f"Metric {name}": f"{value:g}" for name, value in found.metrics.items()},
    }
    data = {
        "name": found.path.name or str(found.path),
        "path": str(found.path),
        "facts": [(name, str(value)) for name, value in facts.items() if value is not None],
        "manifest": found.verifiable,
        "files": [[f.path, f.size, f.header_bytes, f.format, f.writer, f.crc32c] for f in found.files],
        "unread": found.unread,
        **_columns(found),
        "change": None if change is None else _change(found, change),
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _columns(found: CheckpointDescription) -> dict[str, object]:
    # Tables that number distinct values in order of appearance.
    tables = [defaultdict[Hashable, int](count().__next__) for _ in range(5)]
    dtypes, shapes, components, modules, layers = tables
    numbers = {file.path: number for number, file in enumerate(found.files)}
    tensors: list[tuple[object, ...]] = []
    pieces: list[tuple[object, ...]] = []
    for number, tensor in enumerate(found.tensors):
        name, shape, dtype = tensor.spec
        component = components[tensor.component]
        module, layer = modules[module_of(name)], layers[component, layer_of(name)]
        tensors.append((name, component, module, layer, dtypes[dtype], shapes[shape], tensor.crc32c))
        for file, offset, nbytes, crc in tensor.pieces:
            if file in numbers:
                pieces.append((number, numbers[file], offset, nbytes, crc))
    return {
        "dtypes": [[code, DTYPE_BYTES[str(code)]] for code in dtypes],
        "shapes": list(shapes),
        "components": list(components),
        "modules": list(modules),
        "layers": list(layers),
        "tensors": _by_column(("name", "component", "module", "layer", "dtype", "shape", "crc"), tensors),
        "pieces": _by_column(("tensor", "file", "offset", "nbytes", "crc"), pieces),
    }


def _by_column(names: Sequence[str], rows: Sequence[tuple[object, ...]]) -> dict[str, list[object]]:
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def _change(found: CheckpointDescription, change: DiffReport) -> dict[str, object]:
    place = _component_of(found, change)
    differing = {(each.component, each.b.name): each for each in change.tensors}
    status = dict.fromkeys(change.equal, EQUAL) | dict.fromkeys(change.only_b, ADDED)
    for key, each in differing.items():
        status[key] = CHANGED if each.relative is not None else DIFFERS if each.a == each.b else ANOTHER
    keys = [(place(tensor), tensor.spec.name) for tensor in found.tensors]
    rows = [(number, differing[key]) for number, key in enumerate(keys) if key in differing]
    return {
        "against": str(change.a),
        "status": [status.get(key, UNKNOWN) for key in keys],
        "tensor": [number for number, _ in rows],
        "relative": [_number(each.relative) for _, each in rows],
        "largest": [_number(each.largest) for _, each in rows],
        "elements": [each.elements for _, each in rows],
        "was": [f"{each.a.dtype} {list(each.a.shape)}" for _, each in rows],
        "gone": change.only_a,
        "configs": [[each.file, each.key, _shown(each.a), _shown(each.b)] for each in change.configs],
        "notes": change.notes,
    }


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
