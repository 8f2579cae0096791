"""Bits that flip and files that are cut.

`verify` names the right file and tensor, and nothing on an intact checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from tests.faults.crash_states import write_tree
from tests.faults.kills import Tally, prepared
from tests.faults.processes import scratch

from shardwise.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from shardwise.ops.verify import VerifyReport, verify


def _checkpoint(changes: dict[str, object]) -> Path:
    root = Path(tempfile.mkdtemp(dir=scratch()))
    write_tree(prepared(changes), root)
    return root / "epoch_0_step_2"


def _files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file() and p.stat().st_size)


def _tensors_at(manifest: Manifest, file: str, begin: int, end: int) -> set[str]:
    """Tensors with a byte in a range of a file."""
    return {
        tensor.spec.name
        for tensor in manifest.tensors
        for chunk in tensor.chunks
        if chunk.file == file and chunk.offset < end and begin < chunk.offset + chunk.nbytes
    }


def _named(report: VerifyReport) -> tuple[set[str], set[str]]:
    return {damage.file for damage in report.damages}, {name for damage in report.damages for name in damage.tensors}


def bit_flips(count: int, seed: int = 0) -> Tally:
    """Single-bit flips at random places; files take turns, so that every file is hit."""
    tally, dice = Tally(), random.Random(seed)
    for mode in ("every", "false"):
        directory = _checkpoint({"save_consolidated": mode})
        manifest = read_manifest(directory)
        files = _files(directory)
        for number in range(count // 2):
            file = files[number % len(files)]
            place = directory / file
            offset, bit = dice.randrange(place.stat().st_size), dice.randrange(8)
            _flip(place, offset, bit)
            found, tensors = _named(verify(directory, threads=1))
            wanted = set() if file == MANIFEST_NAME else _tensors_at(manifest, file, offset, offset + 1)
            if found != {file} or tensors != wanted:
                tally.failures.append(f"bit {bit} of byte {offset} of {file}: {found} {tensors}, not {wanted}")
            _flip(place, offset, bit)
            tally.cases += 1
        _intact(directory, tally)
        shutil.rmtree(directory.parent)
    return tally


def _flip(place: Path, offset: int, bit: int) -> None:
    with place.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def _intact(directory: Path, tally: Tally) -> None:
    report = verify(directory)
    if report.status != "whole":
        tally.failures.append(f"an intact checkpoint is called {report.status}: {report.damages[:3]}")


def truncations(steps: int) -> Tally:
    """Every file cut at ``steps`` places, and one byte longer; told without reading a byte."""
    tally = Tally()
    for mode in ("every", "false"):
        directory = _checkpoint({"save_consolidated": mode})
        manifest = read_manifest(directory)
        for file in _files(directory):
            place = directory / file
            content = place.read_bytes()
            sizes = {len(content) - 1, len(content) + 1, *(len(content) * part // steps for part in range(steps))}
            for size in sorted(sizes):
                place.write_bytes(content[:size] + b"x" * (size - len(content)))
                found, tensors = _named(verify(directory, digests=False))
                lost = set() if file == MANIFEST_NAME else _tensors_at(manifest, file, size, len(content))
                if found != {file} or tensors != lost:
                    tally.failures.append(f"{file} of {size} bytes: {found} {tensors}, not {lost}")
                tally.cases += 1
            place.write_bytes(content)
        _intact(directory, tally)
        shutil.rmtree(directory.parent)
    return tally


def replacements() -> Tally:
    """Every file deleted, and replaced by a directory, a pipe, a link to its own copy, a link outside.

    Or an empty file.
    """
    tally = Tally()
    directory = _checkpoint({})
    for file in _files(directory):
        if file == MANIFEST_NAME:
            continue
        place, aside = directory / file, directory.parent / "aside"
        for how in ("absent", "directory", "pipe", "link", "link outside", "device"):
            os.rename(place, aside)
            if how == "directory":
                place.mkdir()
            elif how == "pipe":
                os.mkfifo(place)
            elif how == "link":
                shutil.copy(aside, directory / "notes.txt")
                place.symlink_to(os.path.relpath(directory / "notes.txt", place.parent))
            elif how == "link outside":
                place.symlink_to(aside)
            elif how == "device":
                place.symlink_to("/dev/zero")
            found, _ = _named(verify(directory))
            if found != {file}:
                tally.failures.append(f"{file} as {how}: {found}")
            tally.cases += 1
            if how == "directory":
                place.rmdir()
            else:
                place.unlink(missing_ok=True)
            (directory / "notes.txt").unlink(missing_ok=True)
            os.rename(aside, place)
    _intact(directory, tally)
    shutil.rmtree(directory.parent)
    return tally
