"""Resolves what a user names to a checkpoint that may be resumed from; it only reads, so every rank may call it.

Order is never by time stamps: a clock that jumps, a copy or a restored backup must not change what is newest. What was
published later is newer (`shardwise.lifecycle.lineage`); checkpoints without a lineage count as older than all others
and are ordered by ``(epoch, step)``. With a step that counts on through the epochs this is the order of the steps; with
one that starts again in every epoch, ordering by step alone would take the end of an old epoch for the newest and let
retention delete the newest instead. The one case that this order gets wrong, epoch numbers that run backwards after a
change of the data, is decided by ``LATEST``, which is set by publication and always comes first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

from shardwise.disk.guarded import read_note
from shardwise.disk.names import exists, is_directory, is_file, is_link, is_there, names_in, real_path
from shardwise.disk.storage import current, storage_errors
from shardwise.errors import CheckpointNotFoundError, IncompleteCheckpointError, MisuseError, ShardwiseError
from shardwise.format.manifest import read_manifest
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.lifecycle.lineage import Lineage, read_lineage
from shardwise.lifecycle.names import (
    LATEST,
    MANIFEST_NAME,
    METRICS_NAME,
    foreign_numbers,
    is_doomed,
    is_temporary,
    parse_checkpoint_name,
)
from shardwise.lifecycle.pointers import announced, linked_checkpoint, read_pointer

logger = logging.getLogger(__name__)

#: What ``save_pretrained`` writes.
_SAVE_PRETRAINED = frozenset({"config.json", "adapter_config.json"})
_METRICS_LIMIT = 1 << 20
_LISTED = 8


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A directory of the root that has a checkpoint's name, ``epoch_E_step_S``.

    Attributes:
        complete: It may be resumed from.
        verifiable: It has a manifest. A complete one without (another tool's) cannot be checked.
        metrics: Finite numbers of its ``losses.json``.
        measurable: Its ``losses.json`` is absent or what it should be; of a damaged one nobody knows what it said.
        lineage: Where it came from; ``None`` where it was saved without one, by another tool or an older release.
        linked: It is a link to a directory elsewhere.
    """

    name: str
    epoch: int
    step: int
    complete: bool
    path: Path
    verifiable: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    measurable: bool = True
    lineage: Lineage | None = None
    linked: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by name."""
        return self.epoch, self.step

    @property
    def sequence(self) -> int:
        """Number of its publication in its root, from 1; 0 where it has no lineage."""
        return 0 if self.lineage is None else self.lineage.sequence

    @property
    def tree(self) -> str:
        """What it has in common with all that have the same first ancestor."""
        return "" if self.lineage is None else self.lineage.tree


@dataclass(frozen=True, slots=True)
class ResolvedCheckpoint:
    """A complete checkpoint to resume from.

    Attributes:
        name: Last component of ``path``.
        epoch: From the name, also in the forms that other tools use, or of a copy with another name from its lineage or
            manifest; ``None`` where none of them says.
        step: Likewise.
        verifiable: It has a manifest.
        metrics: Finite numbers of its ``losses.json``.
    """

    path: Path
    name: str
    epoch: int | None
    step: int | None
    verifiable: bool
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)


def is_verifiable(directory: Path) -> bool:
    """Whether the directory holds a manifest, which is what a save writes last."""
    return is_file(directory / MANIFEST_NAME)


def is_complete(directory: Path) -> bool:
    """Whether the directory may be resumed from.

    It has a manifest, or is another tool's: a ``model/`` with something in it, or DCP's ``.metadata``, written last. A
    manifest that is a link to what is not there is one all the same: its content lies elsewhere (git-annex) and has to
    be fetched, and nothing says that the save was interrupted.
    """
    has_manifest = is_verifiable(directory) or is_link(directory / MANIFEST_NAME)
    if has_manifest or is_file(directory / DCP_METADATA_NAME):
        return True
    model = directory / "model"
    return is_directory(model) and bool(names_in(model))


def list_checkpoints(root: Path) -> tuple[CheckpointInfo, ...]:
    """Every directory of the root with a checkpoint's name, by epoch and step; a root that does not exist has none.

    Names are read, and the small files beside the tensors.

    A link to a directory elsewhere counts as the checkpoint that it is called (`linked_checkpoint`); any other link is
    a pointer, whatever it is called.

    Raises:
        StorageError: The root is a file, or cannot be read.
    """
    found = []
    with storage_errors(root):
        if not exists(root):
            return ()
        for entry in current().entries(root):
            numbers = parse_checkpoint_name(entry.name)
            directory = root / entry.name
            linked = linked_checkpoint(root, entry.name)
            if numbers is None or not (entry.kind == "directory" or linked):
                continue
            metrics, lineage = _metrics(directory), read_lineage(directory)
            info = CheckpointInfo(
                entry.name,
                *numbers,
                complete=is_complete(directory),
                path=directory,
                verifiable=is_verifiable(directory),
                metrics=metrics or {},
                measurable=metrics is not None,
                lineage=lineage,
                linked=linked,
            )
            found.append(info)
    return tuple(sorted(found, key=lambda info: info.order))


def newest(checkpoints: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The complete one that was published last."""
    complete = (info for info in checkpoints if info.complete)
    return max(complete, key=lambda info: (info.sequence, info.order), default=None)


