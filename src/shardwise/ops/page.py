"""Writes what `inspect` tells as one page: a map of the files with every tensor in its place.

The page is one HTML file that fetches nothing. Its style and program are ``html/`` beside this file; what comes from
the checkpoint stands in it as JSON alone, in which no markup can be, and a policy in its head lets the browser run this
program and no other.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.disk.names import is_directory, is_there
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage, current, storage_errors, using
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.format.sniff import what_is_file
from shardwise.ops.aside import refuse_inside
from shardwise.ops.inspect import inspect
from shardwise.ops.page_data import page_data

if TYPE_CHECKING:
    from shardwise.ops.verify import Progress

__all__ = ["PageReport", "write_page"]

_TEMPLATE = "page.html"
_STYLE = "page.css"
#: The program's parts, in the order in which they stand in the page.
_SCRIPTS = ("data.js", "colours.js", "map.js", "list.js", "panels.js", "page.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_PAGE = "an HTML page"


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
        if there is None or there.name != _PAGE:
            raise MisuseError("the page would replace a file that is no page", path=target, hint=hint)
    refuse_inside(target)


def _write(target: Path, content: bytes) -> None:
    storage = current()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    with storage_errors(target):
        try:
            write_file(storage, beside, content)
            storage.rename(beside, target)
        except (OSError, ShardwiseError) as error:
            storage.remove_file(beside)
            if isinstance(error, ShardwiseError):
                error.path = str(target)  # the file beside it is gone
            raise


def _page(title: str, data: str) -> bytes:
    style, script = _asset(_STYLE), "\n".join(_asset(name) for name in _SCRIPTS)
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'",
        "style": style,
        "data": data,
        "script": script,
    }
    # In one pass, so that nothing that was put in is looked at.
    page = _PLACE.sub(lambda place: parts[place[1]], _asset(_TEMPLATE))
    return page.encode("utf-8", "backslashreplace")  # names of files may have bytes that are no text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    found = pkgutil.get_data(__package__ or "", f"html/{name}")
    assert found is not None  # our own loader has it
    return found.decode()
