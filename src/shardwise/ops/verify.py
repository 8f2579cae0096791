"""Verifies that a checkpoint is what was saved, and lists the differences by file and tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Set
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
from shardwise.format.manifest import MANIFEST_NAME, Manifest
from shardwise.ops.contents import check_contents
from shardwise.ops.targets import Target, find_targets, is_unfinished, nothing_in, with_nested

__all__ = ["Damage", "Progress", "VerifyReport", "verify"]

#: Called with the bytes read so far and the bytes to read in all; from any thread, one call at a time.
Progress = Callable[[int, int], None]

Status = Literal["whole", "damaged", "unverifiable"]

_INDEX_SUFFIX = ".safetensors.index.json"
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
        reports = [job.run(Path(path), target) for target in targets]
    whole = reports[0] if len(reports) == 1 else _merged(targets, reports)
    return replace(whole, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Job:
    level: VerifyLevel
    threads: int
    progress: Progress | None
    #: Directories with manifests of their own, which are not looked at as parts of the ones around them.
    apart: Set[Path]

    def run(self, requested: Path, target: Target) -> VerifyReport:
        report = VerifyReport(requested, target.directory / target.under, self.level, target.has_manifest)
        try:
            manifest = load_manifest(target.directory) if target.has_manifest else None
        except ManifestError as error:
            # Checks that need no manifest are made all the same.
            found = self._without_manifest(report, target)
            own = Damage(MANIFEST_NAME, "manifest", error.message)
            return replace(found, damages=(own, *found.damages))
        if manifest is None:
            return self._without_manifest(replace(report, verifiable=False), target)
        return self._with_manifest(report, target, manifest)

    def _with_manifest(self, report: VerifyReport, target: Target, manifest: Manifest) -> VerifyReport:
        root = target.directory
        files = files_below(manifest, (target.under,) if target.under else ())
        if target.under and not files:  # a file that somebody put there
            return self._without_manifest(replace(report, verifiable=False), target)
        tensors = tensors_by_file(manifest)
        damages = check_files(root, files, tensors)
        extra: list[str] = []
        known = {file.path for file in manifest.files} | {MANIFEST_NAME}
        for relative in _walk(root, target.under, damages, self.apart):
            if relative not in known and _is_read(relative):
                damages.append(Damage(relative, "unexpected", "no save wrote this file, and a load would read it"))
            elif relative not in known:
                extra.append(relative)
        nbytes = 0
        if self.level == "digests":
            bad = {damage.file for damage in damages}
            extents = extents_of(manifest, [file for file in files if file.path not in bad])
            counted = Counted(sum(extent.nbytes for extent in extents), self.progress)
            damages += check_extents(root, extents, current(), threads=self.threads, advance=counted.add)
            nbytes = counted.done
        return replace(
            report,
            files=len(files),
            tensors=len({(t.component, t.spec.name) for file in files for t in tensors.get(file.path, ())}),
            bytes_read=nbytes,
            damages=tuple(sorted(damages, key=lambda damage: (damage.file, damage.tensors))),
            extra=tuple(extra),
            undigested=tuple(file.path for file in files if file.crc32c is None),
        )

    def _without_manifest(self, report: VerifyReport, target: Target) -> VerifyReport:
        damages: list[Damage] = []
        single = is_file(target.directory / target.under)
        below = [target.under] if single else _walk(target.directory, target.under, damages)
        listed = [relative for relative in below if relative != MANIFEST_NAME and not is_unfinished(relative)]
        if not listed and not damages and not target.has_manifest:
            raise nothing_in(target.directory / target.under)
        found = check_contents(target.directory, listed, alone=single)
        return replace(
            report,
            files=found.files,
            tensors=found.tensors,
            damages=(*damages, *found.damages),
            extra=tuple(found.extra),
            checked=found.checked,
            unchecked=("digests: there is no manifest that has them", *found.unchecked),
        )


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
    if path.name.endswith((".safetensors", _INDEX_SUFFIX, ".distcp")) or path.name == ".metadata":
        return top in ("model", "model_ema", "optim", "rng", "extra", "consolidated", "")
    return top in _STATE_DIRS and path.suffix == ".json"


def _merged(targets: tuple[Target, ...], reports: list[VerifyReport]) -> VerifyReport:
    """One report on directories that have manifests of their own: components, or an export made later."""
    top = Path(os.path.commonpath([target.directory for target in targets]))
    pairs = [(target.directory.relative_to(top), report) for target, report in zip(targets, reports, strict=True)]
    return replace(
        reports[0],
        path=top,
        verifiable=all(report.verifiable for report in reports),
        files=sum(report.files for report in reports),
        tensors=sum(report.tensors for report in reports),
        bytes_read=sum(report.bytes_read for report in reports),
        damages=tuple(
            replace(damage, file=(below / damage.file).as_posix())
            for below, report in pairs
            for damage in report.damages
        ),
        extra=tuple((below / name).as_posix() for below, report in pairs for name in report.extra),
        undigested=tuple((below / name).as_posix() for below, report in pairs for name in report.undigested),
        checked=tuple(dict.fromkeys(each for report in reports for each in report.checked)),
        unchecked=tuple(dict.fromkeys(each for report in reports for each in report.unchecked)),
    )