def read_metrics(directory: Path) -> dict[str, float]:
    """The finite numbers at the top level of ``losses.json``; none where it is absent or damaged."""
    return _metrics(directory) or {}


def _metrics(directory: Path) -> dict[str, float] | None:
    """As `read_metrics`; ``None`` where the file is there and cannot be read."""
    path = directory / METRICS_NAME
    data = read_note(directory, METRICS_NAME, _METRICS_LIMIT)
    if data is None:
        return None if is_there(path) else {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        # Metrics choose what is best, they are not needed to resume; verify reports the damage.
        logger.warning("%s is not JSON and is left out of account: %s", path, error)
        return None
    if not isinstance(document, dict):
        return None
    numbers: dict[str, float] = {}
    for key, value in document.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                numbers[key] = float(value)
    return {key: number for key, number in numbers.items() if math.isfinite(number)}


def resolve(root: Path, restore_from: str | Path | int = LATEST) -> ResolvedCheckpoint | None:
    """Find the checkpoint that ``restore_from`` means: it is complete.

    ``restore_from`` is ``LATEST``, another pointer's name, the name of a directory in the root, a path (a `Path`, or
    text that names nothing in the root), or the number of a step. Returns ``None`` only for ``LATEST`` of a root in
    which no checkpoint was published.

    Raises:
        CheckpointNotFoundError: There is no such thing; the text lists what there is.
        IncompleteCheckpointError: It is an interrupted save.
        StorageError: The root or the target cannot be read.
        MisuseError: ``restore_from`` is neither text nor a path nor a number, or the number of several checkpoints.
    """
    if not isinstance(restore_from, str | Path):
        if isinstance(restore_from, bool) or not isinstance(restore_from, SupportsIndex):
            raise MisuseError(
                f"restore_from is {restore_from!r}",
                hint=f"Pass {LATEST!r}, another pointer's or a checkpoint's name, a path, or the number of a step.",
            )
        return _of_step(root, operator.index(restore_from))
    with storage_errors(root):
        if isinstance(restore_from, Path):
            return _at_path(root, restore_from)
        if restore_from == LATEST:
            return _latest(root)
        return _named(root, restore_from)


def latest_step(root: Path) -> int | None:
    """The step of the checkpoint that ``LATEST`` means; raises as `resolve`.

    ``None`` where there is none to resume from, or it is of another tool and does not tell its step.
    """
    found = resolve(root)
    return None if found is None else found.step


def _of_step(root: Path, step: int) -> ResolvedCheckpoint:
    found = [info for info in list_checkpoints(root) if info.step == step]
    complete = [info for info in found if info.complete]
    if len(complete) > 1:
        raise MisuseError(
            f"there are several checkpoints of step {step}: {', '.join(info.name for info in complete)}",
            hint="Pass the name of the one that you mean.",
        )
    if not found:
        raise CheckpointNotFoundError(f"there is no checkpoint of step {step}", path=root, hint=_what_is_there(root))
    [chosen] = complete or found[:1]
    return _checked(root, chosen.path, chosen.name)


def _latest(root: Path) -> ResolvedCheckpoint | None:
    name = publication_begun(root)
    if name is not None:
        return _describe(root / name)
    problem = None
    try:
        name = read_pointer(root, LATEST)
        if name is None:
            # Copying tools that follow links leave a directory in the pointer's place: the copy is as good.
            name = LATEST if is_directory(root / LATEST) else None
        if name is not None:
            return _checked(root, root / name, f"{LATEST} leads to {name}, which")
    except (CheckpointNotFoundError, IncompleteCheckpointError) as error:
        problem = error
    checkpoints = list_checkpoints(root)
    fallback = newest(checkpoints)
    if fallback is not None:
        if problem is not None:
            logger.warning("%s Falling back to %s.", problem.message, fallback.name)
        return _describe(root / fallback.name)
    if problem is not None:
        # There was a checkpoint once. Starting afresh without a word would bury its loss.
        raise problem
    if checkpoints:
        logger.warning("%s holds interrupted saves only: %s", root, ", ".join(info.name for info in checkpoints))
    return None


def publication_begun(root: Path) -> str | None:
    """Name of the checkpoint that was published and is not ``LATEST`` yet: a crash came between the two."""
    found = announced(root)
    if found is None or not parse_checkpoint_name(found.name) or not is_complete(root / found.name):
        return None
    if found.id:  # another one may still be there under this name, which was to be replaced
        lineage = read_lineage(root / found.name)
        return found.name if lineage is not None and lineage.own.id == found.id else None
    return found.name


def _named(root: Path, text: str) -> ResolvedCheckpoint:
    name = text.rstrip(os.sep)
    if not text.strip():
        raise CheckpointNotFoundError("restore_from is empty", path=root, hint=_what_is_there(root))
    if name and os.sep not in name and name not in (".", ".."):
        target = None if linked_checkpoint(root, name) else read_pointer(root, name)
        if target is not None:
            return _checked(root, root / target, f"The pointer {name} leads to {target}, which")
        if is_there(root / name):
            return _checked(root, root / name, name)
    return _at_path(root, Path(text))


def _at_path(root: Path, path: Path) -> ResolvedCheckpoint:
    path = path.expanduser()
    if path.name and not is_there(path):
        target = read_pointer(path.parent, path.name)
        if target is not None:
            return _checked(path.parent, path.parent / target, f"The pointer {path.name} leads to {target}, which")
    try:
        real = real_path(path)
        real = real if exists(real) else path
    except (ValueError, OSError) as error:
        raise CheckpointNotFoundError(
            f"{str(path)!r} cannot be followed: {error}", path=path, hint=_what_is_there(root)
        ) from error
    return _checked(root, real, repr(str(path)))


def _checked(root: Path, directory: Path, label: str) -> ResolvedCheckpoint:
    kind: type[CheckpointNotFoundError | IncompleteCheckpointError] = CheckpointNotFoundError
    hint: str | None = None
    if is_temporary(directory.name) or is_doomed(directory.name):
        kind, what = IncompleteCheckpointError, "is an interrupted save"
    elif not is_there(directory):
        what = "does not exist"
    elif not is_directory(directory):
        what = "is not a directory"
    elif is_complete(directory):
        return _describe(directory)
    elif parse_checkpoint_name(directory.name) is None and not _SAVE_PRETRAINED.isdisjoint(names_in(directory)):
        what = "is a directory of a Hugging Face model or adapter, and no checkpoint of a run"
        hint = "There is nothing to resume in it: load its weights with load_base_model, or with load_model."
    else:
        kind = IncompleteCheckpointError
        what = f"has neither {MANIFEST_NAME} nor model/ nor .metadata: an interrupted save, or not a checkpoint"
    raise kind(f"{label} {what}", path=directory, hint=hint or _what_is_there(root))


def _describe(directory: Path) -> ResolvedCheckpoint:
    numbers: tuple[int | None, int | None] | None = parse_checkpoint_name(directory.name)
    verifiable = is_verifiable(directory)
    if numbers is None:  # a copy under another name, or another tool's
        lineage = read_lineage(directory)
        if lineage is not None:
            numbers = lineage.epoch, lineage.step
        else:
            numbers = _recorded_numbers(directory) if verifiable else foreign_numbers(directory.name)
    return ResolvedCheckpoint(directory, directory.name, *numbers, verifiable, read_metrics(directory))


def _recorded_numbers(directory: Path) -> tuple[int | None, int | None]:
    """Epoch and step by the manifest, of a copy under another name that was saved before there were lineages."""
    try:
        info = read_manifest(directory / MANIFEST_NAME).info
    except ShardwiseError as error:
        logger.warning("%s does not tell the step: %s", directory, error)
        return None, None
    epoch, step = info.get("epoch"), info.get("step")
    return epoch if type(epoch) is int else None, step if type(step) is int else None


def _what_is_there(root: Path) -> str:
    names = [info.name for info in list_checkpoints(root) if info.complete] if is_directory(root) else []
    if not names:
        return f"{root} holds no complete checkpoint."
    shown = ", ".join(reversed(names[-_LISTED:])) + (", ..." if len(names) > _LISTED else "")
    return f"Complete checkpoints in {root}, newest first: {shown}."
