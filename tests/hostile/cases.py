"""Ways to spoil a whole checkpoint: every file of it, its manifest, its pointers."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.format.builders import sign, tensor_file

NAME = "epoch_0_step_2"
FILES = (
    "manifest.json",
    "model/consolidated/model.safetensors",
    "model/consolidated/model.safetensors.index.json",
    "optim/optimizer.json",
    "optim/shard-00001-optim-00001-of-00001.safetensors",
    "extra/seen.json",
    "rng/rng.json",
    "rng/rng.safetensors",
    "losses.json",
    "config.yaml",
)

#: Does something to ``root/NAME`` or to ``root``; ``secret`` is a file outside the root.
Spoil = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Case:
    """One spoilt checkpoint.

    Attributes:
        name: What was done.
        spoil: Does it.
        detected: `verify` must not call the result whole.
        links: It is reached through links, which a load of somebody else's directory follows on purpose.
    """

    name: str
    spoil: Spoil
    detected: bool = True
    links: bool = False


class Evil:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch owned",)


def _fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, _: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _bytes(data: bytes) -> Spoil:
    def write(path: Path, _: Path) -> None:
        path.write_bytes(data)

    return write


def _sparse(path: Path, _: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**41)


_OVERFLOW = {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}

REPLACEMENTS: dict[str, tuple[Spoil, bool]] = {
    "a pipe": (_fifo, False),
    "a socket": (_socket, False),
    "a directory": (lambda path, _: path.mkdir(), False),
    "a link to a device": (lambda path, _: path.symlink_to("/dev/zero"), True),
    "a link outside": (lambda path, secret: path.symlink_to(secret), True),
    "a link in a circle": (lambda path, _: path.symlink_to(path.name), True),
    "empty": (_bytes(b""), False),
    "zeros": (_bytes(bytes(4096)), False),
    "not text": (_bytes(bytes(range(256)) * 20), False),
    "deep arrays": (_bytes(b"[" * 300_000), False),
    "deep objects": (_bytes(b'{"a":' * 200_000), False),
    "a number of a million digits": (_bytes(b'{"a":' + b"9" * 1_000_000 + b"}"), False),
    "NaN": (_bytes(b'{"a":NaN,"b":Infinity,"c":-Infinity}'), False),
    "half an object": (_bytes(b'{"format":"x","a":[1,2,'), False),
    "a header of petabytes": (_bytes(struct.pack("<Q", 2**60) + b"{}"), False),
    "a shape that overflows": (_bytes(tensor_file(_OVERFLOW, 4)), False),
    "a pickle that runs code": (_bytes(pickle.dumps(Evil())), False),
    "two terabytes of nothing": (_sparse, False),
    "a state that names a class": (_bytes(b'{"__class__":"os.system","args":["touch owned"],"version":1}'), False),
}


def _replace(relative: str, how: Spoil, manifest: bool) -> Spoil:
    def spoil(root: Path, secret: Path) -> None:
        path = root / NAME / relative
        path.unlink()
        if not manifest:
            (root / NAME / "manifest.json").unlink(missing_ok=True)
        how(path, secret)

    return spoil


def _manifest(change: Callable[[dict[str, object]], None]) -> Spoil:
    """A manifest that says something else and has the right digest of its own."""

    def spoil(root: Path, _: Path) -> None:
        path = root / NAME / "manifest.json"
        record = json.loads(path.read_bytes())
        record.pop("crc32c")
        change(record)
        path.write_bytes(sign(json.dumps(record)[:-1].encode() + b","))

    return spoil


def _rename_file(name: str) -> Callable[[dict[str, object]], None]:
    def change(record: dict[str, object]) -> None:
        record["files"][-1]["path"] = name  # type: ignore[index]

    return change


def _set(path: str, value: object) -> Callable[[dict[str, object]], None]:
    def change(record: dict[str, object]) -> None:
        place: object = record
        *parents, last = path.split(".")
        for key in parents:
            place = place[int(key) if key.isdigit() else key]  # type: ignore[index]
        place[int(last) if last.isdigit() else last] = value  # type: ignore[index]

    return change


_BAD_PATHS = ("../../secret", "/etc/passwd", "model/../../../secret", "a\0b", "./x", "model//x", "", "..", "\ud800")
MANIFESTS: dict[str, Callable[[dict[str, object]], None]] = {
    **{f"names the file {name!r}": _rename_file(name) for name in _BAD_PATHS},
    "names a file twice": lambda record: record["files"].append(record["files"][0]),  # type: ignore[attr-defined]
    "has a size of exabytes": _set("files.0.size", 2**62),
    "has a negative size": _set("files.0.size", -1),
    "has a size that is a text": _set("files.0.size", "5"),
    "has files that are a number": _set("files", 7),
    "has no tensors": _set("tensors", []),
    "has a shape that overflows": _set("tensors.0.shape", [2**40, 2**40]),
    "has a dtype that is not one": _set("tensors.0.dtype", "X99"),
    "has a chunk outside": _set("tensors.0.chunks.0.1", 2**50),
    "has a chunk elsewhere": _set("tensors.0.chunks.0.0", "../../secret"),
    "has a chunk with a negative offset": _set("tensors.0.chunks.0.1", -8),
    "is of version 99": _set("version", 99),
    "is of version true": _set("version", True),
    "has deep info": _set("info", json.loads("[" * 200 + "]" * 200)),
    "has another format": _set("format", "something"),
}


def _pointer(text: str | None, link: str | None) -> Spoil:
    def spoil(root: Path, _: Path) -> None:
        (root / "LATEST").unlink()
        if link is not None:
            (root / "LATEST").symlink_to(link)
        if text is not None:
            (root / "LATEST.txt").write_bytes(text.encode("utf-8", "surrogateescape"))

    return spoil


POINTERS: dict[str, Spoil] = {
    "a link outside": _pointer(None, "../outside"),
    "an absolute link": _pointer(None, "/etc"),
    "a circle": _pointer(None, "LATEST"),
    "a link to the root itself": _pointer(None, "."),
    "text that leads outside": _pointer("../outside", None),
    "absolute text": _pointer("/etc", None),
    "binary text": _pointer("\udcff\udcfe\0", None),
    "endless text": _pointer("x" * 10_000_000, None),
    "an announcement that leads outside": lambda root, _: _write(root / ".publishing", "../outside"),
    "an announcement that is a pipe": lambda root, _: os.mkfifo(root / ".publishing"),
    "an announcement that is a link": lambda root, secret: (root / ".publishing").symlink_to(secret),
    "a text pointer that is a pipe": lambda root, _: os.mkfifo(root / "LATEST.txt"),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _index(entries: dict[str, object]) -> Spoil:
    def spoil(root: Path, _: Path) -> None:
        (root / NAME / "manifest.json").unlink()
        place = root / NAME / "model" / "consolidated" / "model.safetensors.index.json"
        place.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": entries}))

    return spoil


def _linked_directory(root: Path, secret: Path) -> None:
    outside = secret.parent / "elsewhere"
    os.rename(root / NAME / "model", outside)
    (root / NAME / "model").symlink_to(outside)


def _dcp(data: bytes) -> Spoil:
    def spoil(root: Path, _: Path) -> None:
        (root / NAME / "manifest.json").unlink()
        (root / NAME / "model" / ".metadata").write_bytes(data)

    return spoil


OTHERS: dict[str, tuple[Spoil, bool]] = {
    "index: a file outside": (_index({"big": "../../../secret"}), False),
    "index: an absolute file": (_index({"big": "/etc/passwd"}), False),
    "index: an absent file": (_index({"big": "absent.safetensors"}), False),
    "index: a number": (_index({"big": 7}), False),
    "index: a directory": (_index({"big": "."}), False),
    "model is a link to a directory elsewhere": (_linked_directory, True),
    "DCP metadata that runs code": (_dcp(pickle.dumps(Evil())), False),
    "DCP metadata that names builtins.eval": (_dcp(b"cbuiltins\neval\n(S'1'\ntR."), False),
    "DCP metadata that is empty": (_dcp(b""), False),
    "DCP metadata that grows": (_dcp(b"\x80\x04]" + b"2" * 100 + b"e" * 50 + b"."), False),
}


def all_cases() -> list[Case]:
    """Every case; those without a manifest are judged by nothing but the readers of each file."""
    found = []
    for relative in FILES:
        for how, (spoil, links) in REPLACEMENTS.items():
            found.append(Case(f"{relative} is {how}", _replace(relative, spoil, True), True, links))
            if relative != "manifest.json":
                name = f"without manifest, {relative} is {how}"
                found.append(Case(name, _replace(relative, spoil, False), False, links))
    found += [Case(f"the manifest {how}", _manifest(change)) for how, change in MANIFESTS.items()]
    found += [Case(f"LATEST: {how}", spoil, False) for how, spoil in POINTERS.items()]
    found += [Case(how, spoil, True, links) for how, (spoil, links) in OTHERS.items()]
    return found
