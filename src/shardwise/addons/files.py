"""Writes and copies the small files of a model, through the storage of the call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shardwise.addons.base import SaveHookArgs
from shardwise.comm import JsonValue
from shardwise.disk import sequential
from shardwise.disk.guarded import read_whole
from shardwise.disk.names import files_under
from shardwise.disk.storage import LOCAL, current, local_path, storage_errors, using
from shardwise.errors import FormatError

#: No file of Python comes near this.
_MAX_TEXT_BYTES = 2**28


def write_json(path: Path, entries: Mapping[str, JsonValue] | Mapping[str, int] | Mapping[str, str]) -> None:
    """Write a JSON object, its entries in the order given."""
    write_text(path, as_text(entries))


def as_text(entries: Mapping[str, JsonValue] | Mapping[str, int] | Mapping[str, str]) -> str:
    """A JSON object as `write_json` writes it."""
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, making the directory."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, making the directory; the save makes it durable."""
    current().make_directory(path.parent)
    current().create(path, len(content), content)


def read_source(path: Path) -> bytes:
    """The bytes of a file of Python."""
    return read_whole(path, _MAX_TEXT_BYTES, FormatError)


def copy_file(source: Path, destination: Path) -> None:
    """Copy the bytes of a file, making the directory; a link is followed."""
    sequential.copy_file(source, destination, current())


@contextmanager
def written_locally(directory: Path) -> Iterator[Path]:
    """Give a private directory of this machine to a library that writes files by itself, and copy what it wrote."""
    with storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="shardwise-") as private:
        top = Path(private)
        with using(LOCAL):
            yield top
            files = files_under(top)
        for path in files:
            sequential.copy_file(path, directory / path.relative_to(top), current(), LOCAL)


@contextmanager
def local_arguments(args: SaveHookArgs) -> Iterator[SaveHookArgs]:
    """The arguments of a hook that may write files by itself: with paths of this machine.

    Where the storage's files are on no disk of it, they are those of a private directory, as in `written_locally`.
    """
    top = Path(args["model_path"])
    place = local_path(top)
    if place == top:
        yield args
    elif place is not None:
        with using(LOCAL):
            yield _moved(args, top, place)
    else:
        with written_locally(top) as private:
            yield _moved(args, top, private)


def _moved(args: SaveHookArgs, top: Path, place: Path) -> SaveHookArgs:
    def moved(path: str | None) -> str | None:
        return None if path is None else str(place / Path(path).relative_to(top))

    moved_args: SaveHookArgs = {
        "model_path": str(place),
        "hf_metadata_dir": moved(args.get("hf_metadata_dir")),
        "consolidated_path": moved(args.get("consolidated_path")),
    }
    return args | moved_args
