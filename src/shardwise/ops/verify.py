"""Verifies that a checkpoint is what was saved, and lists the differences by file and tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from shardwise.disk.names import is_directory, is_file
from shardwise.disk.storage import Storage, current, using
from shardwise.engine.collector import without_collector
from shardwise.engine.verify import (
    Damage,
    VerifyLevel,
    check_extents,
    check_files,
    extents_of,
    files_below,
    load_manifest,
    tensors_by_file,
)
from shardwise.errors import ManifestError, MisuseError, StorageError
from shardwise.format.manifest import MANIFEST_NAME, FileRecord, Manifest
from shardwise.ops.contents import Findings, check_contents
from shardwise.ops.targets import Target, find_targets, is_unfinished, nothing_in, with_nested

__all__ = ["Damage", "Progress", "VerifyReport", "verify"]

#: Called with the bytes read so far and the bytes to read in all; from any thread, one call at a time.
Progress = Callable[[int, int], None]

Status = Literal["whole", "damaged", "unverifiable"]

_STATE_DIRS = ("optim", "rng", "extra")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The findings of a verification.

    Attributes:
        requested: The path as the caller gave it.
        path: What was verified: for a root, its newest checkpoint; for a part of a checkpoint, that part.
        level: ``sizes`` or ``digests``.
        verifiable: A manifest says what every byte must be. Without one, files are compared with what other files say
            about them, and their bytes are not checked.
        files: Number of files looked at.
        tensors: Number of tensors in them.
        bytes_read: Bytes whose digest was computed.
        seconds: How long it took.
        damages: What is wrong; paths relative to ``path`` (to its checkpoint, where ``path`` is a part of one).
        extra: Files that no save wrote and no load reads (notes, a README); not damage.
        undigested: Files of the manifest without a digest: only their size could be compared.
        checked: Without a manifest, what was compared with what.
        unchecked: Without a manifest, what could not be compared.
    """

    requested: Path
    path: Path
    level: VerifyLevel
    verifiable: bool
    files: int = 0
    tensors: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    damages: tuple[Damage, ...] = ()
    extra: tuple[str, ...] = ()
    undigested: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The verdict."""
        if self.damages:
            return "damaged"
        return "whole" if self.verifiable else "unverifiable"


def verify(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    digests: bool = True,
    storage: Storage | None = None,
) -> VerifyReport:
    """Verify a checkpoint, a part of one (``model``, ``optim``), or the newest checkpoint of a root.

    Args:
        path: Its directory. A component with a manifest of its own is judged by it.
        threads: Reads at once; the cores, at most 8, by default. Memory is 4 MiB for each.
        progress: Called with the bytes read and the bytes to read.
        digests: Read every byte; else manifest, kinds and sizes are compared.
        storage: Where it is; the mounted file systems by default.

    Raises:
        CheckpointNotFoundError: There is nothing to verify.
        IncompleteCheckpointError: The path is an interrupted save.
        StorageError: The path cannot be read.
        MisuseError: ``threads`` is below 1.

    Examples:
        >>> path = checkpointer.save(step=10, model=model)
        >>> verify(path).status
        'whole'
    """
    if threads is not None and threads < 1:
        raise MisuseError(f"threads is {threads}", hint="Use at least 1.")
    started = time.monotonic()
    level: VerifyLevel = "digests" if digests else "sizes"
    with using(storage or current()), without_collector():
        targets = with_nested(find_targets(path))
        job = _Job(level, threads or min(8, os.cpu_count() or 1), progress, {target.directory for target in targets})
        findings = [job.run(target) for target in targets]
    # Several directories have manifests of their own: components, or an export made later.
    top = Path(os.path.commonpath([target.directory for target in targets]))
    found = [(target.directory.relative_to(top), each) for target, each in zip(targets, findings, strict=True)]
    return VerifyReport(
        Path(path),
        top / targets[0].under if len(targets) == 1 else top,
        level,
        all(each.verifiable for each in findings),
        sum(each.files for each in findings),
        sum(each.tensors for each in findings),
        sum(each.bytes_read for each in findings),
        time.monotonic() - started,
        tuple(replace(each, file=(below / each.file).as_posix()) for below, own in found for each in own.damages),
        tuple((below / name).as_posix() for below, own in found for name in own.extra),
        tuple((below / name).as_posix() for below, own in found for name in own.undigested),
        tuple(dict.fromkeys(each for own in findings for each in own.checked)),
        tuple(dict.fromkeys(each for own in findings for each in own.unchecked)),
    )


@dataclass(frozen=True)
class _Job:
    level: VerifyLevel
    threads: int
    progress: Progress | None
    #: Directories with manifests of their own, which are not looked at as parts of the ones around them.
    apart: Set[Path]

    def run(self, target: Target) -> Findings:
        try:
            manifest = load_manifest(target.directory)
        except ManifestError as error:
            # Checks that need no manifest are made all the same.
            found = self._without_manifest(target)
            found.verifiable = True
            found.damages.insert(0, Damage(MANIFEST_NAME, "manifest", error.message))
            return found
        files = () if manifest is None else files_below(manifest, (target.under,) if target.under else ())
        if manifest is None or (target.under and not files):  # a file that somebody put there
            return self._without_manifest(target)
        return self._with_manifest(target, manifest, files)

    def _with_manifest(self, target: Target, manifest: Manifest, files: Sequence[FileRecord]) -> Findings:
        root, tensors = target.directory, tensors_by_file(manifest)
        found = Findings(True, len(files), damages=check_files(root, files, tensors))
        found.tensors = len({(t.component, t.spec.name) for file in files for t in tensors.get(file.path, ())})
        found.undigested += [file.path for file in files if file.crc32c is None]
        known = {file.path for file in manifest.files} | {MANIFEST_NAME}
        for relative in _walk(root, target.under, found.damages, self.apart):
            if relative not in known and _is_read(relative):
                found.add(relative, "unexpected", "no save wrote this file, and a load would read it")
            elif relative not in known:
                found.extra.append(relative)
        if self.level == "digests":
            bad = {damage.file for damage in found.damages}
            extents = extents_of(manifest, [file for file in files if file.path not in bad])
            counted = Counted(sum(extent.nbytes for extent in extents), self.progress)
            found.damages += check_extents(root, extents, current(), threads=self.threads, advance=counted.add)
            found.bytes_read = counted.done
        found.damages.sort(key=lambda damage: (damage.file, damage.tensors))
        return found

    def _without_manifest(self, target: Target) -> Findings:
        found = Findings(unchecked=["digests: there is no manifest that has them"])
        single = is_file(target.directory / target.under)
        below = [target.under] if single else _walk(target.directory, target.under, found.damages)
        listed = [relative for relative in below if relative != MANIFEST_NAME and not is_unfinished(relative)]
        if not listed and not found.damages and not target.has_manifest:
            raise nothing_in(target.directory / target.under)
        check_contents(found, target.directory, listed, alone=single)
        return found


class Counted:
    """Adds up bytes that were read or written, and passes the sum on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self._progress = total, 0, progress

    def add(self, nbytes: int) -> None:
        """Count bytes; one call at a time."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self.total)


def _walk(root: Path, under: str, damages: list[Damage], apart: Set[Path] = frozenset()) -> Iterator[str]:
    """Every entry below ``root/under`` that is not a directory, relative to ``root``; links are not followed."""
    if not is_directory(root / under, follows=False):
        return
    try:
        entries = current().entries(root / under)
    except StorageError as error:
        damages.append(Damage(under, "unreadable", error.message))
        return
    for name, kind in sorted(entries, key=lambda entry: (entry.kind == "directory", entry.name)):
        relative = (PurePosixPath(under) / name).as_posix()
        if kind != "directory":
            yield relative
        elif root / relative not in apart:
            yield from _walk(root, relative, damages, apart)


def _is_read(relative: str) -> bool:
    """Whether a load takes in a file of this name though no manifest lists it: tensor files are found by listing."""
    path = PurePosixPath(relative)
    if is_unfinished(relative):
        return False
    top = path.parts[0] if len(path.parts) > 1 else ""
    if path.name.endswith((".safetensors", ".safetensors.index.json", ".distcp")) or path.name == ".metadata":
        return top in ("model", "model_ema", "optim", "rng", "extra", "consolidated", "")
    return top in _STATE_DIRS and path.suffix == ".json"
