"""Writes and copies the small files of a model; what the file system refuses becomes a `StorageError`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from shardwise.comm import JsonValue
from shardwise.errors import StorageError


def write_json(path: Path, entries: Mapping[str, JsonValue] | Mapping[str, int] | Mapping[str, str]) -> None:
    """Write a JSON object, its entries in the order given."""
    write_text(path, as_text(entries))


def as_text(entries: Mapping[str, JsonValue] | Mapping[str, int] | Mapping[str, str]) -> str:
    """A JSON object as `write_json` writes it."""
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, making the directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError.from_os(error, path=path) from error


def copy_file(source: Path, destination: Path) -> None:
    """Copy the bytes of a file, making the directory; a link is followed."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    except OSError as error:
        raise StorageError.from_os(error, path=error.filename or destination) from error
